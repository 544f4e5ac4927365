"""`dsmoe inspect --layer --graph`: one layer as text or drawn, and one line for what cannot be."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from dsmoe_compiler.cli.one_layer import chosen_layer
from dsmoe_compiler.ir.errors import InputError
from dsmoe_compiler.report.report import Report
from tests.cli.fakes import FUSED_LAYER, REFUSED_LAYER, FakeApi, report, run, wrong

TINY = "deepseek-moe-tiny"


@pytest.mark.parametrize(
    ("wanted", "name"),
    [
        (None, "layers.0.mlp"),
        ("0", "layers.1.mlp"),
        ("1", "layers.0.mlp"),
        ("layers.1.mlp", "layers.1.mlp"),
    ],
)
def test_which_layer_is_meant(wanted: str | None, name: str) -> None:
    assert chosen_layer(report(REFUSED_LAYER, FUSED_LAYER), wanted) == name


def test_the_first_layer_where_none_is_fused() -> None:
    assert chosen_layer(report(REFUSED_LAYER), None) == "layers.1.mlp"


@pytest.mark.parametrize(
    ("found", "wanted", "says"),
    [
        (report(), None, "Fake has no Mixture-of-Experts layers: there is none to show"),
        (report(FUSED_LAYER), "1", "there is no layer 1: the one layer is layer 0"),
        (report(FUSED_LAYER, REFUSED_LAYER), "7", "there is no layer 7: the 2 layers are counted from 0"),
        (
            report(FUSED_LAYER),
            "layer.0.mpl",
            "unknown layer 'layer.0.mpl'; the nearest names are: layers.0.mlp",
        ),
    ],
)
def test_no_such_layer(found: Report, wanted: str | None, says: str) -> None:
    with pytest.raises(InputError) as raised:
        chosen_layer(found, wanted)
    assert str(raised.value) == says


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--graph", "layer.pdf"], "cannot draw layer.pdf: a drawing's name ends in .svg, .dot or .html"),
        (["--graph", "no/layer.svg"], "cannot write no/layer.svg: No such file or directory"),
        (["--graph", "folder.svg"], "cannot write folder.svg: Is a directory"),
        (
            ["--layer", "0", "--json"],
            "--layer prints text: leave out --json, or draw the layer with --graph.",
        ),
    ],
)
def test_what_cannot_be_asked_is_said_before_the_work(
    options: list[str], says: str, api: FakeApi, here: Path
) -> None:
    (here / "folder.svg").mkdir()
    assert says in wrong("inspect", TINY, *options)
    assert not api.calls


def test_a_compiled_program_has_no_before(here: Path) -> None:
    assert "what its layers were is not in it" in wrong("inspect", "tiny.pt2", "--graph", "x.svg")


def test_a_model_without_layers_leaves_no_file(api: FakeApi, here: Path) -> None:
    api.report = report()
    assert "no Mixture-of-Experts layers" in wrong("inspect", TINY, "--graph", "x.svg")
    assert not list(here.iterdir())


def test_draws_a_layer_of_a_model_without_weights(here: Path) -> None:
    result = run("inspect", TINY, "--graph", "layer.SVG")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.endswith("drew model.layers.1.mlp into layer.SVG\n")
    assert "2 of 2 MoE layers fused" in result.stdout
    assert ElementTree.parse(here / "layer.SVG").getroot().tag.endswith("svg")


def test_json_stays_json(here: Path) -> None:
    result = run("inspect", TINY, "--graph", "layer.html", "--layer", "model.layers.2.mlp", "--json")
    assert len(json.loads(result.stdout)["layers"]) == 2
    assert "drew model.layers.2.mlp into layer.html" in result.stderr


def test_prints_a_layer(here: Path) -> None:
    result = run("inspect", TINY, "--layer", "1")
    before, after = result.stdout.split("# after: 3 operators on data\n")
    assert before.startswith("# before: 32 operators on data\n# layer model.layers.2.mlp, T = s0*s1 tokens\n")
    assert " bmm(" in before and " dsmoe.moe(" in after and " bmm(" not in after
