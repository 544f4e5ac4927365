"""No wrong fusion of a loop: what only looks like a known one runs as eager, nothing checking rewrites."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsmoe_compiler.ir.errors import CaptureError
from dsmoe_compiler.program import Program
from tests.passes import loops
from tests.passes.checks import assert_same, compiled, refusal
from tests.passes.loop_lookalikes import LOOKALIKES, Lookalike
from tests.passes.loops import Case, D, E, Layer, StackedParameters, layer


def takes(made: Layer, x: Tensor) -> bool:
    """Whether eager runs: some loops have no form for few tokens."""
    try:
        made(x)
    except (RuntimeError, IndexError, ValueError):
        return False
    return True


def assert_same_for_all_routings(program: Program, made: Layer) -> None:
    """On random routings, with every token on the last experts, and on the first."""
    shapes = ((2, 5), (3, 4), (1, 1), (1, 11))
    kept = made.gate.weight.clone()
    for order in (0.0, 1.0, -1.0):
        gates = (order * torch.arange(E)[:, None] / D).expand(E, D) if order else kept
        made.gate.weight.copy_(gates)
        inputs = [torch.randn(*shape, D) for shape in shapes]
        inputs = [x.abs() if order else x for x in inputs]
        assert_same(program, made, [x for x in inputs if takes(made, x)])


@pytest.mark.parametrize("lookalike", LOOKALIKES, ids=str)
def test_right_and_refused_with_a_reason(lookalike: Lookalike) -> None:
    made = layer(lookalike.case)
    if lookalike.becomes == "CaptureError":
        with pytest.raises(CaptureError, match=r"loop_lookalikes.py:\d+"):
            compiled(made, width=D)
        return
    program = compiled(made, width=D, verify="off")
    if lookalike.becomes == "fused":
        assert [str(found.refusal) for found in program.report.layers] == ["None"]
    elif lookalike.becomes == "unlisted":
        assert not program.report.layers
    else:
        found = refusal(program)
        assert (found.code, lookalike.because in found.because) == (lookalike.becomes, True), str(found)
        assert found.node and found.source, "a refusal says where"
    assert_same_for_all_routings(program, made)


# -- variations ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Varied:
    """A loop put together from parts, each of which may be the right one or a near miss.

    `visits` are the experts in order, with what is added to each number for the mask, the expert and the
    dense column.
    """

    visits: tuple[int, ...]
    mask: int
    expert: int
    picks: str
    weight: str
    add: str
    start: str

    def __call__(self, m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = {"zeros": torch.zeros_like(x), "ones": torch.ones_like(x), "input": x.clone()}[self.start]
        for e in self.visits:
            chosen = ids == (e + self.mask) % E
            tok, slot = self._picked(chosen)
            y = m.experts[(e + self.expert) % E](x[tok])
            y = y * self._weight(chosen, ids, w, e, tok, slot, m)
            out = self._added(out, tok, y)
        return out

    def _picked(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        match self.picks:
            case "where":
                tok, slot = torch.where(chosen)
            case "nonzero":
                tok, slot = chosen.nonzero().unbind(-1)
            case "turned":
                slot, tok = torch.where(chosen.t())
            case _:
                at = chosen.nonzero()
                tok, slot = at[:, 0], at[:, 1]
        return tok, slot

    def _weight(
        self, chosen: Tensor, ids: Tensor, w: Tensor, e: int, tok: Tensor, slot: Tensor, m: Layer
    ) -> Tensor:
        dense = torch.zeros_like(m.gate(torch.zeros(ids.shape[0], D))).scatter(1, ids, w)
        match self.weight:
            case "pairs":
                return w[tok, slot, None]
            case "masked":
                return (w * chosen).sum(-1)[tok].unsqueeze(-1)
            case "unmasked":
                return (w * ~chosen).sum(-1)[tok].unsqueeze(-1)
            case "of the mask":
                return w[chosen].unsqueeze(-1)
            case "dense":
                return dense[tok, e].unsqueeze(-1)
            case "column":
                return w[:, e % 2][tok].unsqueeze(-1)
            case "first":
                return w[tok, 0, None]
        return torch.ones(1)

    def _added(self, out: Tensor, tok: Tensor, y: Tensor) -> Tensor:
        match self.add:
            case "index_add":
                return out.index_add(0, tok, y)
            case "in place":
                out[tok] += y
            case "subtract":
                out[tok] -= y
            case "overwrite":
                out[tok] = y
            case "accumulate":
                out.index_put_((tok,), y, accumulate=True)
            case "scatter":
                out = out.scatter_add(0, tok.unsqueeze(-1).expand(-1, D), y)
            case "apart":
                out = out + torch.zeros_like(out).index_add(0, tok, y)
            case _:
                out = (out * 0.5).index_add(0, tok, y)
        return out


_WHOLE = tuple(range(E))
_VARIED = st.builds(
    Varied,
    visits=st.sampled_from([_WHOLE] * 6 + [(3, 1, 0, 2), (0, 1, 2), (1, 2, 3), (0, 1, 2, 3, 2), (0, 0)]),
    mask=st.sampled_from([0, 0, 0, 1]),
    expert=st.sampled_from([0, 0, 0, 1]),
    picks=st.sampled_from(["where", "nonzero", "turned", "columns"]),
    weight=st.sampled_from(["pairs", "masked", "unmasked", "of the mask", "dense", "column", "first", ""]),
    add=st.sampled_from(
        ["index_add", "in place", "subtract", "overwrite", "accumulate", "scatter", "apart", "decay"]
    ),
    start=st.sampled_from(["zeros", "zeros", "ones", "input"]),
)


@pytest.mark.slow
@given(varied=_VARIED, stacked=st.booleans(), top_one=st.booleans())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_loop_with_random_near_misses_runs_as_eager(varied: Varied, stacked: bool, top_one: bool) -> None:
    check_variation(varied, stacked, top_one)


@given(varied=_VARIED, stacked=st.booleans(), top_one=st.booleans())
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_some_near_misses_run_as_eager(varied: Varied, stacked: bool, top_one: bool) -> None:
    check_variation(varied, stacked, top_one)


def check_variation(varied: Varied, stacked: bool, top_one: bool) -> None:
    """Fused or refused, on all routings."""
    case = Case(varied, name=str(varied))
    case = replace(case, experts=StackedParameters) if stacked else case
    case = replace(case, route=loops.argmax, top_k=1) if top_one and varied.weight != "column" else case
    made = layer(case)
    assert_same_for_all_routings(compiled(made, width=D, verify="off"), made)
