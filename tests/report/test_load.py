"""Figures of a load by hand, sums of loads, and files of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from dsmoe_compiler.ir.errors import InputError
from dsmoe_compiler.report.load import LayerLoad, Load

LOAD = Load(
    "Model",
    (LayerLoad("layers.0", 2, (4, 0, 2, 2)), LayerLoad("layers.1", 2, (1, 2, 2, 1), dropped=2)),
    ("layers.2",),
)


def test_the_figures_are_those_made_by_hand() -> None:
    """Counts 4 0 2 2: mean 2, the largest twice that; shares ½ ¼ ¼ have ½·1 + 2·¼·2 bits."""
    layer = LOAD.layers[0]
    assert layer.shares == (2.0, 0.0, 1.0, 1.0)
    assert (layer.max_violation, layer.entropy, layer.even_entropy) == (1.0, 1.5, 2.0)
    assert (layer.unused, layer.tokens, layer.pairs) == ((1,), 4, 8)


def test_dropped_pairs_are_tokens_but_no_load() -> None:
    layer = LOAD.layers[1]
    assert (layer.tokens, layer.pairs, layer.dropped) == (4, 8, 2)
    assert layer.max_violation == pytest.approx(2 / 1.5 - 1)


@pytest.mark.parametrize("experts", [1, 3, 64])
def test_an_even_load(experts: int) -> None:
    layer = LayerLoad("", 1, (7,) * experts)
    assert layer.max_violation == 0
    assert layer.entropy == pytest.approx(math.log2(experts)) and math.copysign(1, layer.entropy or 0) == 1
    assert layer.unused == ()


def test_one_expert_takes_all() -> None:
    layer = LayerLoad("", 1, (0, 0, 9, 0))
    assert (layer.max_violation, layer.entropy, layer.unused) == (3, 0, (0, 1, 3))


def test_no_tokens() -> None:
    layer = LayerLoad("", 1, (0, 0))
    assert (layer.max_violation, layer.entropy, layer.shares, layer.unused) == (None, None, None, (0, 1))


@pytest.mark.parametrize(
    ("top_k", "counts", "dropped"), [(1, (), 0), (0, (1,), 0), (1, (1, -1), 0), (1, (1,), -1), (2, (1, 2), 0)]
)
def test_what_is_no_count(top_k: int, counts: tuple[int, ...], dropped: int) -> None:
    with pytest.raises(ValueError, match="."):
        LayerLoad("", top_k, counts, dropped)


def test_loads_add_up() -> None:
    twice = Load(
        "Model",
        (LayerLoad("layers.0", 2, (8, 0, 4, 4)), LayerLoad("layers.1", 2, (2, 4, 4, 2), dropped=4)),
        ("layers.2",),
    )
    assert twice == LOAD + LOAD


@pytest.mark.parametrize(
    "other",
    [
        Load("Other", LOAD.layers, LOAD.not_counted),
        Load("Model", LOAD.layers[:1], LOAD.not_counted),
        Load("Model", LOAD.layers, ()),
        Load("Model", (LayerLoad("layers.0", 2, (1, 1)), LOAD.layers[1]), LOAD.not_counted),
        Load("Model", (LayerLoad("layers.0", 4, (1, 1, 1, 1)), LOAD.layers[1]), LOAD.not_counted),
    ],
    ids=["model", "layers", "left", "experts", "top-k"],
)
def test_loads_of_different_models_do_not(other: Load) -> None:
    with pytest.raises(InputError, match="different models") as error:
        LOAD + other
    assert "\n" not in str(error.value)


def test_a_file_reads_back(tmp_path: Path) -> None:
    LOAD.save(tmp_path / "load.json")
    assert Load.read(tmp_path / "load.json") == LOAD
    assert [path.name for path in tmp_path.iterdir()] == ["load.json"]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        LOAD.save(tmp_path / "nowhere" / "load.json")


def changed(**changes: Any) -> str:
    record = {
        "format": "dsmoe expert load",
        "version": 1,
        "model": "Model",
        "layers": [{"name": "mlp", "top_k": 1, "counts": [1, 2], "dropped": 0}],
        "not_counted": [],
    }
    return json.dumps(record | changes)


def layer(**changes: Any) -> str:
    return changed(layers=[{"name": "mlp", "top_k": 1, "counts": [1, 2], "dropped": 0} | changes])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is no JSON"),
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[]", "no load of experts"),
        ('{"layers": []}', "no load of experts"),
        (changed(version=2), "is a load of version 2, this reads 1"),
        (changed(model=None), "names no model"),
        (changed(layers={}), "no layers"),
        (changed(not_counted=None), "is damaged"),
        (changed(layers=[3]), "layer 0: it is no object"),
        (changed(layers=[{"name": "mlp"}]), "layer 0: it has no 'top_k'"),
        (layer(counts=[1, -2]), "layer 0: a count is negative"),
        (layer(dropped=-1), "layer 0: a count is negative"),
        (layer(counts=[1, 2.5]), "layer 0: a count is no whole number"),
        (layer(counts=[1, True]), "layer 0: a count is no whole number"),
        (layer(counts=[]), "layer 0: a layer has experts"),
        (layer(top_k=2), "layer 0: 3 pairs are no tokens of 2 experts each"),
        (layer(name=None), "layer 0: its name is no text"),
    ],
)
def test_a_damaged_file_is_one_line(text: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "load.json").write_text(text)
    with pytest.raises(InputError) as error:
        Load.read(tmp_path / "load.json")
    said = str(error.value)
    assert said.startswith(str(tmp_path / "load.json")) and why in said and "\n" not in said


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        Load.read(tmp_path / "load.json")
    with pytest.raises(InputError, match="Is a directory"):
        Load.read(tmp_path)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "load.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is no JSON"):
        Load.read(tmp_path / "load.json")
