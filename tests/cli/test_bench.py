"""`dsmoe bench`: what is measured, compared, left out and shown; never how fast it is."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dsmoe_compiler.cli import bench_run
from dsmoe_compiler.cli.bench_table import Benchmark, Measurement, benchmark_grid
from dsmoe_compiler.cli.bench_torch_compile import Compiled
from dsmoe_compiler.cli.model_argument import weight_bytes
from dsmoe_compiler.ir.errors import ShapeError
from dsmoe_compiler.report.report import Report
from tests.cli.fakes import FUSED_LAYER, REFUSED_LAYER, FakeApi, report, run, wrong

MINE = """
import torch

def half_length(ids):
    if ids.shape[1] > 99:
        raise IndexError('no position 99')
    return torch.nn.functional.one_hot(ids, 10).float()

def square(x):
    return x * x

IDS = torch.arange(10).reshape(2, 5)

def short():
    return half_length, (IDS,), {}
"""
QUICK = ("--rounds", "2", "--no-torch-compile")


@pytest.fixture
def mine(here: Path) -> Path:
    (here / "mine.py").write_text(MINE)
    return here


@pytest.fixture
def torch_compile(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """torch.compile, which hands the model back and keeps what it was asked."""
    asked: list[tuple[Any, ...]] = []

    def compiled(model: Any, calls: Any, limit: float) -> Compiled:
        asked.append((model, calls, limit))
        return Compiled(model, 1.5)

    monkeypatch.setattr(bench_run, "torch_compiled", compiled)
    return asked


def rows(printed: str) -> list[list[str]]:
    """The cells of the table's lines."""
    return [line.split() for line in printed.splitlines() if "×" in line]


def test_a_table_of_every_length(api: FakeApi, torch_compile: list[tuple[Any, ...]]) -> None:
    result = run("bench", "deepseek-moe-tiny", "--rounds", "2", "-T", "1,7")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("Fake: 1 of 1 MoE layers fused")
    assert lines[1].startswith("4.9 MB of weights, float32; ")
    titles = "T  eager ms  compile ms  dsmoe ms  vs eager  vs compile  tokens/s  error"
    assert lines[3].split("  ") == titles.split("  ")
    assert [(row[0], row[-1]) for row in rows(result.stdout)] == [("1", "0e+00"), ("7", "0e+00")]
    assert "compiled for each T by itself; 3 s in all" in " ".join(result.stdout.split())
    assert max(map(len, lines)) <= 80


def test_the_model_has_weights_and_no_cache_and_torch_compiles_it(
    api: FakeApi, torch_compile: list[tuple[Any, ...]]
) -> None:
    run("bench", "deepseek-moe-tiny", "--rounds", "1", "-T", "3,4", "--batch", "2", "--compile-limit", "7")
    ((model, _, kwargs),) = api.calls
    assert {p.device.type for p in model.parameters()} == {"cpu"}  # type: ignore[attr-defined]
    assert kwargs["input_ids"].shape == (5, 11), "compiled on its own example"
    assert [(asked, limit) for asked, _, limit in torch_compile] == [(model, 7.0)] * 2
    assert [calls[0][1]["input_ids"].shape for _, calls, _ in torch_compile] == [(2, 3), (2, 4)]


def test_the_same_as_json(api: FakeApi, torch_compile: list[tuple[Any, ...]]) -> None:
    result = run("bench", "deepseek-moe-tiny", "--rounds", "3", "-T", "5", "--batch", "2", "--json")
    record = json.loads(result.stdout)
    (found,) = record["measurements"]
    assert (found["tokens"], found["shape"], found["rounds"], found["discarded"]) == (5, [2, 5], 2, 1)
    assert list(found["milliseconds"]) == ["eager", "torch.compile", "dsmoe"]
    assert found["errors"] == {"torch.compile": 0.0, "dsmoe": 0.0}
    assert set(found["times_faster"]) == {"eager", "torch.compile"}
    assert found["tokens_per_second"] == pytest.approx(10 / (found["milliseconds"]["dsmoe"] / 1e3))
    assert Report.from_json(json.dumps(record["report"])) == api.report
    assert (record["model"], record["dtype"], record["torch_compile_seconds"]) == (
        "deepseek-moe-tiny",
        "float32",
        1.5,
    )


def test_without_torch_compile_there_is_none(api: FakeApi, torch_compile: list[tuple[Any, ...]]) -> None:
    result = run("bench", "deepseek-moe-tiny", *QUICK, "-T", "2")
    assert torch_compile == []
    assert "compile" not in result.stdout.replace("dsmoe.compile", "")
    assert len(rows(result.stdout)) == 1


