"""Layers that a rule once got wrong: it took for granted what only most models do.

Each takes (layer, x (T, D)). Fused or not, the program must compute what it computes, also with verification
off. Letters: T tokens, D model width, E experts, K ids a token, C slots an expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.passes import capacity

WIDTH, EXPERTS, CAPACITY = capacity.WIDTH, capacity.EXPERTS, capacity.CAPACITY
Written: TypeAlias = Callable[["Layer", Tensor], Tensor]


@dataclass(frozen=True)
class Broken:
    """A layer, and what becomes of it: "fused", or a refusal's code and words."""

    written: Written
    becomes: str
    because: str = ""

    def __str__(self) -> str:
        return self.written.__name__


class Layer(capacity.Layer):
    """The same layers as those with capacity slots, their forward given."""

    def __init__(self, written: Written) -> None:
        super().__init__(lambda layer, x: x)
        self.written = written

    def forward(self, x: Tensor) -> Tensor:
        return self.written(self, x.reshape(-1, WIDTH))


# -- sums of dense experts -------------------------------------------------------------------------


def _dense(m: Layer, x: Tensor) -> Tensor:
    weights, ids = m.top2(x)
    columns = [(weights * (ids == e)).sum(-1, keepdim=True) for e in range(EXPERTS)]
    products: list[Tensor] = [column * expert(x) for column, expert in zip(columns, m.experts, strict=True)]
    out = products[0]
    for product in products[1:]:
        out = out + product
    return out


def zeros_of_more_dimensions(m: Layer, x: Tensor) -> Tensor:
    """Zeros added to the sum, which make it (3, T, D)."""
    return _dense(m, x) + torch.zeros(3, 1, WIDTH)


def zeros_of_another_type(m: Layer, x: Tensor) -> Tensor:
    return _dense(m, x) + torch.zeros(x.shape[0], WIDTH, dtype=torch.float64)


# -- capacity slots --------------------------------------------------------------------------------


