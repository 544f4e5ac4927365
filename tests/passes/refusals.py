"""A layer for each refusal code, short enough to be read: docs/refusals.md shows them as they stand here.

Letters: T tokens, D model width, F expert hidden width, E experts, K ids a token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsmoe_compiler.ir.errors import CaptureError
from dsmoe_compiler.ir.spec import ExpertsSpec, MoESpec, parse, to_text
from dsmoe_compiler.passes.fuse_router import FuseRouter
from dsmoe_compiler.passes.fuse_shared_experts import FuseSharedExperts
from dsmoe_compiler.passes.lift_experts import LiftExperts
from dsmoe_compiler.passes.normalize import Normalize
from dsmoe_compiler.program import Program
from tests.passes.checks import compiled
from tests.passes.sabotage import Sabotaged

D, E, K = 16, 8, 2
Forward: TypeAlias = Callable[["Layer", Tensor], Any]


class Layer(nn.Module):
    """(B, S, D) -> (B, S, D): top-2 of 8 experts, each a ReLU FFN, written as `way` has it."""

    gate: Tensor
    up: Tensor
    down: Tensor
    shared: Tensor
    bias: Tensor

    def __init__(self, way: Forward) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = {"gate": (E, D), "up": (E, 12, D), "down": (E, D, 12), "shared": (D, D), "bias": (E + 1, D)}
        for name, size in sizes.items():
            setattr(self, name, nn.Parameter(torch.randn(size) * 0.3, requires_grad=False))
        self.maps = nn.ModuleList([nn.Linear(D, D, bias=False) for _ in range(E)]).requires_grad_(False)
        self.way = way

    def forward(self, x: Tensor) -> Any:
        y = self.way(self, x.reshape(-1, D))
        return y.view(x.shape) if isinstance(y, Tensor) else y


def route(m: Layer, x: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and ids, (T, K)."""
    weights, ids = F.linear(x, m.gate).softmax(-1).topk(K)
    return weights, ids


def expert(m: Layer, e: int, x: Tensor) -> Tensor:
    """What one expert gives for some rows."""
    return F.linear(F.linear(x, m.up[e]).relu(), m.down[e])


def matched(m: Layer, x: Tensor, ids: Tensor) -> Tensor:
    """Each row of (P, D) through the expert of its id."""
    h = torch.bmm(m.up[ids], x.unsqueeze(-1)).relu()
    return torch.bmm(m.down[ids], h).squeeze(-1)


def pairs(m: Layer, x: Tensor, ids: Tensor) -> Tensor:
    """A row a (token, slot), in their own order: (T·K, D)."""
    return matched(m, x.repeat_interleave(K, 0), ids.reshape(-1))


def combined(y: Tensor, weights: Tensor) -> Tensor:
    """The rows of each token weighed and summed."""
    return (y.view(-1, K, D) * weights.unsqueeze(-1)).sum(1)


def everywhere(m: Layer, x: Tensor) -> Tensor:
    """Every expert on every token: (E, T, D)."""
    h = torch.bmm(x.unsqueeze(0).expand(E, -1, -1), m.up.transpose(1, 2)).relu()
    return torch.bmm(h, m.down.transpose(1, 2))


# -- capture -----------------------------------------------------------------------------------------


def branches_on_values(m: Layer, x: Tensor) -> Tensor:
    weights, ids = route(m, x)
    if weights.max() > 0.5:
        weights = weights * 2
    return combined(pairs(m, x, ids), weights)


def an_expert_without_tokens_matters(m: Layer, x: Tensor) -> Tensor:
    weights, ids = route(m, x)
    out = torch.zeros_like(x)
    for e in range(E):
        tokens, slots = torch.where(ids == e)
        if tokens.numel() == 0:
            out = out + 1
            continue
        out.index_add_(0, tokens, expert(m, e, x[tokens]) * weights[tokens, slots, None])
    return out