def test_torch_compile_that_fails_is_left_out_and_not_tried_again(
    api: FakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def failing(*asked: Any) -> Compiled:
        tried.append(asked)
        return Compiled(None, 0.1, "no C++ compiler")

    monkeypatch.setattr(bench_run, "torch_compiled", failing)
    result = run("bench", "deepseek-moe-tiny", "--rounds", "1", "-T", "2,3")
    assert result.exit_code == 0
    assert "note: torch.compile is left out from T=2 on: no C++ compiler\n" in result.stderr
    assert "compile ms" not in result.stdout
    assert (len(tried), len(rows(result.stdout))) == (1, 2)


def test_a_refused_layer_is_no_obstacle(api: FakeApi) -> None:
    api.report = report(FUSED_LAYER, REFUSED_LAYER)
    result = run("bench", "deepseek-moe-tiny", *QUICK, "-T", "2")
    assert result.exit_code == 0
    assert "1 of 2 MoE layers fused" in result.stdout
    assert "`dsmoe explain deepseek-moe-tiny` says why layers are not fused." in result.stdout


def spoiled(api: FakeApi, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Any], Any]) -> None:
    """The API compiles to a program that answers otherwise."""
    compiled = api.compile
    monkeypatch.setattr(
        sys.modules["dsmoe_compiler.api"],
        "compile",
        lambda model, *args, **options: replace(
            compiled(model, *args, **options), model=lambda **inputs: spoil(model(**inputs))
        ),
    )


def test_a_wrong_answer_is_named_not_measured_and_ends_with_1(
    api: FakeApi, torch_compile: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled(api, monkeypatch, lambda logits: 1.01 * logits)
    result = run("bench", "deepseek-moe-tiny", "--rounds", "1", "-T", "4")
    assert result.exit_code == 1
    assert "dsmoe: dsmoe is wrong at T=4: the median row is off by 1.0e-02, 100% of the rows" in result.stderr
    (cells,) = [line.split() for line in result.stdout.splitlines() if "wrong" in line]
    assert (cells[0], cells[3:]) == ("4", ["wrong", "–", "–", "–", "1e-02"])


def test_a_wrong_answer_is_data_too(api: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    spoiled(api, monkeypatch, lambda logits: logits / 0)
    result = run("bench", "deepseek-moe-tiny", *QUICK, "-T", "4", "--json")
    assert result.exit_code == 1
    (found,) = json.loads(result.stdout)["measurements"]
    assert found["wrong"] == {"dsmoe": "NaN or infinity in other places"}
    assert found["errors"] == {"dsmoe": None}
    assert (list(found["milliseconds"]), found["times_faster"], found["tokens_per_second"]) == (
        ["eager"],
        {},
        None,
    )


def test_a_length_that_the_model_does_not_take_is_left_out(mine: Path, api: FakeApi) -> None:
    result = run("bench", "mine:short", *QUICK)
    assert result.exit_code == 0, result.output
    assert [row[0] for row in rows(result.stdout)] == ["1", "16"]
    assert (
        "note: T=128 is left out: mine:short itself fails on inputs of [1, 128]: no position 99"
        in result.stderr
    )


def test_a_length_that_was_asked_for_is_not_left_out(mine: Path, api: FakeApi) -> None:
    line = wrong("bench", "mine:short", *QUICK, "-T", "100")
    assert line == "mine:short itself fails on inputs of [1, 100]: no position 99"


def test_a_length_that_the_program_does_not_take(api: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    def only_short(logits: torch.Tensor) -> torch.Tensor:
        if logits.shape[1] > 16:
            raise ShapeError("input_ids[1] is at most 16")
        return logits

    spoiled(api, monkeypatch, only_short)
    result = run("bench", "deepseek-moe-tiny", *QUICK)
    assert [row[0] for row in rows(result.stdout)] == ["1", "16"]
    assert (
        "note: T=1024 is left out: deepseek-moe-tiny, compiled, takes no inputs of [1, 1024]" in result.stderr
    )


def test_a_model_that_takes_no_ids_is_measured_on_its_example(mine: Path, api: FakeApi) -> None:
    result = run("bench", "mine:square", *QUICK, "--input", "x=3x16")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[3].split()[0] == "inputs"
    ((label, *_, rate, error),) = rows(result.stdout)
    assert (label, rate, error) == ("3x16", "–", "0e+00")
    assert re.fullmatch(r"\d+ threads?", result.stdout.splitlines()[1]), "it has no weights"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["m.pt2"], "m.pt2 holds no eager model to compare with"),
        (["no-such"], "unknown model 'no-such'"),
        (["deepseek-moe-tiny", "-T", "1,x"], "'1,x' is not of the form 1,128,1024"),
        (["deepseek-moe-tiny", "-T", "0"], "'0' is not of the form 1,128,1024"),
        (["deepseek-moe-tiny", "-T", ""], "'' is not of the form 1,128,1024"),
        (["deepseek-moe-tiny", "--experts", "eager"], "deepseek-moe-tiny is none: leave it out"),
        (["mine:square", "--input", "x=3x5", "-T", "4"], "mine:square takes other inputs"),
        (["mine:square", "--input", "x=3x5", "--dtype", "bfloat16"], "mine:square is a function"),
        (["deepseek-moe-tiny", "--threads", "0"], "0 is not in the range x>=1"),
    ],
)
def test_wrong_input_is_one_line(mine: Path, api: FakeApi, arguments: list[str], says: str) -> None:
    assert says in wrong("bench", *arguments)
    assert api.calls == []


