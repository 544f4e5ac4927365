"""Whole layers by generated kernels, in the interpreter, against the maths in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dsmoe_compiler.codegen.choice import Choice
from dsmoe_compiler.codegen.gpu import for_target
from dsmoe_compiler.codegen.load import load
from dsmoe_compiler.codegen.lowering import module_of
from dsmoe_compiler.codegen.tiles import Decode, GemmTiles, GemvTiles, Grouped, Plan
from tests.codegen.interpreted import interpreter
from tests.codegen.layers import LAYOUTS, MIDDLES, ROUTERS, Made, make
from tests.codegen.pairwise import Case, pairwise

_SMALL = GemmTiles(16, 16, 16, 4, 2)
PLANS: dict[str, Plan] = {
    "decode": Decode(GemvTiles(16, 32, 4, 1), GemvTiles(16, 16, 4, 1)),
    "decode, split": Decode(GemvTiles(16, 16, 4, 1, split=2), GemvTiles(32, 16, 4, 1)),
    "grouped": Grouped(GemmTiles(32, 16, 16, 4, 2), GemmTiles(16, 32, 16, 4, 2), 3),
    "descriptors": Grouped(GemmTiles(16, 32, 16, 4, 2, tma=True), GemmTiles(32, 16, 32, 4, 2, tma=True), 2),
    "swapped": Grouped(GemmTiles(16, 16, 32, 4, 2, swap=True), GemmTiles(16, 32, 16, 4, 2, swap=True), 5),
    "swapped, descriptors": Grouped(
        GemmTiles(32, 32, 16, 4, 2, swap=True, tma=True), GemmTiles(16, 16, 16, 4, 2, swap=True, tma=True), 1
    ),
}
FACTORS: dict[str, tuple[Any, ...]] = {
    "plan": tuple(PLANS),
    "body": tuple(MIDDLES),
    "layout": LAYOUTS,
    "transposed": (False, True),
    "biased": (False, True),
    "weighs": ("output", "input", "input's sigmoid", "middle"),
    "router": ("", *ROUTERS),
    "shared": ("", "plain", "gated"),
    "tokens": (0, 1, 2, 7, 64, 130),
    "experts": (1, 3, 8, 60, 64),
    "top_k": (1, 2, 6, 8),
    "sizes": ((32, 48), (40, 24), (19, 37)),
    "dtype": ("float32", "float16"),
    "load": ("random", "one", "dropped"),
}


def _allowed(case: Case) -> bool:
    fits = case["top_k"] <= case["experts"]
    whole = bool(case["router"]) or not case["shared"]
    loaded = not case["router"] or case["load"] == "random"
    aligned = "descriptors" not in case["plan"] or case["sizes"] != (19, 37)
    small = case["tokens"] * case["top_k"] <= 16 or "decode" not in case["plan"]
    return fits and whole and loaded and aligned and small


CASES = pairwise(FACTORS, _allowed)


def _name(case: Case) -> str:
    return "-".join(f"{k}={v}" if isinstance(v, (int, bool)) else str(v) for k, v in case.items())


def run(made: Made, plan: Plan) -> Tensor:
    """The layer's output by kernels in the interpreter."""
    layer = made.layer
    choice = Choice(128, for_target("sm_90"), plan, Grouped(_SMALL, _SMALL, 2) if layer.shared_ffn else None)
    with interpreter():
        out = load(module_of(layer, choice)).layer(**made.given(layer.added))
    assert isinstance(out, Tensor)
    return out


def error(made: Made, got: Tensor) -> float:
    """The largest difference from the exact answer, relative to its largest number."""
    want = made.expected()
    assert got.shape == want.shape and got.dtype == made.operator().dtype
    return 0.0 if not want.numel() else float((got.double() - want).abs().max() / want.abs().max())