def another_when_traced(m: Layer, x: Tensor) -> Tensor:
    weights, ids = route(m, x)
    traced = type(x) is not Tensor
    return combined(pairs(m, x, ids), weights) * (2 if traced else 1)


def where_it_lies_in_memory(m: Layer, x: Tensor) -> Tensor:
    weights, ids = route(m, x)
    aligned = x.data_ptr() % 64 == 0
    return combined(pairs(m, x if aligned else x.clone(), ids), weights)


def returns_a_set(m: Layer, x: Tensor) -> set[Tensor]:
    weights, ids = route(m, x)
    return {combined(pairs(m, x, ids), weights)}


# -- the router --------------------------------------------------------------------------------------


def scores_by_tanh(m: Layer, x: Tensor) -> Tensor:
    weights, ids = F.linear(x, m.gate).tanh().topk(K)
    return combined(pairs(m, x, ids), weights)


def routes_by_another_input(m: Layer, x: Tensor) -> Tensor:
    weights, ids = route(m, x * 2)
    return combined(pairs(m, x, ids), weights)


def smallest_scores(m: Layer, x: Tensor) -> Tensor:
    weights, ids = F.linear(x, m.gate).softmax(-1).topk(K, largest=False)
    return combined(pairs(m, x, ids), weights)


# -- the experts -------------------------------------------------------------------------------------


def rows_meet_each_other(m: Layer, x: Tensor) -> Tensor:
    weights, ids = route(m, x)
    y = pairs(m, x, ids)
    return combined(y - y.mean(0), weights)


def another_number_of_biases(m: Layer, x: Tensor) -> Tensor:
    """m.bias has a row more than there are experts."""
    weights, ids = route(m, x)
    y = pairs(m, x, ids) + m.bias[ids.reshape(-1)]
    return combined(y, weights)


def two_inputs(m: Layer, x: Tensor) -> Tensor:
    weights, ids = route(m, x)
    y = pairs(m, x, ids) * pairs(m, x.roll(1, 0), ids)
    return combined(y, weights)


def nan_in_the_weights(m: Layer, x: Tensor) -> Tensor:
    """One number of m.up is NaN."""
    weights, ids = route(m, x)
    return combined(pairs(m, x, ids), weights)


def expert_left_out(m: Layer, x: Tensor) -> Tensor:
    weights, ids = route(m, x)
    out = torch.zeros_like(x)
    for e in (0, 1, 2, 4, 5, 6, 7):
        tokens, slots = torch.where(ids == e)
        out.index_add_(0, tokens, expert(m, e, x[tokens]) * weights[tokens, slots, None])
    return out


def one_expert_is_scaled(m: Layer, x: Tensor) -> Tensor:
    weights, ids = route(m, x)
    out = torch.zeros_like(x)
    for e in range(E):
        tokens, slots = torch.where(ids == e)
        y = expert(m, e, x[tokens]) * weights[tokens, slots, None]
        out.index_add_(0, tokens, y * 2 if e == 3 else y)
    return out


def weighed_twice(m: Layer, x: Tensor) -> Tensor:
    weights, ids = route(m, x)
    y = pairs(m, x, ids)
    y = y.relu() * weights.reshape(-1, 1) - y.neg().relu() * weights.sqrt().reshape(-1, 1)
    return y.view(-1, K, D).sum(1)


# -- the permutation and the combine ---------------------------------------------------------------