def test_weights_fit_in_the_type_that_they_are_built_in(
    api: FakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsmoe_compiler.cli.memory.available_memory", lambda: 10**9)
    assert "deepseek-moe-16b needs 66 GB, 1 GB available" in wrong("bench", "deepseek-moe-16b")
    line = wrong("bench", "deepseek-moe-16b", "--dtype", "bfloat16")
    assert "deepseek-moe-16b needs 33 GB, 1 GB available" in line


def test_weights_that_grow_by_a_cast_fit_before_it(
    here: Path, api: FakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "mine.py").write_text(
        "import torch\n\n\ndef build():\n    return torch.nn.Linear(100, 10, dtype=torch.bfloat16)\n"
    )
    monkeypatch.setattr("dsmoe_compiler.cli.memory.available_memory", lambda: 2000)
    asked = ("bench", "mine:build", *QUICK, "--input", "input=3x100:bfloat16", "--dtype")
    assert "mine:build needs 2 kB, 2 kB available" in wrong(*asked, "float32")
    assert run(*asked, "float16").exit_code == 0


def test_a_model_is_cast_whole(api: FakeApi) -> None:
    result = run("bench", "deepseek-moe-tiny", *QUICK, "-T", "2", "--dtype", "bfloat16")
    assert "2.5 MB of weights, bfloat16" in result.stdout
    ((model, _, _),) = api.calls
    assert isinstance(model, nn.Module)
    assert {t.dtype for t in model.state_dict().values() if t.is_floating_point()} == {torch.bfloat16}


def test_threads_are_as_asked_while_it_runs(api: FakeApi) -> None:
    before, seen = torch.get_num_threads(), []
    api.meanwhile = lambda: seen.append(torch.get_num_threads())
    result = run("bench", "deepseek-moe-tiny", *QUICK, "-T", "2", "--threads", str(before + 1))
    assert (seen, torch.get_num_threads()) == ([before + 1], before)
    assert f"{before + 1} threads" in result.stdout


def test_the_widest_figures_fit_a_terminal() -> None:
    one = Measurement(
        "16384",
        (4, 16384),
        16384,
        {"eager": 123456.0, "torch.compile": 123456.0, "dsmoe": 98765.4},
        {"eager": 12.5, "torch.compile": 12.5},
        {"torch.compile": 1e-3, "dsmoe": 1e-3},
        {},
        9,
        9,
    )
    quick = replace(one, milliseconds=dict.fromkeys(one.milliseconds, 0.5))
    found = Benchmark("m", "float32", 1, 1, None, report(), 1.0, 1.0, (one, quick))
    lines = [*benchmark_grid(found).lines()]
    assert max(map(len, lines)) <= 80
    assert lines[1].split() == "16384 123456 123456 98765 12.50 × 12.50 × 664 1e-03".split()  # noqa: SIM905
    assert lines[2].split()[-2] == "131,072,000"


def test_the_zoo_end_to_end() -> None:
    result = run("bench", "deepseek-moe-tiny", *QUICK, "-T", "1,6")
    assert result.exit_code == 0, result.output
    assert "2 of 2 MoE layers fused" in result.stdout
    assert [row[0] for row in rows(result.stdout)] == ["1", "6"]
    assert all(float(row[-1]) < 1e-5 for row in rows(result.stdout))


def test_the_qwen_example_end_to_end() -> None:
    pytest.importorskip("transformers")
    result = run("bench", "examples.qwen3_moe:tiny", *QUICK, "--experts", "eager")
    assert result.exit_code == 0, result.output
    assert "2 of 2 MoE layers fused" in result.stdout
    assert "its experts run by transformers' eager" in " ".join(result.stdout.split())
    assert [row[0] for row in rows(result.stdout)] == ["1", "16"], "it takes 64 tokens"


def test_the_qwen_example_is_a_gigabyte_of_bfloat16() -> None:
    pytest.importorskip("transformers")
    with torch.device("meta"):
        model, _, _ = import_module("examples.qwen3_moe").build()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert weight_bytes(model) == pytest.approx(1e9, rel=0.05)


@pytest.mark.slow
def test_torch_compile_of_the_zoo() -> None:
    result = run("bench", "deepseek-moe-tiny", "--rounds", "2", "-T", "3")
    assert result.exit_code == 0, result.output
    assert "compile ms" in result.stdout
    assert len(rows(result.stdout)) == 1