def _slots(m: Layer, x: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """Tokens with one id each; those of weight at most 0 are not dispatched."""
    hot = F.one_hot(ids, EXPERTS)
    places = (hot.cumsum(0) - 1) * hot
    kept = hot * (places < CAPACITY)
    place = (places * kept).sum(-1)
    combine = weight[:, None, None] * kept.to(x.dtype)[..., None] * F.one_hot(place, CAPACITY)[:, None]
    return _combined(m, x, (combine > 0).to(x.dtype), combine)


def _combined(m: Layer, x: Tensor, dispatch: Tensor, combine: Tensor) -> Tensor:
    rows = torch.einsum("tec,td->ecd", dispatch, x)
    rows = torch.bmm(torch.cos(torch.bmm(rows, m.up)), m.down)
    return torch.einsum("tec,ecd->td", combine, rows)


def weights_at_most_below_zero(m: Layer, x: Tensor) -> Tensor:
    weight, ids = m.scores(x).max(-1)
    return _slots(m, x, weight.clamp(max=-0.5), ids)


def weights_the_smaller_of_two(m: Layer, x: Tensor) -> Tensor:
    weight, ids = m.scores(x).max(-1)
    return _slots(m, x, torch.min(weight, m.gate(x)[:, 0]), ids)


def weights_of_a_softplus_upside_down(m: Layer, x: Tensor) -> Tensor:
    weight, ids = m.scores(x).max(-1)
    return _slots(m, x, F.softplus(weight, beta=-1), ids)


def weights_the_larger_of_two(m: Layer, x: Tensor) -> Tensor:
    """Right, and as good as a softmax."""
    weight, ids = m.scores(x).max(-1)
    return _slots(m, x, torch.max(weight, m.gate(x)[:, 0].relu()), ids)


def _one_early(m: Layer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(weights, one-hot (T, E), 1 at places (T, C)), the first pair of each expert at the place -1."""
    weight, ids = m.scores(x).max(-1)
    hot = F.one_hot(ids, EXPERTS)
    place = ((hot.cumsum(0) - 2) * hot).sum(-1)
    return weight, hot.to(x.dtype), (place[:, None] == torch.arange(CAPACITY)).to(x.dtype)


def places_before_the_first(m: Layer, x: Tensor) -> Tensor:
    weight, hot, places = _one_early(m, x)
    dispatch = hot[..., None] * places[:, None]
    return _combined(m, x, dispatch, dispatch * weight[:, None, None])


def places_turned(m: Layer, x: Tensor) -> Tensor:
    """The same, the places' dimensions exchanged: (C, T)."""
    weight, hot, places = _one_early(m, x)
    dispatch = torch.einsum("te,ct->tec", hot, places.t())
    return _combined(m, x, dispatch, dispatch * weight[:, None, None])


# -- coordinates -----------------------------------------------------------------------------------


def first_pair_alone(m: Layer, x: Tensor) -> Tensor:
    """nonzero()[0] is the first token that chose an expert, nonzero()[:, 0] are all of them."""
    _, ids = m.top2(x)
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        tokens = (ids == e).any(-1).nonzero()[0]
        out = out.index_add(0, tokens, expert(x[tokens]))
    return out


# -- layers that meet ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Several:
    """Layers of which one reads what another becomes, and how many there are."""

    written: Written
    layers: int

    def __str__(self) -> str:
        return self.written.__name__


def _gathered(m: Layer, x: Tensor, weights: Tensor, ids: Tensor, width: int = WIDTH) -> Tensor:
    hidden = torch.einsum("td,tkdf->tkf", x, m.up[ids]).relu()
    rows = torch.einsum("tkf,tkfd->tkd", hidden, m.down[:, :, :width][ids])
    return (rows * weights[..., None]).sum(1)


def _loop(m: Layer, x: Tensor, weights: Tensor, ids: Tensor, out: Tensor) -> Tensor:
    for e, expert in enumerate(m.experts):
        tokens, slots = torch.where(ids == e)
        rows = expert(x[tokens]) * weights[tokens, slots, None]
        out = out.index_add(0, tokens, rows.to(out.dtype))
    return out


def added_to_another(m: Layer, x: Tensor) -> Tensor:
    """A loop's sum starts at what other experts gave."""
    weights, ids = m.top2(x)
    return _loop(m, x, weights, ids, _gathered(m, x, weights, ids))


def zeros_shaped_as_another(m: Layer, x: Tensor) -> Tensor:
    """Of what other experts gave, the loop needs nothing but its sizes."""
    weights, ids = m.top2(x)
    given = _gathered(m, x, weights, ids) + x
    return given + 2 * _loop(m, x, weights, ids, torch.zeros_like(given))


def scored_by_another(m: Layer, x: Tensor) -> Tensor:
    """What some experts give are the scores by which others are weighed."""
    weights, ids = m.top2(x)
    scores = _gathered(m, x, weights, ids, width=EXPERTS)
    chosen = torch.zeros_like(scores).scatter(1, ids, 1.0) * scores
    rows = torch.stack([expert(x) for expert in m.experts], dim=1)
    return (rows * chosen[..., None]).sum(1)


def summed_in_fp32(m: Layer, x: Tensor) -> Tensor:
    """Three of the experts, added to their tokens in fp32, and then to the tokens themselves."""
    weights, ids = m.top2(x)
    out = torch.zeros_like(x, dtype=torch.float32)
    for e, expert in enumerate(m.experts[:3]):
        tokens, slots = torch.where(ids == e)
        out = out.index_add(0, tokens, expert(x[tokens]).float() * weights[tokens, slots, None])
    return out + x.float()


SEVERAL: tuple[Several, ...] = (
    Several(added_to_another, 2),
    Several(zeros_shaped_as_another, 2),
    Several(scored_by_another, 2),
)
BROKEN: tuple[Broken, ...] = (
    Broken(zeros_of_more_dimensions, "fused"),
    Broken(zeros_of_another_type, "fused"),
    Broken(weights_at_most_below_zero, "R409", "pairs of negative weight are not dispatched"),
    Broken(weights_the_smaller_of_two, "R409", "pairs of negative weight are not dispatched"),
    Broken(weights_of_a_softplus_upside_down, "R409", "pairs of negative weight are not dispatched"),
    Broken(weights_the_larger_of_two, "fused"),
    Broken(places_before_the_first, "fused"),
    Broken(places_turned, "fused"),
    Broken(first_pair_alone, "R410", "aten::select is not known"),
)
