"""The heat map: golden at 80 columns, binned, and what is said around it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from dsmoe_compiler.report.load import LayerLoad, Load
from dsmoe_compiler.report.load_map import RAMP, experts_a_cell, row
from dsmoe_compiler.report.load_text import render, tell
from tests.conftest import Golden


def made(layers: int, experts: int, top_k: int) -> Load:
    """The same counts in every layer, some of them 0, in another order."""
    counts = [top_k * max(0, e * e % 17 - 1) for e in range(experts)]
    turned = (
        [counts[(e * (1 - i % 2 * 2) + 5 * i) % experts] for e in range(experts)] for i in range(layers)
    )
    found = (LayerLoad(f"model.layers.{i + 1}.mlp", top_k, tuple(each)) for i, each in enumerate(turned))
    return Load("DeepSeekMoEForCausalLM", tuple(found))


@pytest.mark.parametrize(("layers", "experts", "top_k"), [(2, 16, 4), (27, 64, 6), (61, 256, 8)])
def test_the_map_at_80_columns(golden: Golden, layers: int, experts: int, top_k: int) -> None:
    text = render(made(layers, experts, top_k))
    assert max(map(len, text.splitlines())) <= 80
    golden(f"report/load_{layers}x{experts}", text + "\n")


@pytest.mark.parametrize("width", [70, 80, 120])
@pytest.mark.parametrize("experts", [1, 16, 63, 64, 160, 256])
def test_every_line_fits(experts: int, width: int) -> None:
    story = tell(made(27, experts, 1), width)
    assert story.grid
    lines = [*story.headline, *story.grid.lines(), *story.legend]
    assert max(map(len, lines)) <= width


def cells(counts: Sequence[int], together: int = 1) -> str:
    return row(LayerLoad("", 1, tuple(counts)), together)


def test_a_cell_is_as_high_as_its_load() -> None:
    assert cells([5, 5, 5, 5]) == "▄▄▄▄"
    assert cells([10, 5, 5, 0]) == "█▄▄·"
    assert cells([96, 1, 1, 1, 1]) == "█▁▁▁▁", "however little, it is more than none"
    assert cells([0, 0]) == "··"
    assert cells([1, 2, 3, 4, 5, 6, 7, 8, 0]) == "▁▂▃▄▅▆▇█·"
    assert RAMP[0] == "·"


def test_a_cell_of_several_is_their_mean() -> None:
    assert cells([10, 0, 5, 5, 0, 0, 20], 2) == "▄▄·█"


@pytest.mark.parametrize(
    ("experts", "width", "together"), [(64, 64, 1), (64, 63, 2), (256, 46, 8), (63, 46, 2), (8, 100, 1)]
)
def test_as_few_experts_a_cell_as_fit(experts: int, width: int, together: int) -> None:
    assert experts_a_cell((LayerLoad("", 1, (1,) * experts),), width) == together


def test_what_differs_from_layer_to_layer_has_a_column() -> None:
    layers = (LayerLoad("a.mlp", 2, (1, 1, 2)), LayerLoad("b.mlp", 1, (1, 0), dropped=3))
    text = render(Load("Mixed", layers, ("c.mlp",)))
    assert text.splitlines() == [
        "Mixed: 2 of 3 MoE layers counted",
        "a.mlp, b.mlp",
        "",
        "layer  2 to 3 experts  MaxVio    entropy  unused  dropped  tokens  K",
        "a      ▃▃▆               0.50  1.50/1.58       0     0.0%       2  2",
        "b      █·                1.00  0.00/1.00       1    75.0%       4  1",
        "",
        "an expert's load: ▄ an even share, █ twice that or more, · none",
        "MaxVio: (max − mean) / mean load; entropy: of the load in bits / of an even one",
        "never used: b: 1",
        "not counted, as written: c.mlp",
    ]


def test_one_layer_that_is_the_model() -> None:
    lines = render(Load("Experts", (LayerLoad("", 2, (0, 0)),))).splitlines()
    assert lines[0] == "Experts: 0 tokens, top-2, 1 of 1 MoE layer counted"
    assert lines[3] == "(model)  ··              -        -       2"


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (("m.1.mlp", "m.2.mlp"), ("1", "2")),
        (("mlp", "mlp.mlp"), ("mlp", "mlp.mlp")),
        (("m.1.mlp", "m.1.mlp (2)"), ("mlp", "mlp (2)")),
        (("a.1", "b.2"), ("a.1", "b.2")),
        (("", "x"), ("(model)", "x")),
        (("x.1.x", "x.x"), ("1.x", "x")),
    ],
)
def test_a_label_is_what_tells_names_apart(names: tuple[str, ...], labels: tuple[str, ...]) -> None:
    grid = tell(Load("M", tuple(LayerLoad(name, 1, (1,)) for name in names)), 80).grid
    assert grid and tuple(r.cells[0] for r in grid.rows) == labels


def test_no_layer_was_counted() -> None:
    assert render(Load("M", (), ("mlp",))) == "M: no layer was counted\n\nnot counted, as written: mlp"


def test_many_experts_that_are_never_used_are_counted() -> None:
    layers = tuple(LayerLoad(f"m.{i}.mlp", 1, (1, 0) * 64) for i in range(9))
    assert "never used: 576 experts in 9 layers" in render(Load("M", layers))
    (line,) = (x for x in render(Load("M", layers[:1])).splitlines() if x.startswith("never used"))
    assert line == "never used: 64 experts in 1 layer"


def test_few_experts_that_are_never_used_are_numbered() -> None:
    counts = tuple(int(e not in (1, 3, 4)) for e in range(512))
    assert "never used: (model): 1, 3-4" in render(Load("M", (LayerLoad("", 1, counts),)))


def test_one_expert_is_no_experts() -> None:
    assert "\nlayer    1 expert  MaxVio" in render(Load("M", (LayerLoad("", 1, (3,)),)))
