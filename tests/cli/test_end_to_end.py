"""The commands with the compiler behind them."""

import json
from pathlib import Path

import pytest
import torch

from dsmoe_compiler.models import zoo
from dsmoe_compiler.program import load
from dsmoe_compiler.report.report import Report
from tests.cli.fakes import run, wrong

BRANCHES = "def model(x):\n    if x.sum() > 0:\n        return x\n    return 2 * x\n"
PLAIN = "import torch\n\n\ndef build():\n    return torch.nn.Linear(16, 4)\n"


def test_compile_then_inspect_the_file_then_use_it(here: Path) -> None:
    compiled = run("compile", "deepseek-moe-tiny", "-o", "tiny.pt2", "--require-fused")
    assert compiled.exit_code == 0, compiled.stderr
    assert [path.name for path in here.iterdir()] == ["tiny.pt2"]
    inspected = run("inspect", "tiny.pt2")
    assert inspected.exit_code == 0, inspected.stderr
    assert compiled.stdout.startswith(inspected.stdout.rstrip())
    assert "2 of 2 MoE layers fused" in inspected.stdout
    inputs = zoo.example_inputs("deepseek-moe-tiny")
    with torch.no_grad():
        wanted = zoo.build("deepseek-moe-tiny")(**inputs)
        torch.testing.assert_close(load("tiny.pt2")(**inputs), wanted, rtol=1e-4, atol=1e-4)


def test_inspect_understands_a_model_without_weights() -> None:
    report = Report.from_json(run("inspect", "deepseek-moe-tiny", "--json").stdout)
    assert [layer.name for layer in report.layers] == ["model.layers.1.mlp", "model.layers.2.mlp"]
    assert all(layer.fused for layer in report.layers)
    assert report.backend is None


def test_a_users_model_without_moe_layers_is_done(here: Path) -> None:
    (here / "plain.py").write_text(PLAIN)
    result = run("compile", "plain:build", "-o", "plain.pt2", "--input", "input=3x16")
    assert result.exit_code == 0, result.stderr
    assert "no Mixture-of-Experts layers; the model runs unchanged" in result.stdout
    x = torch.randn(5, 16)
    assert load("plain.pt2")(x).shape == (5, 4)


def test_what_cannot_be_captured_names_the_users_line(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (here / "branching.py").write_text(BRANCHES)
    line = wrong("compile", "branching:model", "-o", "m.pt2", "--input", "x=3x5")
    assert "branching.py:2" in line
    assert capfd.readouterr().err == "", "torch prints the half-made graph"
    assert not (here / "m.pt2").exists()


def test_inputs_of_the_wrong_size_are_one_line(here: Path) -> None:
    (here / "plain.py").write_text(PLAIN)
    assert wrong("compile", "plain:build", "-o", "m.pt2", "--input", "input=3x15")
    assert not (here / "m.pt2").exists()


def test_a_damaged_file_is_one_line(here: Path) -> None:
    assert run("compile", "deepseek-moe-tiny", "-o", "tiny.pt2", "--verify", "off").exit_code == 0
    whole = (here / "tiny.pt2").read_bytes()
    for name, damaged in {
        "cut.pt2": whole[: len(whole) // 2],
        "flipped.pt2": whole[:200_000] + bytes(b ^ 255 for b in whole[200_000:201_000]) + whole[201_000:],
        "empty.pt2": b"",
    }.items():
        (here / name).write_bytes(damaged)
        assert name in wrong("inspect", name)


def test_another_programs_file_is_one_line(here: Path) -> None:
    exported = torch.export.export(torch.nn.Linear(4, 4), (torch.randn(2, 4),))
    torch.export.save(exported, here / "other.pt2")
    assert "not a program saved by this package" in wrong("inspect", "other.pt2")


def test_nan_in_the_weights_is_a_refusal(here: Path) -> None:
    (here / "sick.py").write_text(
        "from dsmoe_compiler.models import zoo\n\n\n"
        "def build():\n"
        "    model = zoo.build('deepseek-moe-tiny')\n"
        "    model.model.layers[1].mlp.experts.down_proj.data[3, 0, 0] = float('nan')\n"
        "    return model, (), zoo.example_inputs('deepseek-moe-tiny')\n"
    )
    result = run("compile", "sick:build", "-o", "sick.pt2", "--json")
    assert result.exit_code == 0, result.stderr
    first, second = Report.from_json(json.dumps(json.loads(result.stdout)["report"])).layers
    assert first.refusal is not None
    assert (first.refusal.code, second.fused) == ("R305", True)
