"""What only looks like one of the spellings of wild_spellings.py or apart.py: each must run as eager.

T tokens, D model width, E experts, K experts per token; B sequences of S positions where they are apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.passes.apart import Apart, apart, argmax_apart
from tests.passes.loops import Case, D, Layer, argmax_flat, layer, maximum
from tests.passes.wild_spellings import Einsums, EinsumsTransposed


@dataclass(frozen=True)
class Lookalike:
    """A spelling with one thing changed; whether its layers keep batch and positions apart, and whether what
    was changed lies behind the experts, which fuse.
    """

    case: Case
    apart: bool = False
    fuses: bool = False

    def __str__(self) -> str:
        return str(self.case)

    def made(self) -> Layer | Apart:
        """The layer."""
        return apart(self.case) if self.apart else layer(self.case)


# -- batch and positions -----------------------------------------------------------------------------


def positions_turned(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """Rows are taken at (s, b) of the transposed, and put at (b, s) as if that were one place."""
    out = torch.zeros_like(x)
    other = x.roll(1, dims=1)
    for e, expert in enumerate(m.experts):
        b, s, k = torch.where(ids == e)
        out[b, s] += expert(other[b, b.minimum(s)]) * w[b, s, k, None]
    return out


def summed_over_positions(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """One id a token: what is summed is positions, no slots."""
    rows = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        mask = ids == e
        rows[mask] = expert(x[mask])
    return (rows * w.unsqueeze(-1)).sum(1, keepdim=True).expand_as(x)


def slots_as_positions(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """Gathered matrices of (B, S) ids, summed over S."""
    h = F.gelu(torch.einsum("bsd,bsdf->bsf", x, m.experts.w_in[ids]))
    y = torch.einsum("bsf,bsfd->bsd", h, m.experts.w_out[ids])
    return x + torch.einsum("bs,bsd->bd", w, y).unsqueeze(1)


def masks_of_another_batch(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """Each sequence is routed as the next one is."""
    out = torch.zeros_like(x)
    turned = ids.flip(0)
    for e, expert in enumerate(m.experts):
        mask = (turned == e).any(-1)
        weight = (w * (ids == e)).sum(-1)[mask]
        out[mask] += expert(x[mask]) * weight.unsqueeze(-1)
    return out


def stacked_elsewhere(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """The weights of (B, S, E) meet the experts of (B, E, S, D) at S = E."""
    dense = torch.zeros_like(m.gate(x)).scatter(-1, ids, w)
    every = torch.stack([expert(x) for expert in m.experts], dim=1)
    return (every * dense.transpose(1, 2).unsqueeze(-1).flip(1)).sum(1)


def kept_where_dropped(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """Rows written over x, of which half the tokens keep their own."""
    out = x.clone()
    some = torch.where(ids > 1, ids, -1)
    for e, expert in enumerate(m.experts):
        mask = some == e
        out[mask] = expert(x[mask])
    return out * w.unsqueeze(-1)


# -- gathered weights --------------------------------------------------------------------------------


def einsum_of_another_token(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    h = F.silu(torch.einsum("ti,taoi->tao", x.flip(0), m.experts.w1[ids]))
    up = torch.einsum("ti,taoi->tao", x, m.experts.w3[ids])
    return torch.einsum("tai,ta->ti", torch.einsum("tao,taio->tai", h * up, m.experts.w2[ids]), w)


def einsum_of_other_slots(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """The last matrices are those of the other slot's expert."""
    h = F.silu(torch.einsum("ti,taoi->tao", x, m.experts.w1[ids]))
    up = torch.einsum("ti,taoi->tao", x, m.experts.w3[ids])
    return torch.einsum("tai,ta->ti", torch.einsum("tao,taio->tai", h * up, m.experts.w2[ids.flip(1)]), w)


