"""`dsmoe inspect --load`: the map on a terminal and elsewhere, its JSON, what does not belong together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dsmoe_compiler.report.load import LayerLoad, Load
from tests.cli.fakes import FUSED_LAYER, REFUSED_LAYER, FakeApi, report, run, wrong
from tests.cli.on_terminal import ROOT, on_terminal

COUNTS = tuple(range(15)) + (15 + 8,)
LOAD = Load("Fake", (LayerLoad("layers.0.mlp", 4, COUNTS),), ("layers.1.mlp",))


@pytest.fixture
def file(here: Path) -> str:
    LOAD.save("load.json")
    return "load.json"


def test_a_load_needs_no_model_and_no_torch(file: str) -> None:
    command = "import sys; from dsmoe_compiler.cli import main; main(standalone_mode=False)"
    command += "; assert 'torch' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-c", command, "inspect", "--load", file]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{LOAD}\n"


def test_json_has_the_counts_and_the_figures(file: str) -> None:
    (layer,) = json.loads(run("inspect", "--load", file, "--json").stdout)["load"]["layers"]
    assert layer["counts"] == list(COUNTS)
    assert (layer["experts"], layer["top_k"], layer["tokens"], layer["unused"]) == (16, 4, 32, [0])
    assert layer["max_violation"] == pytest.approx(23 / 8 - 1)
    assert layer["even_entropy_bits"] == 4 > layer["entropy_bits"]


def test_several_files_add_up(file: str) -> None:
    (layer,) = json.loads(run("inspect", "--load", file, "--load", file, "--json").stdout)["load"]["layers"]
    assert layer["counts"] == [2 * count for count in COUNTS]


def test_files_of_different_models_do_not(file: str) -> None:
    Load("Other", LOAD.layers).save("other.json")
    line = wrong("inspect", "--load", file, "--load", "other.json")
    assert "load.json, other.json: these loads are of different models" in line


def test_with_its_model_both_are_shown(api: FakeApi, file: str) -> None:
    api.report = report(FUSED_LAYER, REFUSED_LAYER)
    result = run("inspect", "deepseek-moe-tiny", "--load", file)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{api.report}\n\n{LOAD}\n"
    both = json.loads(run("inspect", "deepseek-moe-tiny", "--load", file, "--json").stdout)
    assert both["report"] == json.loads(api.report.to_json())
    assert both["load"]["not_counted"] == ["layers.1.mlp"]


@pytest.mark.parametrize(
    ("load", "why"),
    [
        (replace(LOAD, layers=(LayerLoad("mlp", 4, COUNTS),)), "that has no MoE layer mlp"),
        (replace(LOAD, layers=(LayerLoad("", 4, COUNTS),)), "that has no MoE layer (model)"),
        (
            replace(LOAD, layers=(LayerLoad("layers.0.mlp", 4, (4,) * 8),)),
            "has 16 experts there, 8 in the load",
        ),
        (replace(LOAD, layers=(LayerLoad("layers.0.mlp", 2, COUNTS),)), "is top-4 there, top-2 in the load"),
        (replace(LOAD, not_counted=()), "it has no layer layers.1.mlp"),
    ],
)
def test_a_load_of_another_model_is_one_line(api: FakeApi, here: Path, load: Load, why: str) -> None:
    api.report = report(FUSED_LAYER, REFUSED_LAYER)
    load.save("load.json")
    line = wrong("inspect", "deepseek-moe-tiny", "--load", "load.json")
    assert "the load is not of deepseek-moe-tiny" in line and line.rstrip().endswith(why)


def test_a_layer_that_is_understood_elsewhere_only(api: FakeApi, file: str) -> None:
    """Here it is refused: nothing is known of it that could differ."""
    refused = replace(REFUSED_LAYER, name="layers.0.mlp")
    api.report = report(refused, REFUSED_LAYER)
    assert run("inspect", "deepseek-moe-tiny", "--load", file).exit_code == 0


def test_what_is_no_load_is_one_line(here: Path) -> None:
    (here / "notes.json").write_text("{}")
    assert "no load of experts" in wrong("inspect", "--load", "notes.json")
    assert "No such file" in wrong("inspect", "--load", "nothing.json")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("m", "--layer", "0"), "leave out --graph and --layer"),
        (("m", "--graph", "layer.svg"), "leave out --graph and --layer"),
        (("--input", "x=2x3"), "--input is for MODEL"),
    ],
)
def test_options_without_a_meaning_beside_it(file: str, arguments: tuple[str, ...], why: str) -> None:
    assert why in wrong("inspect", *arguments, "--load", file)


def test_neither_model_nor_load() -> None:
    assert "Missing argument 'MODEL'" in wrong("inspect")


@pytest.mark.parametrize("width", [80, 120])
def test_colours_on_a_terminal_and_the_same_text(
    tmp_path: Path, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "load.json"
    Load("Fake", tuple(LayerLoad(f"m.{i}.mlp", 4, COUNTS * 8) for i in range(27))).save(path)
    shown = on_terminal(width, "inspect", "--load", str(path))
    lines = shown.plain.splitlines()
    assert max(map(len, lines)) <= width and "128 experts" in lines[3]
    assert "\x1b[38;5;196m█\x1b[0m" in shown.coloured
    assert [line for line in lines if line.startswith(("26 ", "a cell's"))]
    monkeypatch.setenv("NO_COLOR", "1")
    without = on_terminal(width, "inspect", "--load", str(path))
    assert "38;5" not in without.coloured and without.plain == shown.plain


def test_where_the_characters_cannot_be_shown(file: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    arguments = [sys.executable, "-m", "dsmoe_compiler", "inspect", "--load", file]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, check=False)
    assert "layers.0.mlp  .::---=+++*###%@ " in done.stdout and "?" not in done.stdout
    assert "an expert's load: + an even share, @ twice that or more, . none" in done.stdout
