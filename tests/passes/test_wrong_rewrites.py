"""A rewrite that changes the answer is caught: its layer refused, the pass named, the program still right."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from dsmoe_compiler.ir.body import parse_body
from dsmoe_compiler.ir.passes import Pass
from dsmoe_compiler.ir.spec import ExpertsSpec, MoESpec, RouterSpec, parse, to_text
from dsmoe_compiler.passes.fuse_router import FuseRouter
from dsmoe_compiler.passes.fuse_shared_experts import FuseSharedExperts
from dsmoe_compiler.passes.lift_experts import LiftExperts
from dsmoe_compiler.passes.normalize import Normalize
from tests.passes import loops
from tests.passes.checks import assert_same, compiled, only_layer, some_inputs
from tests.passes.loop_lookalikes import last_left_out
from tests.passes.sabotage import Sabotaged
from tests.passes.spellings import Spec, layer
from tests.passes.test_refusals import Stacked


def _experts(change: Callable[[ExpertsSpec], ExpertsSpec]) -> Callable[[list[Any]], list[Any]]:
    return lambda args: [*args[:-1], to_text(change(parse(args[-1], ExpertsSpec)))]


def _moe(change: Callable[[MoESpec], MoESpec]) -> Callable[[list[Any]], list[Any]]:
    return lambda args: [*args[:-1], to_text(change(parse(args[-1], MoESpec)))]


def _body(old: str, new: str) -> Callable[[ExpertsSpec], ExpertsSpec]:
    return lambda spec: replace(spec, body=parse_body(str(spec.body).replace(old, new)))


def _router(**fields: Any) -> Callable[[MoESpec], MoESpec]:
    return lambda spec: replace(spec, router=replace(spec.router or RouterSpec(2, "softmax"), **fields))


def _shared(old: str, new: str) -> Callable[[MoESpec], MoESpec]:
    def change(spec: MoESpec) -> MoESpec:
        assert spec.shared is not None
        return replace(
            spec, shared=replace(spec.shared, body=parse_body(str(spec.shared.body).replace(old, new)))
        )

    return change


WRONG_EXPERTS = {
    "another activation": _experts(_body("silu", "gelu")),
    "gate and up swapped": _experts(
        _body("mul(silu(slice(h,0,8,1)),slice(h,8,16,1))", "mul(silu(slice(h,8,16,1)),slice(h,0,8,1))")
    ),
    "the weight inside": _experts(_body("),p1),w)", "),p1),sigmoid(w))")),
    "a bias from nowhere": _experts(_body("),p1),w)", "),p1),add(w,0.5))")),
}
WRONG_ROUTERS = {
    "renormalised": _moe(_router(renormalize=True)),
    "scaled": _moe(_router(scale=2.0)),
    "sigmoid": _moe(_router(score="sigmoid")),
    "after top-k": _moe(_router(select="logits")),
}


def refused(
    honest: Pass, others: tuple[Pass, ...], change: Callable[[list[Any]], list[Any]], code: str
) -> None:
    made = layer(Spec(shared="plain"))
    program = compiled(made, pipeline=(*others, Sabotaged(honest, change)))
    found = only_layer(program)
    said = [str(found.refusal), *found.remarks]
    assert any(code in text and "pass sabotaged changed the answer" in text for text in said), said
    assert_same(program, made, some_inputs(16))


@pytest.mark.parametrize("change", WRONG_EXPERTS.values(), ids=WRONG_EXPERTS)
def test_wrong_experts(change: Callable[[list[Any]], list[Any]]) -> None:
    refused(LiftExperts(), (Normalize(),), change, "R304")


@pytest.mark.parametrize("change", WRONG_ROUTERS.values(), ids=WRONG_ROUTERS)
def test_wrong_routers(change: Callable[[list[Any]], list[Any]]) -> None:
    refused(FuseRouter(), (Normalize(), LiftExperts()), change, "R203")


def test_wrong_shared_experts() -> None:
    others = (Normalize(), LiftExperts(), FuseRouter())
    refused(FuseSharedExperts(), others, _moe(_shared("silu", "gelu")), "R306")


def _packs(change: Callable[[list[Any]], list[Any]]) -> Callable[[list[Any]], list[Any]]:
    """The experts' own tensors, packed wrongly: of the op's first one."""

    def changed(args: list[Any]) -> list[Any]:
        first = args[3][0]
        first.args = (change(list(first.args[0])),)
        return args

    return changed


WRONG_LOOPS = {
    "experts in another order": _packs(lambda parts: parts[::-1]),
    "an expert twice": _packs(lambda parts: [parts[0], *parts[:-1]]),
    "another activation": WRONG_EXPERTS["another activation"],
    "another's weights": lambda args: [*args[:3], [args[3][1], args[3][0], *args[3][2:]], args[4]],
}


@pytest.mark.parametrize("change", WRONG_LOOPS.values(), ids=WRONG_LOOPS)
def test_wrong_loops(change: Callable[[list[Any]], list[Any]]) -> None:
    """Experts re-rolled wrongly; one of them is left out, so that its pairs are dropped."""
    made = loops.layer(loops.Case(last_left_out))
    program = compiled(made, width=loops.D, pipeline=(Normalize(), Sabotaged(LiftExperts(), change)))
    found = only_layer(program)
    said = str(found.refusal)
    assert "R304" in said and "pass sabotaged changed the answer" in said, said
    assert_same(program, made, some_inputs(loops.D))


def test_pairs_that_no_expert_answers_to_are_missed_by_the_whole_program() -> None:
    """A layer alone is given ids that its experts answer to; the check of the whole sees the others."""
    made = loops.layer(loops.Case(last_left_out))
    kept = Sabotaged(LiftExperts(), lambda args: [args[0], args[1].all_input_nodes[-1], *args[2:]])
    program = compiled(made, width=loops.D, pipeline=(Normalize(), kept))
    assert "R501" in str(only_layer(program).refusal)
    assert_same(program, made, some_inputs(loops.D))


def test_an_honest_loop_is_not_refused() -> None:
    """What the tests above do wrong is what is refused."""
    made = loops.layer(loops.Case(last_left_out))
    program = compiled(made, width=loops.D, pipeline=(Normalize(), Sabotaged(LiftExperts(), list)))
    assert only_layer(program).fused


def test_a_refused_lift_is_a_refused_layer_and_a_refused_router_is_not() -> None:
    made = layer(Spec())
    lifted = compiled(
        made, pipeline=(Normalize(), Sabotaged(LiftExperts(), WRONG_EXPERTS["another activation"]))
    )
    routed = compiled(
        made, pipeline=(Normalize(), LiftExperts(), Sabotaged(FuseRouter(), WRONG_ROUTERS["scaled"]))
    )
    assert not only_layer(lifted).fused and only_layer(lifted).spec is None
    spec = only_layer(routed).spec
    assert spec is not None and spec.router is None, "the experts stay fused, the router as written"


def test_what_follows_a_refused_layer_is_still_checked_and_right() -> None:
    """The second of two stacked layers reads the first one's op, which is taken back."""
    made = Stacked()
    first = made.layers[0]
    first.experts.get_parameter("down").data[0, 0, 0] = torch.nan  # type: ignore[union-attr]
    program = compiled(made)
    assert [found.fused for found in program.report.layers] == [False, True, True]


def test_nothing_checks_with_verification_off() -> None:
    """The sabotage of the tests above is one: without checks it goes through, and the numbers are wrong."""
    made = layer(Spec())
    steps = (Normalize(), Sabotaged(LiftExperts(), WRONG_EXPERTS["another activation"]))
    program = compiled(made, pipeline=steps, verify="off")
    assert only_layer(program).fused
    x = torch.randn(2, 3, 16)
    assert not torch.allclose(program(x), made(x), atol=1e-3)