def sorted_from_the_last(m: Layer, x: Tensor) -> Tensor:
    weights, ids = route(m, x)
    last_first, perm = ids.reshape(-1).sort(descending=True)
    y = matched(m, x[perm // K], last_first)
    return combined(y[perm.argsort()], weights)


def never_brought_back(m: Layer, x: Tensor) -> Tensor:
    weights, ids = route(m, x)
    sorted_ids, perm = ids.reshape(-1).sort()
    y = matched(m, x[perm // K], sorted_ids)
    return combined(y, weights)


def another_divisor(m: Layer, x: Tensor) -> Tensor:
    weights, ids = route(m, x)
    sorted_ids, perm = ids.reshape(-1).sort()
    y = matched(m, x[perm // (K + 1)], sorted_ids)
    return combined(y[perm.argsort()], weights)


def ids_that_repeat(m: Layer, x: Tensor) -> Tensor:
    weights, ids = route(m, x)
    dense = x.new_zeros(x.shape[0], E).scatter(1, ids // 2, weights)
    return (everywhere(m, x) * dense.t().unsqueeze(-1)).sum(0)


def scattered_onto_ones(m: Layer, x: Tensor) -> Tensor:
    weights, ids = route(m, x)
    dense = x.new_ones(x.shape[0], E).scatter(1, ids, weights)
    return (everywhere(m, x) * dense.t().unsqueeze(-1)).sum(0)


def plus_one_everywhere(m: Layer, x: Tensor) -> Tensor:
    weights, ids = route(m, x)
    dense = x.new_zeros(x.shape[0], E).scatter(1, ids, weights)
    return (everywhere(m, x) * dense.t().unsqueeze(-1) + 1).sum(0)


def experts_choose(m: Layer, x: Tensor) -> Tensor:
    """Each expert chooses two tokens."""
    weights, chosen = F.linear(x, m.gate).t().topk(2)
    y = torch.bmm(torch.bmm(x[chosen], m.up.transpose(1, 2)).relu(), m.down.transpose(1, 2))
    return torch.zeros_like(x).index_add(0, chosen.reshape(-1), (y * weights.unsqueeze(-1)).reshape(-1, D))


def input_overwritten(m: Layer, x: Tensor) -> Tensor:
    """x changes after the experts read it, and before their rows are combined."""
    weights, ids = route(m, x)
    y, start = pairs(m, x, ids), x[:, :1]
    x.mul_(0.5)
    return combined(y, weights) + start


def combined_past_the_capacity(m: Layer, x: Tensor) -> Tensor:
    """Pairs past the capacity are not dispatched, but combined, from the last place, where another sits."""
    weights, ids = route(m, x)
    hot = F.one_hot(ids, E)
    first_choices_first = hot.transpose(0, 1).reshape(-1, E)
    places = (first_choices_first.cumsum(0) - first_choices_first).reshape(K, -1, E).transpose(0, 1)
    keep = (hot * (places < 3)).to(x.dtype)
    seat = F.one_hot((places * hot).sum(-1).clamp(max=2), 3).to(x.dtype)
    dispatch = torch.einsum("tke,tkc->tec", keep, seat)
    combine = torch.einsum("tk,tke,tkc->tec", weights, hot.to(x.dtype), seat)
    rows = torch.einsum("tec,td->ecd", dispatch, x)
    y = torch.bmm(torch.bmm(rows, m.up.transpose(1, 2)).relu(), m.down.transpose(1, 2))
    return torch.einsum("tec,ecd->td", combine, y)


def tokens_by_rounding(m: Layer, x: Tensor) -> Tensor:
    weights, ids = route(m, x)
    sorted_ids, perm = ids.reshape(-1).sort()
    tokens = (perm / K).floor().long()
    y = matched(m, x[tokens], sorted_ids)
    return combined(y[perm.argsort()], weights)


# -- validation: passes of this compiler, broken on purpose ----------------------------------------------


def as_it_should_be(m: Layer, x: Tensor) -> Tensor:
    """A layer that fuses whole."""
    weights, ids = route(m, x)
    return combined(pairs(m, x, ids), weights) + F.linear(F.linear(x, m.shared).relu(), m.shared)


def drops_the_last_expert(m: Layer, x: Tensor) -> Tensor:
    """The last expert's pairs contribute nothing; the experts are the modules of a list."""
    weights, ids = route(m, x)
    out = torch.zeros_like(x)
    for e in range(E - 1):
        tokens, slots = torch.where(ids == e)
        out.index_add_(0, tokens, m.maps[e](x[tokens]) * weights[tokens, slots, None])
    return out


def wrong_activation(arguments: list[Any]) -> list[Any]:
    """A fused op that computes silu where the experts compute relu."""
    *others, spec = arguments
    return [*others, to_text(parse(spec.replace("relu", "silu"), ExpertsSpec))]


def wrong_scale(arguments: list[Any]) -> list[Any]:
    """A fused op whose router scales its weights by 2."""
    *others, spec = arguments
    return [*others, to_text(parse(spec.replace('score="softmax"', 'score="softmax",scale=2.0'), MoESpec))]


def wrong_shared_experts(arguments: list[Any]) -> list[Any]:
    """A fused op whose shared experts compute silu where the model's compute relu."""
    *others, spec = arguments
    before, shared = spec.split("shared=")
    return [*others, to_text(parse(f"{before}shared={shared.replace('relu', 'silu')}", MoESpec))]


def nothing_dropped(arguments: list[Any]) -> list[Any]:
    """A fused op that is given the ids without the drops: what a layer's own check cannot see."""
    x, ids, *others = arguments
    return [x, ids.all_input_nodes[-1], *others]


@dataclass(frozen=True)
class Provoked:
    """A code, the layer that is refused with it, and for validation the pass that is broken, and how."""

    code: str
    layer: Forward
    broken: str = ""
    how: Callable[[list[Any]], list[Any]] | None = None

    @property
    def shown(self) -> Callable[..., Any]:
        """What provokes the refusal."""
        return self.how or self.layer

    def __str__(self) -> str:
        return f"{self.code} {self.shown.__name__}"


PROVOKED: tuple[Provoked, ...] = (
    Provoked("R101", branches_on_values),
    Provoked("R102", an_expert_without_tokens_matters),
    Provoked("R103", another_when_traced),
    Provoked("R104", where_it_lies_in_memory),
    Provoked("R105", returns_a_set),
    Provoked("R201", scores_by_tanh),
    Provoked("R202", routes_by_another_input),
    Provoked("R203", as_it_should_be, "fuse_router", wrong_scale),
    Provoked("R204", smallest_scores),
    Provoked("R301", rows_meet_each_other),
    Provoked("R302", another_number_of_biases),
    Provoked("R303", two_inputs),
    Provoked("R304", as_it_should_be, "lift_experts", wrong_activation),
    Provoked("R305", nan_in_the_weights),
    Provoked("R306", as_it_should_be, "fuse_shared_experts", wrong_shared_experts),
    Provoked("R307", expert_left_out),
    Provoked("R308", one_expert_is_scaled),
    Provoked("R309", weighed_twice),
    Provoked("R401", sorted_from_the_last),
    Provoked("R402", never_brought_back),
    Provoked("R403", another_divisor),
    Provoked("R404", ids_that_repeat),
    Provoked("R405", scattered_onto_ones),
    Provoked("R406", plus_one_everywhere),
    Provoked("R407", experts_choose),
    Provoked("R408", input_overwritten),
    Provoked("R409", combined_past_the_capacity),
    Provoked("R410", tokens_by_rounding),
    Provoked("R501", drops_the_last_expert, "lift_experts", nothing_dropped),
)


def made(provoked: Provoked) -> Layer:
    """The layer, ready to be compiled."""
    layer = Layer(provoked.layer)
    if provoked.layer is nan_in_the_weights:
        layer.get_parameter("up")[3, 1, 2] = torch.nan
    return layer


@functools.cache
def outcome_of(provoked: Provoked) -> Program | CaptureError:
    """The layer compiled, all rewrites checked on numbers; or why it could not be captured."""
    steps = (Normalize(), LiftExperts(), FuseRouter(), FuseSharedExperts())
    if provoked.how is not None:
        at = [step.name for step in steps].index(provoked.broken)
        return compiled(made(provoked), pipeline=(*steps[:at], Sabotaged(steps[at], provoked.how)))
    try:
        return compiled(made(provoked), pipeline=steps)
    except CaptureError as error:
        return error
