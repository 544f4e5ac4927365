"""Loops over experts that look like a known one and compute something else.

Each takes (layer, x (T, D), ids (T, K), weights (T, K)) as the loops of `loops.py` do. Fused or not, the
program must compute what the loop computes, also with verification off.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.loops import Case, D, E, Layer, Loop, Merged, StackedParameters, SwiGLU, mixtral


def _weighed(m: Layer, e: int, x: Tensor, ids: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """(the tokens of an expert, its weighed rows)."""
    tok, slot = torch.where(ids == e)
    return tok, m.experts[e](x[tok]) * w[tok, slot, None]


# -- which experts ---------------------------------------------------------------------------------


def one_left_out(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e in (0, 1, 3):
        tok, y = _weighed(m, e, x, ids, w)
        out.index_add_(0, tok, y)
    return out


def last_left_out(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """Pairs of the last expert contribute nothing, as dropped ones do."""
    out = torch.zeros_like(x)
    for e in range(E - 1):
        tok, y = _weighed(m, e, x, ids, w)
        out.index_add_(0, tok, y)
    return out


def one_visited_twice(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e in (0, 1, 2, 3, 1):
        tok, y = _weighed(m, e, x, ids, w)
        out.index_add_(0, tok, y)
    return out


def first_visited_twice(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """The weights of all experts are at hand, the pairs of one contribute."""
    out = torch.zeros_like(x)
    for e in (0, 0):
        tok, y = _weighed(m, e, x, ids, w)
        out.index_add_(0, tok, y)
    return out


def first_twice_then_all(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e in (0, 0, 1, 2, 3):
        tok, y = _weighed(m, e, x, ids, w)
        out.index_add_(0, tok, y)
    return out


def backwards(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """The order of the visits does not matter."""
    out = torch.zeros_like(x)
    for e in reversed(range(E)):
        tok, y = _weighed(m, e, x, ids, w)
        out[tok] += y
    return out


def next_experts_weights(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """The rows of expert e meet the second matrix of expert e + 1."""
    out = torch.zeros_like(x)
    for e in range(E):
        tok, slot = torch.where(ids == e)
        gate, up = F.linear(x[tok], m.experts.gate_up[e]).chunk(2, dim=-1)
        y = F.linear(F.silu(gate) * up, m.experts.down[(e + 1) % E])
        out.index_add_(0, tok, y * w[tok, slot, None])
    return out


def next_expert(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """Ids are numbered from 1, experts from 0: another order of the same separate tensors."""
    out = torch.zeros_like(x)
    for e in range(E):
        tok, slot = torch.where(ids == e)
        out.index_add_(0, tok, m.experts[(e + 1) % E](x[tok]) * w[tok, slot, None])
    return out


def one_scaled(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e in range(E):
        tok, y = _weighed(m, e, x, ids, w)
        out.index_add_(0, tok, y * 2 if e == 2 else y)
    return out


def scaled_by_number(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e in range(E):
        tok, y = _weighed(m, e, x, ids, w)
        out.index_add_(0, tok, y * (e + 1))
    return out


class _GELU(SwiGLU):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.w2(F.gelu(self.w1(x)) * self.w3(x))
        return y


def _one_other(other: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.ModuleList([SwiGLU(), SwiGLU(), other(), SwiGLU()])


# -- which tokens, slots, weights ------------------------------------------------------------------


def mask_of_another(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """Rows read where one expert was chosen are added where another was, in sizes that agree by accident."""
    out = torch.zeros_like(x)
    for e in range(E):
        tok, slot = torch.where(ids == e)
        other, _ = torch.where(ids == (e + 1) % E)
        n = torch.minimum(torch.tensor(tok.shape[0]), torch.tensor(other.shape[0]))
        out.index_add_(0, other[: int(n)], (m.experts[e](x[tok]) * w[tok, slot, None])[: int(n)])
    return out


def added_elsewhere(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """The tokens of one routing are the places of another that is its mirror image."""
    out = torch.zeros_like(x)
    mirrored = ids.flip(0)
    for e in range(E):
        tok, y = _weighed(m, e, x, ids, w)
        out.index_add_(0, torch.where(mirrored == e)[0], y)
    return out


def put_elsewhere(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """Every token chooses every expert, so that all have as many rows."""
    out = torch.zeros_like(x)
    for e in range(E):
        out[torch.where(ids == (e + 1) % E)[0]] = _weighed(m, e, x, ids, w)[1]
    return out


def read_elsewhere(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    mirrored = ids.flip(0)
    for e in range(E):
        tok, slot = torch.where(ids == e)
        out.index_add_(0, tok, m.experts[e](x[torch.where(mirrored == e)[0]]) * w[tok, slot, None])
    return out


def other_slot(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """The weight of the token's other choice."""
    out = torch.zeros_like(x)
    for e in range(E):
        tok, slot = torch.where(ids == e)
        out.index_add_(0, tok, m.experts[e](x[tok]) * w[tok, 1 - slot, None])
    return out


