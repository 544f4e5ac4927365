"""How many kernels a layer launches."""

from __future__ import annotations

import pytest

from dsmoe_compiler.codegen.choice import Choice, choice_of
from dsmoe_compiler.codegen.gpu import for_target
from dsmoe_compiler.codegen.load import load
from dsmoe_compiler.codegen.lowering import module_of
from dsmoe_compiler.codegen.record import launches
from dsmoe_compiler.codegen.resources import Signature, signature
from dsmoe_compiler.codegen.tiles import Decode, GemmTiles, GemvTiles, Grouped
from tests.codegen.layers import Made, make

DECODE = Decode(GemvTiles(16, 128, 4, 1), GemvTiles(16, 128, 4, 1))
TILES = GemmTiles(64, 64, 32, 4, 3)
GROUPED = Grouped(TILES, TILES, 132)
SHARED = ["shared_up", "shared_down"]
ROUTED = ["route", "count", "scatter", "grouped_up", "grouped_down"]


def launched(made: Made, plan: Decode | Grouped) -> list[str]:
    """The kernels by name."""
    layer = made.layer
    choice = Choice(64, for_target("sm_90"), plan, GROUPED if layer.shared_ffn else None)
    module = load(module_of(layer, choice))
    given = {k: _meta(v) for k, v in made.given(layer.added).items()}
    return [launch.name for launch in launches(module, lambda: module.layer(**given))]


def _meta(value: object) -> object:
    return [v.to("meta") for v in value] if isinstance(value, list) else value.to("meta")  # type: ignore[attr-defined]


@pytest.mark.parametrize("shared", ["", "plain"])
def test_few_tokens(shared: str) -> None:
    assert launched(make(router="groups", shared=shared), DECODE) == ["route", "decode_up", "decode_down"]


@pytest.mark.parametrize("shared", ["", "plain"])
def test_many_tokens(shared: str) -> None:
    beside = SHARED if shared else []
    assert launched(make(router="softmax", shared=shared), GROUPED) == [*ROUTED, *beside, "combine"]


def test_routed_elsewhere() -> None:
    assert launched(make(), DECODE) == ["decode_up", "decode_down"]
    assert launched(make(), GROUPED) == [*ROUTED[1:], "combine"]


def test_no_tokens_no_launches() -> None:
    for plan in (DECODE, GROUPED):
        assert launched(make(router="softmax", tokens=0), plan) == []


@pytest.mark.parametrize("tokens", [1, 8, 64, 512, 4096, 16384])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_whatever_is_chosen(target: str, tokens: int) -> None:
    made = make(router="softmax", shared="plain", experts=64, top_k=6, dtype="bfloat16", sizes=(64, 96))
    choice = choice_of(made.layer, tokens, for_target(target), "3.9.0")
    assert len(launched(made, choice.plan)) <= (3 if isinstance(choice.plan, Decode) else 8)


@pytest.mark.parametrize("plan", [DECODE, GROUPED], ids=["decode", "grouped"])
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_numbers_of_tokens_share_what_was_compiled(plan: Decode | Grouped, target: str) -> None:
    layer = make(router="softmax", shared="plain").layer
    choice = Choice(64, for_target(target), plan, GROUPED)
    module = load(module_of(layer, choice))
    compiled = list[list[Signature]]()
    for tokens in (1, 5, 16, 64):
        made = make(router="softmax", shared="plain", tokens=tokens)
        given = {k: _meta(v) for k, v in made.given(layer.added).items()}
        found = launches(module, lambda given=given: module.layer(**given))
        # Of scatter there are three: see there.
        compiled.append([signature(f.kernel, f.arguments, target) for f in found if f.name != "scatter"])
    assert compiled[0] and all(each == compiled[0] for each in compiled)