def einsum_summed_too_early(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """The slots are summed before the last product."""
    h = F.gelu(torch.einsum("td,tkdf->tkf", x, m.experts.w_in[ids]))
    return torch.einsum("tkf,tkfd,tk->td", h.sum(1, keepdim=True).expand_as(h), m.experts.w_out[ids], w)


def broadcast_first_token(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """All tokens' matrices meet the first token."""
    h = F.gelu(x[:1, None, None, :] @ m.experts.w_in[ids])
    y: Tensor = (h @ m.experts.w_out[ids]).squeeze(-2) * w[..., None]
    return y.sum(1)


def _one_slot(m: Layer, x: Tensor, ids: Tensor) -> Tensor:
    h = F.gelu(torch.bmm(x.unsqueeze(1), m.experts.w_in[ids]))
    return torch.bmm(h, m.experts.w_out[ids]).squeeze(1)


def slots_weighed_crosswise(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for k in range(m.top_k):
        out = out + _one_slot(m, x, ids[:, k]) * w[:, m.top_k - 1 - k, None]
    return out


def slots_weighed_alike(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """Every slot has the first one's weight."""
    out = torch.zeros_like(x)
    for k in range(m.top_k):
        out = out + _one_slot(m, x, ids[:, k]) * w[:, :1]
    return out


def slots_unlike(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """The first choice's rows count twice."""
    out = torch.zeros_like(x)
    for k in range(m.top_k):
        y = _one_slot(m, x, ids[:, k])
        out = out + (y if k else y * 2) * w[:, k, None]
    return out


def slots_of_wider_weights(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """The weights are the first K columns of more."""
    out, more = torch.zeros_like(x), m.gate(x).softmax(-1)
    for k in range(m.top_k):
        out = out + _one_slot(m, x, ids[:, k]) * more[:, k, None]
    return out


def slot_added_twice(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    first = _one_slot(m, x, ids[:, 0]) * w[:, 0, None]
    return torch.zeros_like(x) + first + first


def sorted_beside_unsorted(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """The matrices are those of the sorted ids, the tokens in their own order."""
    values, order = ids.sort()
    h = F.gelu(torch.bmm(x.unsqueeze(1), m.experts.w_in[values]))
    y = torch.bmm(h, m.experts.w_out[values]).squeeze(1) * w[order][:, None]
    return torch.zeros_like(x).index_add(0, order, y)


# -- every expert sees every token --------------------------------------------------------------------


def softmax_of_filled(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """What was not chosen is -1 before the softmax, so every expert has a weight."""
    logits = m.gate(x)
    dense = torch.full_like(logits, -1.0).scatter(-1, ids, logits.gather(1, ids)).softmax(-1)
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        out = out + dense[:, e, None] * expert(x)
    return out


def softmax_of_experts(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """The softmax runs over the tokens."""
    logits = m.gate(x)
    dense = torch.full_like(logits, float("-inf")).scatter(-1, ids, logits.gather(1, ids)).softmax(0)
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        out = out + dense[:, e, None].nan_to_num() * expert(x)
    return out


def where_else(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """Where the token did not choose the expert it has its own features."""
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        out = out + torch.where((ids == e).unsqueeze(-1), expert(x), x)
    return out * w.unsqueeze(-1)


def where_of_another(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """A sum is kept where the token chose another expert."""
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        weight = (w * (ids == e)).sum(-1, keepdim=True)
        chose = (ids == (e + 1) % m.num_experts).any(-1, keepdim=True)
        out = torch.where(chose, out + weight * expert(x), out)
    return out


def where_with_residual(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """The first expert's tokens alone have the residual."""
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        weight = (w * (ids == e)).sum(-1, keepdim=True)
        chose = (ids == e).any(-1, keepdim=True)
        more = out + weight * expert(x) + x if e == 0 else out + weight * expert(x)
        out = torch.where(chose, more, out)
    return out


def stacked_of_other_tokens(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """Rows of the stack are taken back to front."""
    every = torch.stack([expert(x) for expert in m.experts], dim=1)
    numbers = torch.arange(x.shape[0]).flip(0).unsqueeze(1)
    return (every[numbers, ids] * w.unsqueeze(-1)).sum(dim=1)


def stacked_at_constants(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """(T, D, E) weighed along D."""
    dense = torch.zeros(x.shape[0], D).scatter(1, ids, w)
    every = torch.stack([expert(x) for expert in m.experts], dim=-1)
    return (every * dense.unsqueeze(-1)).sum(-1)


def chosen_twice(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """A token whose slots may hold one expert counts it once."""
    first = torch.cat([ids[:, :1], m.gate(x.roll(1, 0)).argmax(-1, keepdim=True)], dim=-1)
    chosen = torch.zeros(x.shape[0], m.num_experts, dtype=torch.int64).scatter(1, first, 1)
    dense = m.gate(x).sigmoid() * chosen
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        out = out + dense[:, e, None] * expert(x)
    return out


def gates_below_zero(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """Rows of all tokens that the expert does not have."""
    gates = torch.zeros_like(m.gate(x)).scatter(1, ids, w)
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        mask = gates[:, e] <= 0
        out[mask] += expert(x[mask])
    return out


def gates_above_a_half(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    gates = torch.zeros_like(m.gate(x)).scatter(1, ids, w)
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        mask = gates[:, e] > 0.5
        out[mask] += gates[mask, e].unsqueeze(1) * expert(x[mask])
    return out


def filled_gates_above_zero(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """What was not chosen weighs 1."""
    gates = torch.ones_like(m.gate(x)).scatter(1, ids, w - 0.5)
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        mask = gates[:, e] > 0
        out[mask] += gates[mask, e].unsqueeze(1) * expert(x[mask])
    return out


def two_numbers_a_token(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """Two ids a token, and the sum multiplied by the first one's weight alone, inside of where."""
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        mask = (ids == e).any(-1, keepdim=True)
        out = out + torch.where(mask, expert(x) * w[:, :1], 0.0)
    return out


# -- rows put -------------------------------------------------------------------------------------------


def put_over_another_slot(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """The second slot's rows replace the first one's."""
    out = torch.zeros_like(x)
    for k in range(m.top_k):
        for e, expert in enumerate(m.experts):
            mask = ids[:, k] == e
            out[mask] = w[mask, k, None] * expert(x[mask])
    return out


def scattered_over_features(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        mask = (ids == e).any(-1)
        weight = (w * (ids == e)).sum(-1)
        y = expert(x[mask]) * weight[mask].unsqueeze(-1)
        out = out + x.masked_scatter(mask.unsqueeze(-1), y)
    return out


def copied_elsewhere(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """Rows are copied to the places of the next expert's tokens, as far as both have some."""
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        at = torch.nonzero(ids == e).flatten()
        out.index_copy_(0, (at + 1) % x.shape[0], expert(x.index_select(0, at)))
    return out * w[:, None]


def tokens_of_three(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """The tokens' numbers are repeated once too often for the pairs."""
    flat_ids, weight = ids.flatten(), w.flatten()
    order = flat_ids.argsort(stable=True)
    token = torch.arange(x.shape[0]).repeat_interleave(m.top_k + 1)[order]
    sizes = flat_ids.bincount(minlength=m.num_experts).tolist()
    y = torch.cat([m.experts[e](part) for e, part in enumerate(torch.split(x[token], sizes, dim=0))], 0)
    return torch.zeros_like(x).index_add(0, token, y * weight[order][:, None])


def scaled_by_another(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """The sum so far is scaled while experts are still added."""
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        mask = ids == e
        out = out.index_put((mask,), expert(x[mask])) * w.unsqueeze(-1)
    return out


LOOKALIKES: tuple[Lookalike, ...] = (
    *(Lookalike(Case(loop), apart=True) for loop in (positions_turned, masks_of_another_batch)),
    Lookalike(Case(summed_over_positions, route=argmax_apart, top_k=1), apart=True, fuses=True),
    Lookalike(Case(slots_as_positions, EinsumsTransposed, argmax_apart, top_k=1), apart=True),
    Lookalike(Case(stacked_elsewhere), apart=True),
    Lookalike(Case(kept_where_dropped, route=argmax_apart, top_k=1), apart=True),
    *(Lookalike(Case(loop, Einsums)) for loop in (einsum_of_another_token, einsum_of_other_slots)),
    *(Lookalike(Case(loop, EinsumsTransposed)) for loop in (einsum_summed_too_early, broadcast_first_token)),
    *(Lookalike(Case(loop, EinsumsTransposed)) for loop in (slots_weighed_crosswise, slots_weighed_alike)),
    *(Lookalike(Case(loop, EinsumsTransposed)) for loop in (slots_of_wider_weights, slot_added_twice)),
    Lookalike(Case(slots_unlike, EinsumsTransposed)),
    Lookalike(Case(sorted_beside_unsorted, EinsumsTransposed, maximum, top_k=1)),
    *(Lookalike(Case(loop)) for loop in (gates_below_zero, gates_above_a_half, filled_gates_above_zero)),
    *(Lookalike(Case(loop)) for loop in (softmax_of_filled, softmax_of_experts, chosen_twice)),
    Lookalike(Case(where_else, route=argmax_flat, top_k=1)),
    *(Lookalike(Case(loop)) for loop in (where_of_another, where_with_residual, two_numbers_a_token)),
    *(Lookalike(Case(loop)) for loop in (stacked_of_other_tokens, put_over_another_slot)),
    *(Lookalike(Case(loop)) for loop in (scattered_over_features, tokens_of_three)),
    Lookalike(Case(copied_elsewhere, route=maximum, top_k=1)),
    Lookalike(Case(scaled_by_another, route=maximum, top_k=1)),
)