def first_slot(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e in range(E):
        tok, _ = torch.where(ids == e)
        out.index_add_(0, tok, m.experts[e](x[tok]) * w[tok, 0, None])
    return out


def slots_numbered_as_experts(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """w[:, 0] is no column of expert 0."""
    out = torch.zeros_like(x)
    for e in range(E):
        tok, _ = torch.where(ids == e)
        out.index_add_(0, tok, m.experts[e](x[tok]) * w[:, e % w.shape[1]][tok, None])
    return out


def slots_crossed(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """Slot by slot, with the weights of the other slot."""
    out = torch.zeros_like(x)
    for k in range(2):
        for e in range(E):
            mask = ids[:, k] == e
            out[mask] += w[mask, 1 - k].unsqueeze(-1) * m.experts[e](x[mask])
    return out


def only_first_slot(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e in range(E):
        mask = ids[:, 0] == e
        out[mask] += w[mask, 0].unsqueeze(-1) * m.experts[e](x[mask])
    return out


def slots_differ(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """The second choice counts half."""
    out = torch.zeros_like(x)
    for k in range(2):
        for e in range(E):
            mask = ids[:, k] == e
            out[mask] += w[mask, k].unsqueeze(-1) * m.experts[e](x[mask]) / (k + 1)
    return out


def another_column(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    dense = torch.zeros_like(m.gate(x)).scatter_(1, ids, w)
    out = torch.zeros_like(x)
    for e in range(E):
        tok = (ids == e).any(-1).nonzero(as_tuple=True)[0]
        out[tok] += m.experts[e](x[tok]) * dense[tok, (e + 1) % E].unsqueeze(-1)
    return out


def weights_not_in_order(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """The mask lists pairs slot by slot, the tokens token by token."""
    out = torch.zeros_like(x)
    for e in range(E):
        rows = (ids == e).any(-1)
        weight = w.t()[ids.t() == e]
        out[rows] += m.experts[e](x[rows]) * weight.unsqueeze(-1)
    return out


def masked_by_others(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """The weights off the expert."""
    out = torch.zeros_like(x)
    for e in range(E):
        chosen = ids == e
        tok = chosen.any(-1).nonzero().squeeze(-1)
        weight = w.masked_fill(chosen, 0.0).sum(-1)
        out.index_add_(0, tok, weight[tok].unsqueeze(-1) * m.experts[e](x[tok]))
    return out


def filled_with_one(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e in range(E):
        chosen = ids == e
        tok = chosen.any(-1).nonzero().squeeze(-1)
        weight = w.masked_fill(~chosen, 1.0).sum(-1)
        out.index_add_(0, tok, weight[tok].unsqueeze(-1) * m.experts[e](x[tok]))
    return out


def not_chosen(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """Every expert works for the tokens that did not choose it."""
    out = torch.zeros_like(x)
    for e in range(E):
        mask = ~(ids == e).any(-1)
        out[mask] += m.experts[e](x[mask])
    return out


def transposed_coordinates(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """The slots where tokens belong."""
    out = torch.zeros_like(x)
    for e in range(E):
        tok, slot = torch.where(ids == e)
        out.index_add_(0, tok, m.experts[e](x[slot]) * w[tok, slot, None])
    return out


# -- ids -------------------------------------------------------------------------------------------


def repeated_ids(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """A token may choose an expert twice; += by index keeps one of its rows, index_add both."""
    out = torch.zeros_like(x)
    ids = ids // 2
    for e in range(E):
        tok, y = _weighed(m, e, x, ids, w)
        out[tok] += y
    return out


def repeated_ids_added(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    ids = ids // 2
    for e in range(E):
        tok, y = _weighed(m, e, x, ids, w)
        out.index_add_(0, tok, y)
    return out


def repeated_ids_masked(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    ids = ids % 2
    for e in range(E):
        mask = (ids == e).any(-1)
        weight = (w * (ids == e)).sum(-1)
        out[mask] += weight[mask].unsqueeze(-1) * m.experts[e](x[mask])
    return out


# -- how rows are put together ---------------------------------------------------------------------


def overwritten(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """The last expert of a token wins."""
    out = torch.zeros_like(x)
    for e in range(E):
        tok, y = _weighed(m, e, x, ids, w)
        out[tok] = y
    return out


def subtracted(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e in range(E):
        tok, y = _weighed(m, e, x, ids, w)
        out[tok] -= y
    return out


def alpha(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e in range(E):
        tok, y = _weighed(m, e, x, ids, w)
        out.index_add_(0, tok, y, alpha=2)
    return out


def from_ones(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.ones_like(x)
    for e in range(E):
        tok, y = _weighed(m, e, x, ids, w)
        out.index_add_(0, tok, y)
    return out


def decaying(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """What an expert adds counts less the earlier it is visited."""
    out = torch.zeros_like(x)
    for e in range(E):
        tok, y = _weighed(m, e, x, ids, w)
        out = (out * 0.9).index_add(0, tok, y)
    return out


def maximum_of_parts(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e in range(E):
        tok, y = _weighed(m, e, x, ids, w)
        out = torch.maximum(out, torch.zeros_like(x).index_add(0, tok, y))
    return out


def residual_within(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """Each expert reads what the experts before it have added."""
    out = x.clone()
    for e in range(E):
        tok, slot = torch.where(ids == e)
        out.index_add_(0, tok, m.experts[e](out[tok]) * w[tok, slot, None])
    return out


def input_changed(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out, x = torch.zeros_like(x), x.clone()
    for e in range(E):
        tok, y = _weighed(m, e, x, ids, w)
        out[tok] += y
        x.mul_(0.9)
    return out


def escapes(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """The sum of the first experts is read by somebody else, too."""
    out, half = torch.zeros_like(x), x
    for e in range(E):
        tok, y = _weighed(m, e, x, ids, w)
        out = out.index_add(0, tok, y)
        half = out.tanh() if e == 1 else half
    return out + half


def rows_twice(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e in range(E):
        tok, y = _weighed(m, e, x, ids, w)
        out[tok] += out[tok] + y
    return out


def parts_twice(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """Sums of different experts are added, one of them twice."""
    parts = [torch.zeros_like(x).index_add(0, *_weighed(m, e, x, ids, w)) for e in range(E)]
    return parts[0] + parts[1] + parts[2] + parts[3] + parts[1]


def two_sums(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """Half of the experts are summed apart from the others, and both halves added."""
    halves = [torch.zeros_like(x), torch.zeros_like(x)]
    for e in range(E):
        tok, y = _weighed(m, e, x, ids, w)
        halves[e % 2].index_add_(0, tok, y)
    return halves[0] + halves[1]


def two_sums_apart(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    halves = [torch.zeros_like(x), torch.zeros_like(x)]
    for e in range(E):
        tok, y = _weighed(m, e, x, ids, w)
        halves[e % 2].index_add_(0, tok, y)
    return halves[0].tanh() * halves[1]


# -- branches --------------------------------------------------------------------------------------


def else_matters(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """An expert without tokens adds something to all."""
    out = torch.zeros_like(x)
    for e in range(E):
        tok, y = _weighed(m, e, x, ids, w)
        if tok.numel() > 0:
            out.index_add_(0, tok, y)
        else:
            out += 1.0
    return out


def stops_at_the_first_empty(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e in reversed(range(E)):
        tok, y = _weighed(m, e, x, ids, w)
        if tok.numel() == 0:
            break
        out.index_add_(0, tok, y)
    return out


def counts_visits(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out, visits = torch.zeros_like(x), 0
    for e in torch.unique(ids).tolist():
        tok, y = _weighed(m, e, x, ids, w)
        out[tok] += y
        visits += 1
    return out / visits


def by_place_in_the_list(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """The i-th expert that was hit is not expert i."""
    out = torch.zeros_like(x)
    for i, e in enumerate(torch.unique(ids).tolist()):
        tok, slot = torch.where(ids == e)
        out[tok] += m.experts[i](x[tok]) * w[tok, slot, None]
    return out


def capacity(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """An expert takes its first two tokens."""
    out = torch.zeros_like(x)
    for e in range(E):
        tok, slot = torch.where(ids == e)
        tok, slot = tok[:2], slot[:2]
        out.index_add_(0, tok, m.experts[e](x[tok]) * w[tok, slot, None])
    return out


def over_the_batch(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """Each expert's rows are centred over its tokens."""
    out = torch.zeros_like(x)
    for e in range(E):
        tok, slot = torch.where(ids == e)
        y = m.experts[e](x[tok])
        out.index_add_(0, tok, (y - y.sum(0, keepdim=True)) * w[tok, slot, None])
    return out


# -- segments --------------------------------------------------------------------------------------


def _segments(
    m: Layer,
    x: Tensor,
    ids: Tensor,
    w: Tensor,
    counts: Callable[[Tensor], Tensor] = lambda flat: flat.bincount(minlength=E),
    late: int = 0,
    order: Callable[[list[Any]], list[Any]] = lambda parts: parts,
) -> Tensor:
    flat = ids.flatten()
    perm = flat.argsort()
    numbers = counts(flat).tolist()
    rows, start, parts = x[perm // ids.shape[1]], 0, []
    for e, n in enumerate(numbers):
        parts.append(m.experts[(e + late) % E](rows[start : start + n]))
        start += n
    y = torch.cat(order(parts)) * w.flatten()[perm].unsqueeze(-1)
    return torch.zeros_like(x).index_add(0, perm // ids.shape[1], y)


def segments_of_the_next(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """Each segment goes to the expert after its own."""
    return _segments(m, x, ids, w, late=1)


def segments_in_another_order(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    return _segments(m, x, ids, w, order=lambda parts: [parts[1], parts[0], *parts[2:]])


def last_segment_left_out(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    perm = ids.flatten().argsort()
    parts = x[perm // ids.shape[1]].split(ids.flatten().bincount(minlength=E).tolist())  # type: ignore[no-untyped-call]
    y = torch.cat([m.experts[e](part) for e, part in enumerate(parts[:-1])])
    at = perm[: y.shape[0]]
    return torch.zeros_like(x).index_add(0, at // ids.shape[1], y * w.flatten()[at].unsqueeze(-1))


def counts_of_other_ids(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """As many in all, of other experts."""
    return _segments(m, x, ids, w, counts=lambda flat: (E - 1 - flat).bincount(minlength=E))


def counts_turned(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    return _segments(m, x, ids, w, counts=lambda flat: flat.bincount(minlength=E).flip(0))


def sorted_by_other_ids(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    flat = ids.flatten()
    perm = (E - 1 - flat).argsort()
    parts = x[perm // ids.shape[1]].split(flat.bincount(minlength=E).tolist())  # type: ignore[no-untyped-call]
    y = torch.cat([m.experts[e](part) for e, part in enumerate(parts)])
    y = y * w.flatten()[perm].unsqueeze(-1)
    return torch.zeros_like(x).index_add(0, perm // ids.shape[1], y)


def segments_never_brought_back(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    perm = ids.flatten().argsort()
    parts = x[perm // ids.shape[1]].split(ids.flatten().bincount(minlength=E).tolist())  # type: ignore[no-untyped-call]
    y = torch.cat([m.experts[e](part) for e, part in enumerate(parts)])
    return (y.view(x.shape[0], ids.shape[1], D) * w.unsqueeze(-1)).sum(1)


# -- every expert for every token -------------------------------------------------------------------


def dense_reads_the_sum(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """Each expert reads what the experts before it have added."""
    out = x
    for e, expert in enumerate(m.experts):
        out = out + (w * (ids == e)).sum(-1, keepdim=True) * expert(out)
    return out


def dense_not_chosen(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        out = out + (w * (ids != e)).sum(-1, keepdim=True) * expert(x)
    return out


def dense_plus_one(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        out = out + (w * (ids == e)).sum(-1, keepdim=True) * expert(x) + 1.0
    return out


def dense_shifted_weight(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """The weight off the ids is not zero."""
    dense = torch.full_like(m.gate(x), 0.1).scatter(1, ids, w)
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        out = out + dense[:, e : e + 1] * expert(x) + dense[:, e].unsqueeze(-1) * expert(x)
    return out


def dense_filled(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    dense = torch.full_like(m.gate(x), 0.1).scatter(1, ids, w)
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        out = out + dense[:, e].unsqueeze(-1) * expert(x)
    return out


def dense_twice(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e in (0, 1, 2, 3, 0):
        out = out + (w * (ids == e)).sum(-1, keepdim=True) * m.experts[e](x)
    return out


def dense_first_twice_then_all(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e in (0, 0, 1, 2, 3):
        out = out + (w * (ids == e)).sum(-1, keepdim=True) * m.experts[e](x)
    return out


def dense_other_inputs(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """The last expert reads the input scaled."""
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        read = x * 2 if e == E - 1 else x
        out = out + (w * (ids == e)).sum(-1, keepdim=True) * expert(read)
    return out


def dense_over_the_batch(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """Each expert's rows are centred over all tokens."""
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        y = expert(x)
        out = out + (w * (ids == e)).sum(-1, keepdim=True) * (y - y.mean(0, keepdim=True))
    return out


def dense_two_weights(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """Expert 0's weight is squared."""
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        weight = w * w if e == 0 else w
        out = out + (weight * (ids == e)).sum(-1, keepdim=True) * expert(x)
    return out


def stacked_backwards(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """Experts stacked back to front, read at ids counted from the end."""
    every = torch.stack([m.experts[e](x) for e in reversed(range(E))], dim=1)
    chosen = every.gather(1, (E - 1 - ids).unsqueeze(-1).expand(-1, -1, D))
    return (chosen * w.unsqueeze(-1)).sum(1)


def stacked_then_mixed(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """The dense weights are those of the experts back to front."""
    dense = torch.zeros_like(m.gate(x)).scatter(1, ids, w)
    every = torch.stack([expert(x) for expert in m.experts], dim=1)
    return (every * dense.flip(1).unsqueeze(-1)).sum(1)


def einsum_turned(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """Tokens and experts of the dense weights change places where they are as many."""
    dense = torch.zeros_like(m.gate(x)).scatter(1, ids, w)
    every = torch.stack([expert(x[:E]) for expert in m.experts])
    return torch.einsum("et,etd->td", dense[:E], every).sum(0) + x


# -- coordinates ------------------------------------------------------------------------------------


def coordinates_swapped(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e in range(E):
        slot, tok = (ids == e).nonzero().unbind(-1)
        out.index_add_(0, tok, m.experts[e](x[tok]) * w[slot, tok, None])
    return out


def spread_elsewhere(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e in range(E):
        tok, y = _weighed(m, e, x, ids, w)
        out.scatter_add_(0, tok.flip(0).unsqueeze(-1).expand(-1, D), y)
    return out


def spread_maximum(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e in range(E):
        tok, y = _weighed(m, e, x, ids, w)
        out.scatter_reduce_(0, tok.unsqueeze(-1).expand(-1, D), y, reduce="amax")
    return out


def numbered_from_one(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """The one-hot by comparing starts at 1: id 0 has no place in it."""
    out = torch.zeros_like(x)
    hot = ids.unsqueeze(-1) == torch.arange(1, E + 1)
    for e in range(E):
        tok, slot = torch.where(hot[..., e])
        out.index_add_(0, tok, m.experts[e](x[tok]) * w[tok, slot, None])
    return out


def weighed_by_the_other(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """One row a pair, its weight the other pair's."""
    y = torch.zeros(x.shape[0], 2, D)
    for e in range(E):
        tok, slot = torch.where(ids == e)
        y[tok, slot] = m.experts[e](x[tok])
    return torch.einsum("tkd,tk->td", y, w.flip(1))


def written_to_the_other(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """One row a pair, written where the other pair's belongs."""
    y = torch.zeros(x.shape[0], 2, D)
    for e in range(E):
        tok, slot = torch.where(ids == e)
        y[tok, 1 - slot] = m.experts[e](x[tok])
    return (y * w.unsqueeze(-1)).sum(1)


def pairs_left_out(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """Pairs of the last expert keep what was there."""
    y = torch.ones(x.shape[0], 2, D)
    for e in range(E - 1):
        tok, slot = torch.where(ids == e)
        y[tok, slot] = m.experts[e](x[tok])
    return (y * w.unsqueeze(-1)).sum(1)


# -- top-1 -----------------------------------------------------------------------------------------


def top_one_on_residual(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """Every token is overwritten: what it held before does not matter."""
    out = x.clone()
    for e in range(E):
        mask = ids == e
        out[mask] = m.experts[e](x[mask])
    return out * w.unsqueeze(-1)


def top_one_some_kept(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """Tokens of the last expert keep what they hold."""
    out = x.clone()
    for e in range(E - 1):
        mask = ids == e
        out[mask] = m.experts[e](x[mask])
    return out * w.unsqueeze(-1)


def top_one_read_between(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e in range(E):
        mask = ids == e
        out[mask] = m.experts[e](x[mask] + out[mask])
    return out * w.unsqueeze(-1) + out.sum(0)


@dataclass(frozen=True)
class Lookalike:
    """A case and what becomes of it: "fused", "CaptureError", "unlisted", or a refusal's code and words."""

    case: Case
    becomes: str
    because: str = ""

    def __str__(self) -> str:
        return str(self.case)


def _of(loop: Loop, becomes: str, because: str = "", **changes: Any) -> Lookalike:
    return Lookalike(replace(Case(loop), **changes), becomes, because)


_TOP_ONE: dict[str, Any] = {"route": lambda logits, k: logits.softmax(-1).max(dim=-1)}

LOOKALIKES: tuple[Lookalike, ...] = (
    _of(one_left_out, "R307", "expert 2 is left out of a loop that visits expert 3"),
    _of(last_left_out, "fused"),
    _of(one_visited_twice, "fused"),
    _of(last_left_out, "fused", experts=StackedParameters, name="last_left_out_stacked"),
    _of(first_visited_twice, "fused", experts=StackedParameters),
    _of(first_twice_then_all, "R307", "the rows of expert 0 are added twice"),
    _of(put_elsewhere, "R402", "put where those of expert 1 belong", top_k=E),
    _of(dense_first_twice_then_all, "R307", "added twice"),
    _of(last_segment_left_out, "R307", "3 experts' rows are put together, there may be more"),
    _of(backwards, "fused"),
    _of(
        next_experts_weights,
        "R302",
        "the rows of expert 0 meet the weights of expert 1",
        experts=StackedParameters,
    ),
    _of(next_expert, "fused"),
    _of(
        next_expert,
        "R302",
        "the rows of expert 0 meet the weights of expert 1",
        experts=StackedParameters,
        name="next_expert_stacked",
    ),
    _of(one_scaled, "R308", "expert 2 computes mul, expert 0 computes linear"),
    _of(scaled_by_number, "R308", "expert 1 uses 2, expert 0 uses 1"),
    _of(
        mixtral,
        "R308",
        "expert 2 computes gelu",
        experts=_one_other(_GELU),
        name="another_activation",
    ),
    _of(
        mixtral,
        "R308",
        "a weight of expert 2 is 5x8",
        experts=_one_other(lambda: SwiGLU(5)),
        name="another_size",
    ),
    _of(
        mixtral,
        "R308",
        "expert 2 computes slice",
        experts=_one_other(Merged),
        name="another_structure",
    ),
    _of(mask_of_another, "R301", "aten::narrow is not known on the rows of expert 0"),
    _of(added_elsewhere, "R402", "the rows of expert 0 are added at the tokens that other"),
    _of(read_elsewhere, "R301", "aten::mul is not known on the rows of expert 0"),
    _of(other_slot, "R410", "aten::rsub is not known on routing values"),
    _of(first_slot, "R308", "reads %"),
    _of(slots_numbered_as_experts, "R308", "reads %"),
    _of(slots_crossed, "R410", "aten::index is not known on routing values"),
    _of(only_first_slot, "R307", "slot 1 is left out for expert 0"),
    _of(slots_differ, "R308", "expert 0 computes something else in slot 1 than in slot 0"),
    _of(another_column, "R410", "aten::index is not known on routing values"),
    _of(weights_not_in_order, "R301", "aten::mul is not known on the rows of expert 0"),
    _of(masked_by_others, "R410", "aten::masked_fill is not known on routing values"),
    _of(filled_with_one, "R410", "aten::masked_fill is not known on routing values"),
    _of(not_chosen, "R410", "where a token did not choose expert 0"),
    _of(transposed_coordinates, "R410", "the slots in which tokens chose expert 0"),
    _of(repeated_ids, "R404", "the ids may repeat within a token: they are no top-k"),
    _of(repeated_ids_added, "fused"),
    _of(repeated_ids_masked, "R404", "the ids may repeat within a token: they are no top-k"),
    _of(overwritten, "R407", "the rows of expert 1 replace what their tokens held,"),
    _of(subtracted, "R407", "the rows of expert 1 replace what their tokens held,"),
    _of(alpha, "R301", "aten::index_add is not known on the rows of expert 0"),
    _of(from_ones, "fused"),
    _of(decaying, "R307", "the rows of expert 1 are not in the sum that the others'"),
    _of(maximum_of_parts, "R307", "the rows of expert 1 are not in the sum that the others'"),
    _of(residual_within, "R308", "reads %"),
    _of(input_changed, "R308", "reads %"),
    _of(escapes, "fused"),
    _of(rows_twice, "R407", "the rows of expert 1 replace what their tokens held,"),
    _of(parts_twice, "fused"),
    _of(two_sums, "fused"),
    _of(two_sums_apart, "R307", "the rows of expert 1 are not in the sum that the others'"),
    _of(else_matters, "CaptureError"),
    _of(stops_at_the_first_empty, "CaptureError"),
    _of(counts_visits, "CaptureError"),
    _of(by_place_in_the_list, "CaptureError"),
    _of(capacity, "R410", "aten::slice is not known on routing values: the tokens that"),
    _of(over_the_batch, "R301", "aten::sum is not known on the rows of expert 0"),
    _of(segments_of_the_next, "fused"),
    _of(
        segments_of_the_next,
        "R302",
        "the rows of expert 0 meet the weights of expert 1",
        experts=StackedParameters,
        name="segments_of_the_next_stacked",
    ),
    _of(segments_in_another_order, "R301", "aten::cat is not known on the rows of expert 1 and the"),
    _of(counts_of_other_ids, "R301", "aten::narrow is not known on pairs sorted by expert"),
    _of(counts_turned, "R410", "aten::flip is not known on routing values: how many pairs"),
    _of(sorted_by_other_ids, "R403", "tokens are gathered at pair // 2, each token has 1 ids"),
    _of(segments_never_brought_back, "R402", "rows sorted by expert are split as if they were in their"),
    _of(dense_reads_the_sum, "R303", "the experts do not apply the same operators to one value"),
    _of(dense_not_chosen, "R410", "where a token and slot did not choose expert 0"),
    _of(dense_plus_one, "R307", "the rows of expert 1 are not in the sum that the others'"),
    _of(dense_shifted_weight, "R410", "a number a token, where it chose expert 0: w"),
    _of(dense_filled, "R410", "a number a token, where it chose expert 0: w"),
    _of(dense_twice, "fused"),
    _of(dense_other_inputs, "R303", "the experts do not apply the same operators to one value"),
    _of(dense_over_the_batch, "R301", "what the experts compute leaves the known term language"),
    _of(dense_two_weights, "R308", "the experts' rows are weighed by different weights"),
    _of(stacked_backwards, "fused"),
    _of(stacked_then_mixed, "unlisted"),
    _of(einsum_turned, "R410", "aten::slice is not known on routing values"),
    _of(coordinates_swapped, "R410", "the slots in which tokens chose expert 0"),
    _of(spread_elsewhere, "R410", "aten::flip is not known on routing values"),
    _of(spread_maximum, "R301", "aten::scatter_reduce is not known on the rows of expert 0"),
    _of(numbered_from_one, "R407", "first used by aten.eq.Tensor"),
    _of(weighed_by_the_other, "fused"),
    _of(written_to_the_other, "R410", "aten::rsub is not known on routing values"),
    _of(pairs_left_out, "R307", "only rows of expert 0 and 1 and 2 are written, others can"),
    _of(top_one_on_residual, "fused", **_TOP_ONE),
    _of(top_one_some_kept, "R307", "only rows of expert 0 and 1 and 2 are written, others can", **_TOP_ONE),
    _of(top_one_read_between, "R307", "only rows of expert 0 are written, others can be chosen", **_TOP_ONE),
)
