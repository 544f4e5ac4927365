"""`dsmoe explain`: refused layers by default, any one by name or number, as text, in colour, as data."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import pytest
from click.testing import Result

from tests.cli.fakes import FUSED_LAYER, REFUSED_LAYER, FakeApi, report, run, wrong
from tests.cli.on_terminal import on_terminal

MODEL = "tests.cli.small_model:build"
ROOT = Path(__file__).parents[2]


@functools.cache
def explain(*arguments: str) -> Result:
    result = run("explain", MODEL, *arguments)
    assert result.exit_code == 0, result.stderr
    return result


def test_refused_layers_with_the_users_line() -> None:
    printed = explain().stdout
    assert printed.startswith("2: not fused\nR301: the experts' computation leaves the known term language\n")
    assert re.search(
        r"small_model\.py:\d+, in _across_rows\n      return F\.silu\(rows\)\.cumsum\(0\)\n", printed
    )
    assert re.search(
        r"called at small_model\.py:\d+, in forward\n      h = self\.kind\.activation\(", printed
    )
    assert "rows of the pairs in their own order: silu(x·up_e), width 12" in printed
    assert "nearest known spelling\n  gathered weights, batched GEMM\n" in printed
    assert "\x1b[" not in printed


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        ("0", "0: fused\nE=8 softmax→top-2 | "),
        ("1", "  router    as written: R201: the scores come from aten.tanh.default"),
        ("2", "2: not fused\n"),
    ],
)
def test_one_layer(layer: str, says: str) -> None:
    printed = explain("--layer", layer).stdout
    assert says in printed
    assert len(re.findall(r"^\d: (?:not )?fused$", printed, re.MULTILINE)) == 1


def test_json_is_the_same_as_data() -> None:
    record = json.loads(explain("--json").stdout)
    assert (record["model"], record["fused"], record["of"]) == ("Sequential", 2, 3)
    (told,) = record["explained"]
    assert told["layers"] == ["2"] and not told["fused"]
    refusal, explanation = told["refusal"], told["explanation"]
    assert (refusal["code"], refusal["text"]) == ("R301", "return F.silu(rows).cumsum(0)")
    assert refusal["meaning"] == "the experts' computation leaves the known term language"
    assert explanation["moments"][-1]["what"] == "lost"
    assert [line["function"] for line in explanation["moments"][-1]["lines"]] == ["forward", "_across_rows"]
    assert explanation["nearest"][0]["name"] == "gathered weights, batched GEMM" and explanation["remedy"]


def test_a_model_that_fuses_whole() -> None:
    result = run("explain", "deepseek-moe-tiny")
    assert (result.exit_code, result.stdout) == (0, "nothing to explain: all 2 layers fused\n")
    assert json.loads(run("explain", "deepseek-moe-tiny", "--json").stdout)["explained"] == []


def test_a_model_without_layers(api: FakeApi) -> None:
    api.report = report()
    result = run("explain", "deepseek-moe-tiny")
    assert (result.exit_code, result.stdout.splitlines()) == (
        0,
        ["Fake: no Mixture-of-Experts layers; the model runs unchanged"],
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("deepseek-moe-tny",), "unknown model 'deepseek-moe-tny'; the nearest names are: deepseek-moe-tiny"),
        (
            ("deepseek-moe-tiny", "--layer", "layer.1.mpl"),
            "unknown layer 'layer.1.mpl'; the nearest names are: layers.1.mlp",
        ),
        (("deepseek-moe-tiny", "--layer", "5"), "there is no layer 5: the 2 layers are counted from 0"),
        (("m.pt2", "--input", "x=3"), "--input has no meaning for a .pt2 file"),
        (("m.pt2",), "m.pt2"),
        ((), "Missing argument 'MODEL'."),
    ],
)
def test_wrong_input_is_one_line(arguments: tuple[str, ...], says: str, api: FakeApi, here: Path) -> None:
    api.report = report(REFUSED_LAYER, FUSED_LAYER)
    assert says in wrong("explain", *arguments)


def test_a_saved_program(here: Path) -> None:
    assert run("compile", MODEL, "-o", "m.pt2").exit_code == 0
    assert run("explain", "m.pt2").stdout == explain().stdout


def test_the_readme_shows_what_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    printed = run("explain", "examples.refused_layer:build").stdout
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"$ dsmoe explain examples.refused_layer:build\n{printed}```" in readme


@pytest.mark.parametrize("width", [80, 200])
def test_on_a_terminal_it_is_coloured_and_keeps_to_its_width(width: int) -> None:
    """Lines of code are whole; no other line is wider than the terminal, or than is good to read."""
    shown = on_terminal(width, "explain", MODEL)
    assert "\x1b[1;36m2: not fused" in shown.coloured
    plain = shown.plain.splitlines()
    sentences = [line for line in plain if not re.search(r"[()=]", line)]
    assert max(map(len, sentences)) <= min(width, 120)