# Two products in float32 over at most 2·48 and 40 numbers: 136 roundings of 2⁻²⁴ on each number that is
# added, and the largest sum of sizes is below 8 times the largest result. In float16 the hidden row, the
# expert's row and the result are rounded to 2⁻¹¹ each, and so is a weighed input.
ALLOWED = {"float32": 8 * 136 * 2.0**-24, "float16": 8 * 4 * 2.0**-11}


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_equals_the_reference(case: Case) -> None:
    given = {k: v for k, v in case.items() if k != "plan"}
    made = make(**given)
    assert error(made, run(made, PLANS[case["plan"]])) <= ALLOWED[case["dtype"]]


def test_the_covering_set_covers() -> None:
    assert len(CASES) <= 150
    for a, b in (("plan", "layout"), ("router", "shared"), ("experts", "tokens"), ("body", "transposed")):
        missing = {(i, j) for i in FACTORS[a] for j in FACTORS[b]} - {(case[a], case[b]) for case in CASES}
        assert missing <= {("", "plain"), ("", "gated")}


def test_a_wrong_kernel_would_be_seen() -> None:
    made = make()
    out = run(made, PLANS["grouped"])
    out[0, 0] += 1e-3 * out.abs().max()
    assert error(made, out) > ALLOWED["float32"]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shared", ["", "plain"])
def test_a_wide_tile_is_stored_by_halves(biased: bool, shared: str) -> None:
    made = make(sizes=(300, 24), biased=biased, router="softmax", shared=shared, tokens=20)
    plan = Grouped(_SMALL, GemmTiles(16, 256, 8, 4, 2), 2)
    assert "left, right" in module_of(made.layer, Choice(128, for_target("sm_90"), plan, plan))
    assert error(made, run(made, plan)) <= 3 * ALLOWED["float32"]  # sums over 300 numbers, not 96


@pytest.mark.parametrize("layout", ["interleaved", "stacked"])
def test_large_biased_tiles_are_activated_by_halves(layout: str) -> None:
    made = make(body="gpt_oss", layout=layout, biased=True, sizes=(24, 200), tokens=40)
    plan = Grouped(GemmTiles(128, 128, 8, 8, 2), _SMALL, 2)
    assert "left_gate, right_gate" in module_of(made.layer, Choice(128, for_target("sm_90"), plan))
    assert error(made, run(made, plan)) <= 3 * ALLOWED["float32"]  # sums over 200 numbers, not 96


def test_tiles_take_an_experts_columns_in_groups() -> None:
    made = make(experts=2, tokens=300, sizes=(16, 40), load="one")
    plan = Grouped(GemmTiles(16, 16, 16, 4, 2), GemmTiles(16, 16, 16, 4, 2), 7)
    assert error(made, run(made, plan)) <= ALLOWED["float32"]


@pytest.mark.parametrize("plan", ["decode", "grouped"])
def test_shared_experts_of_a_wider_dtype_keep_their_hidden_rows(plan: str) -> None:
    made = make(router="softmax", shared="plain", tokens=3, dtype="float16")
    layer = made.layer
    wide = replace(layer, shared_params=tuple(replace(o, dtype="float32") for o in layer.shared_params))
    choice = Choice(4, for_target("sm_90"), PLANS[plan], Grouped(_SMALL, _SMALL, 2))
    for kind, dtype in ((layer, "float16"), (wide, "float32")):
        (line,) = [x for x in module_of(kind, choice).splitlines() if "shared_h = torch.empty" in x]
        assert f"dtype=torch.{dtype}" in line


def test_the_same_bits_twice() -> None:
    made = make(router="softmax", shared="plain", tokens=64, experts=8)
    assert run(made, PLANS["grouped"]).equal(run(made, PLANS["grouped"]))


def test_what_nobody_wrote_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def poisoned(*sizes: Any, **options: Any) -> Tensor:
        made = empty(*sizes, **options)
        return made if made.is_meta else made.fill_(torch.nan if made.is_floating_point() else 1 << 20)

    made = make(load="dropped", tokens=7)
    monkeypatch.setattr(torch, "empty", poisoned)
    for plan in PLANS.values():
        assert error(made, run(made, plan)) <= ALLOWED["float32"]
