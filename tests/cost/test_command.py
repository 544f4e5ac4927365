"""`dsmoe cost`: what it prints, as text and as data, and how it ends."""

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from torch import nn

import dsmoe_compiler as dsmoe
from dsmoe_compiler.cli import cost_paper, stages
from dsmoe_compiler.cli.cost_table import amount, duration
from dsmoe_compiler.cost_model.paper import RATIOS, ROWS, Figure, PaperRow
from dsmoe_compiler.cost_model.paper_check import CheckedRow, Compared
from dsmoe_compiler.models import zoo
from tests.cli.fakes import run, wrong
from tests.cli.on_terminal import on_terminal
from tests.cost.models import MoE, OfData, Refused, Tied

TINY = "deepseek-moe-tiny"
HERE = "tests.cost.test_command"


@pytest.fixture(autouse=True)
def _no_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine."""
    monkeypatch.setattr(stages, "PATIENCE_SECONDS", 600.0)


def layer() -> tuple[nn.Module, tuple[torch.Tensor, ...], dict[str, Any]]:
    return MoE(), (torch.ones(5, 16),), {}


def refused() -> tuple[nn.Module, tuple[torch.Tensor, ...], dict[str, Any]]:
    return Refused(), (torch.ones(5, 16),), {}


def of_data() -> tuple[nn.Module, tuple[torch.Tensor, ...], dict[str, Any]]:
    return OfData(), (torch.ones(5, 16),), {}


def without_experts() -> tuple[nn.Module, tuple[torch.Tensor, ...], dict[str, Any]]:
    return Tied(), (torch.zeros(3, 5, dtype=torch.int64),), {}


def doubled(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


@functools.cache
def cost(*arguments: str) -> Result:
    result = run("cost", *arguments)
    assert result.exit_code == 0, result.output
    return result


def test_a_model_of_the_zoo_on_a_page() -> None:
    lines = cost(TINY).stdout.splitlines()
    held = zoo.parameter_count(TINY)
    shown = (amount(held.total, billion="B"), amount(held.activated, billion="B"))
    assert lines[0].startswith(
        "DeepSeekMoEForCausalLM: {} parameters, {} activated by a token".format(*shown)
    )
    assert lines[1].startswith("forward of 1 sequence of 4096 tokens, float32: ")
    assert max(map(len, lines)) <= 80
    (mixture,) = (line for line in lines if line.startswith("model.layers.{1-2}.mlp"))
    assert mixture.split()[1:4] == ["16", "4", "2"]
    (one,) = (line for line in lines if line.lstrip().startswith("1  "))
    assert "4.0 of 16" in one and one.endswith("memory")
    assert "a step on NVIDIA H200" in lines


def test_the_same_as_data() -> None:
    record = json.loads(cost(TINY, "--json", "--batch", "2", "--seq", "10", "--gpu", "a100").stdout)
    assert (record["batch"], record["seq"], record["gpu"]) == (2, 10, "NVIDIA A100")
    assert sum(record["kinds"].values()) == record["flops"]
    assert sum(part["share"] for part in record["parts"]) == pytest.approx(1)
    assert sum(part["flops"] * len(part["names"]) for part in record["parts"]) == record["flops"]
    assert [step["tokens"] for step in record["steps"]] == [2, 20]
    held = zoo.parameter_count(TINY)
    assert record["parameters"]["total"] == held.total
    assert record["parameters"]["activated"] == held.activated


def test_the_dtype_halves_the_bytes() -> None:
    whole, half = (
        json.loads(cost(f"{HERE}:layer", "--json", *more).stdout) for more in ((), ("--dtype", "bfloat16"))
    )
    assert half["dtypes"] == ["bfloat16"]
    assert half["flops"] == whole["flops"]
    assert 2 * half["steps"][-1]["weight_bytes"] == whole["steps"][-1]["weight_bytes"]


def test_a_refused_layer_and_what_is_not_counted_are_said() -> None:
    printed = cost(f"{HERE}:refused", "--seq", "6").stdout
    assert "not fused, counted as written and with all experts activated: (model)" in printed
    printed = " ".join(cost(f"{HERE}:of_data", "--seq", "6").stdout.split())
    assert "16 products are not counted, sizes depend on data: (model)" in printed
    assert "(model) ≥ 1.536 k ≥ 14.3%" in printed  # its router's
    assert "float32: ≥ 10.75 kFLOP" in printed


def test_a_model_without_experts_or_products() -> None:
    printed = cost(f"{HERE}:without_experts").stdout
    assert "Tied: 244 parameters, 244 activated by a token (100.0%)" in printed
    assert "experts hit" in printed and " of " in printed
    nothing = cost(f"{HERE}:doubled", "--input", "x=4x16").stdout
    assert "doubled: 0 parameters" in nothing and ": 0 FLOP" in nothing
    assert "of all FLOPs" not in nothing


def test_a_compiled_file_costs_what_its_model_does(tmp_path: Path) -> None:
    model, file = MoE(), str(tmp_path / "layer.pt2")
    dsmoe.compile(model, (torch.ones(5, 16),)).save(file)
    record = json.loads(run("cost", file, "--json", "--seq", "7").stdout)
    assert record == json.loads(dsmoe.cost(model, (torch.ones(5, 16),), seq=7).to_json())
    assert "no meaning for a .pt2 file" in wrong("cost", file, "--dtype", "float16")


@pytest.mark.parametrize(
    "arguments, said",
    [
        ((), "give a MODEL, or --paper."),
        ((TINY, "--gpu", "B200"), "unknown GPU 'B200'; the nearest names are: "),
        ((TINY, "--seq", "0"), "0 is not in the range"),
        (("deepseek-moe-tini",), "deepseek-moe-tiny"),
        (("--paper", "--seq", "7"), "--paper has its own sizes: leave out --seq."),
        (("mixtral", "--paper"), "unknown model of the paper 'mixtral'"),
    ],
)
def test_wrong_input_is_one_line(arguments: tuple[str, ...], said: str) -> None:
    assert said in wrong("cost", *arguments)


def as_printed(row: PaperRow, factor: float = 1.0) -> CheckedRow:
    """A row whose model is what the paper prints, or so many times that."""
    compared = tuple(Compared(figure, figure.value * factor) for figure in row.figures)
    flops = next((f.value * factor for f in row.figures if f.quantity == "training FLOPs"), 0)
    return CheckedRow(row, compared, int(flops))


@pytest.fixture
def checking(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[PaperRow], CheckedRow]], None]:
    """What checks a row instead of building its model."""

    def by(check: Callable[[PaperRow], CheckedRow]) -> None:
        monkeypatch.setattr(cost_paper, "checked_row", lambda row, stage: check(row))

    return by


def test_the_paper_on_a_page(checking: Callable[[Callable[[PaperRow], CheckedRow]], None]) -> None:
    checking(as_printed)
    result = run("cost", "--paper")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    figures = [figure for row in ROWS for figure in row.figures if not figure.skipped]
    total = len(figures) + len(RATIOS)
    assert lines[-1] == f"{total} of {total} figures within their tolerance"
    assert sum(line.endswith("  ok") for line in lines) == total
    assert sum("  skipped" in line for line in lines) == 1
    for row in ROWS:
        assert f"{row.name}, {row.source}" in lines
    for each in RATIOS:
        names = f"  {each.row.removeprefix('DeepSeekMoE ')} to {each.against}  "
        assert any(line.startswith(names) and f"{each.printed} %" in line for line in lines)
    assert "the paper gives" in result.stdout and "13.3B parameters" in result.stdout


def test_a_figure_that_is_missed_ends_with_1(
    checking: Callable[[Callable[[PaperRow], CheckedRow]], None],
) -> None:
    checking(lambda row: as_printed(row, 1.2 if row.preset == "dense-x4" else 1.0))
    result = run("cost", "--paper")
    assert result.exit_code == 1
    assert [line.split()[0] for line in result.stdout.splitlines() if line.endswith("MISSED")] == [
        "in",
        "activated",
    ]
    record = json.loads(run("cost", "--paper", "--json").stdout)
    assert record["ok"] is False
    assert [row["preset"] for row in record["rows"] if not row["ok"]] == ["dense-x4"]
    assert [each["name"] for each in record["unpublished"]] == ["DeepSeekMoE 13.3B"]
    assert all(each["ok"] and each["against"] for each in record["ratios"])


def test_a_row_without_figures_of_ours_says_why(
    checking: Callable[[Callable[[PaperRow], CheckedRow]], None],
) -> None:
    def unfused(row: PaperRow) -> CheckedRow:
        return CheckedRow(
            row, tuple(Compared(figure, None, "it is not fused") for figure in row.figures), None
        )

    checking(unfused)
    result = run("cost", "dense-0.2b", "--paper")
    assert result.exit_code == 1
    assert "Dense 0.2B: it is not fused" in result.stdout
    assert "13.3B" not in result.stdout


def test_a_skipped_figure_is_shown_with_its_reason(
    checking: Callable[[Callable[[PaperRow], CheckedRow]], None],
) -> None:
    skipped = Figure("activated", "12.2", 0.01, "nobody knows how")
    checking(lambda row: as_printed(replace(row, figures=(skipped,)), 1.5))
    result = run("cost", "dense-0.2b", "--paper")
    assert result.exit_code == 0
    assert "skipped" in result.stdout and "activated: nobody knows how" in result.stdout


def test_numbers_are_short() -> None:
    numbers = [0, 7, 999, 1000, 1234, 56_789, 16_375_728_128, 2.5e15]
    assert [amount(n, "B") for n in numbers] == [
        *("0 B", "7 B", "999 B", "1 kB", "1.234 kB", "56.79 kB", "16.38 GB", "2.500 PB")
    ]
    assert amount(16_375_728_128, billion="B") == "16.38 B"
    assert [amount(n) for n in (9.9996, 99.996, 999_960, 3e18)] == ["10.00", "100.0", "1.000 M", "3 E"]
    assert [duration(s) for s in (2.0, 0.00123, 4.5e-6, 7e-9)] == ["2 s", "1.230 ms", "4.500 µs", "7.000 ns"]


@pytest.mark.slow
@pytest.mark.parametrize("width", [80, 120])
def test_on_a_terminal_lines_fit(width: int) -> None:
    lines = on_terminal(width, "cost", TINY).plain.splitlines()
    assert any(line.startswith("tokens  experts hit") for line in lines)
    assert max(map(len, lines)) <= width
