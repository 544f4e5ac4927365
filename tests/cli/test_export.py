"""`dsmoe export`: files, what it prints, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx_ir")

import onnx

from dsmoe_compiler.models import zoo
from tests.cli.fakes import run, wrong

PLAIN = "import torch\n\n\ndef build():\n    return torch.nn.Linear(16, 4)\n"


def test_a_model_becomes_two_files(here: Path) -> None:
    result = run("export", "deepseek-moe-tiny", "--onnx", "tiny.onnx")
    assert result.exit_code == 0, result.stderr
    assert sorted(path.name for path in here.iterdir()) == ["tiny.onnx", "tiny.onnx.data"]
    layers, verified, wrote = result.stdout.splitlines()
    assert layers == "2 MoE layers: Split"
    assert verified.startswith("verified in onnxruntime: relative error ")
    nodes = len(onnx.load("tiny.onnx", load_external_data=False).graph.node)
    assert wrote.startswith("wrote tiny.onnx ") and wrote.endswith(f" {nodes} nodes, opset 20")


@pytest.mark.slow
def test_a_compiled_program_as_json(here: Path) -> None:
    assert run("compile", "deepseek-moe-tiny", "-o", "tiny.pt2").exit_code == 0
    options = ("--onnx", "tiny.onnx", "--target", "ort", "--weights", "int8", "--no-verify", "--json")
    result = run("export", "tiny.pt2", *options)
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)["onnx"]
    assert (record["target"], record["weights"], record["error"]) == ("ort", "int8", None)
    assert record["graph_bytes"] == Path("tiny.onnx").stat().st_size
    assert record["data_bytes"] == Path("tiny.onnx.data").stat().st_size
    assert {layer["name"] for layer in record["layers"]} == {"model.layers.1.mlp", "model.layers.2.mlp"}


def test_a_model_without_moe_layers(here: Path) -> None:
    (here / "plain.py").write_text(PLAIN)
    result = run("export", "plain:build", "--onnx", "plain.onnx", "--input", "input=3x16")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("no MoE layers\nverified in onnxruntime")


@pytest.mark.slow
def test_mlir_beside_onnx(here: Path) -> None:
    pytest.importorskip("torch_mlir")
    result = run("export", "deepseek-moe-tiny", "--mlir", "tiny.mlir")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("wrote tiny.mlir, ")
    layers = zoo.preset("deepseek-moe-tiny").config.num_hidden_layers - 1
    assert Path("tiny.mlir").read_text().count('torch.operator "torch.dsmoe.moe"') == layers


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("deepseek-moe-tiny",), "nothing to write"),
        (("deepseek-moe-tiny", "--onnx", "tiny.txt"), "an ONNX model's name ends in .onnx"),
        (("deepseek-moe-tiny", "--onnx", "no/such/tiny.onnx"), "choose another folder"),
        (("no-such-model", "--onnx", "m.onnx"), "no-such-model"),
        (("missing.pt2", "--onnx", "m.onnx"), "missing.pt2"),
    ],
)
def test_what_is_wrong_is_one_line(here: Path, arguments: tuple[str, ...], said: str) -> None:
    assert said in wrong("export", *arguments)
    assert not list(here.iterdir())
