"""Layers that keep batch and positions apart: loops and dense layers on (B, S, D), ids (B, S, K) or (B, S).

B sequences, S positions, D model width, E experts, K experts per token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.loops import Case, D, Layer, maximum


class Apart(Layer):
    """(B, S, D) -> (B, S, D), never flattened but by the loop itself."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.case.route(self.gate(x), self.top_k)
        return self.loop(self, x, ids, weights)


def apart(case: Case) -> Apart:
    """The layer with weights that depend on nothing but the case."""
    torch.manual_seed(0)
    made = Apart(case)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.4)
    return made.eval().requires_grad_(False)


def argmax_apart(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Ids (B, S), weights (B, S): an argmax drops the dimension."""
    scores = logits.softmax(-1)
    return scores.max(dim=-1).values, scores.argmax(dim=-1)


def maximum_slot(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Ids (B, S, 1), weights (B, S, 1)."""
    weights, ids = logits.softmax(-1).max(dim=-1, keepdim=True)
    return weights, ids


# -- loops -----------------------------------------------------------------------------------------


def coordinates(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        b, s, k = torch.where(ids == e)
        out[b, s] += expert(x[b, s]) * w[b, s, k, None]
    return out


def coordinates_as_rows(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        at = (ids == e).nonzero()
        b, s, k = at[:, 0], at[:, 1], at[:, 2]
        out.index_put_((b, s), expert(x[b, s]) * w[b, s, k].unsqueeze(-1), accumulate=True)
    return out


def masks(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        mask = (ids == e).any(dim=-1)
        weight = (w * (ids == e)).sum(-1)[mask]
        out[mask] += expert(x[mask]) * weight.unsqueeze(-1)
    return out


def nano_moe(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """makeMoE: dense weights, rows flattened, masks flattened, results put back."""
    dense = torch.zeros_like(m.gate(x)).scatter(-1, ids, w)
    out = torch.zeros_like(x)
    flat_x, flat_weights = x.view(-1, x.size(-1)), dense.view(-1, dense.size(-1))
    for e, expert in enumerate(m.experts):
        mask = (ids == e).any(dim=-1)
        flat_mask = mask.view(-1)
        if flat_mask.any():
            y = expert(flat_x[flat_mask])
            scores = flat_weights[flat_mask, e].unsqueeze(1)
            out[mask] += (y * scores).squeeze(1)
    return out


def slot_by_slot(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for k in range(m.top_k):
        for e, expert in enumerate(m.experts):
            mask = ids[..., k] == e
            if mask.any():
                out[mask] += w[..., k][mask].unsqueeze(-1) * expert(x[mask])
    return out


def one_hots(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """One-hots (B, S, K, E) whose experts come first, flattened with the tokens."""
    hot = F.one_hot(ids, m.num_experts).view(-1, m.top_k, m.num_experts).permute(2, 1, 0)
    flat, weight = x.reshape(-1, D), w.reshape(-1, m.top_k)
    out = torch.zeros_like(flat)
    for e, expert in enumerate(m.experts):
        slot, tok = torch.where(hot[e])
        out.index_add_(0, tok, expert(flat[tok]) * weight[tok, slot, None])
    return out.reshape(x.shape)


def hot_coordinates(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    hot = F.one_hot(ids, m.num_experts)
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        b, s, k = hot[..., e].nonzero(as_tuple=True)
        out[b, s] = out[b, s] + expert(x[b, s]) * w[b, s, k][:, None]
    return out


def pairs_apart(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """Every pair has a row of (B, S, K, D)."""
    rows = torch.zeros(*ids.shape, D)
    for e, expert in enumerate(m.experts):
        b, s, k = torch.where(ids == e)
        rows[b, s, k] = expert(x[b, s])
    return (rows * w.unsqueeze(-1)).sum(-2)


# -- every expert sees every token -----------------------------------------------------------------


def every_token(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    dense = torch.zeros_like(m.gate(x)).scatter_(2, ids, w)
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        out += dense[..., e : e + 1] * expert(x)
    return out


def every_token_masked(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        out = out + ((ids == e) * w).sum(-1, keepdim=True) * expert(x)
    return out


def every_token_unbound(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    dense = (F.one_hot(ids, m.num_experts) * w.unsqueeze(-1)).sum(2)
    out = torch.zeros_like(x)
    for expert, weight in zip(m.experts, dense.unbind(-1), strict=True):
        out = out + expert(x) * weight.unsqueeze(-1)
    return out


def stacked(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    dense = torch.zeros_like(m.gate(x)).scatter(-1, ids, w)
    every = torch.stack([expert(x) for expert in m.experts], dim=2)
    return (every * dense.unsqueeze(-1)).sum(dim=2)


def stacked_first(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    dense = (F.one_hot(ids, m.num_experts).to(w.dtype) * w[..., None]).sum(dim=-2)
    every = torch.stack([expert(x) for expert in m.experts])
    return torch.einsum("bse,ebsd->bsd", dense, every)


def stacked_einsum(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    dense = torch.zeros_like(m.gate(x)).scatter(-1, ids, w)
    every = torch.stack([expert(x) for expert in m.experts], dim=-2)
    return torch.einsum("bse,bsed->bsd", dense, every)


def stacked_second(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    dense = torch.zeros_like(m.gate(x)).scatter(-1, ids, w)
    every = torch.stack([expert(x) for expert in m.experts], dim=1)
    return torch.einsum("besd,bse->bsd", every, dense)


def stacked_last(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    dense = torch.zeros_like(m.gate(x)).scatter(-1, ids, w)
    every = torch.stack([expert(x) for expert in m.experts], dim=-1)
    return torch.einsum("bse,bsde->bsd", dense, every)


def stacked_last_summed(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    dense = torch.zeros_like(m.gate(x)).scatter(-1, ids, w)
    every = torch.stack([expert(x) for expert in m.experts], dim=-1)
    return (every * dense.unsqueeze(-2)).sum(-1)


def stacked_gathered(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    every = torch.stack([expert(x) for expert in m.experts], dim=2)
    chosen = every.gather(2, ids.unsqueeze(-1).expand(-1, -1, -1, D))
    return (chosen * w.unsqueeze(-1)).sum(2)


def stacked_matmul(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    dense = torch.zeros_like(m.gate(x)).scatter(-1, ids, w)
    every = torch.stack([expert(x) for expert in m.experts], dim=2)
    return (dense.unsqueeze(2) @ every).squeeze(2)


# -- one id a token --------------------------------------------------------------------------------


def switch(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """Switch as transformers first wrote it: rows put where a mask over (B, S) says."""
    hot = F.one_hot(ids, m.num_experts).bool()
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        mask = hot[:, :, e]
        out[mask] = expert(x[mask])
    return out * w.unsqueeze(-1)


def switch_added(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        mask = ids == e
        out[mask] += expert(x[mask]) * w[mask].unsqueeze(-1)
    return out


def switch_coordinates(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.empty_like(x)
    for e, expert in enumerate(m.experts):
        b, s = torch.where(ids == e)
        out[b, s] = expert(x[b, s])
    return w.unsqueeze(-1) * out


def switch_flat(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """labml: indices of flat tokens, rows put there."""
    flat, routes = x.view(-1, D), ids.view(-1)
    out = torch.zeros_like(flat)
    for e, expert in enumerate(m.experts):
        at = torch.eq(routes, e).nonzero(as_tuple=True)[0]
        out[at, :] = expert(flat[at, :])
    return (out * w.view(-1, 1)).view(x.shape)


def switch_every_token(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    hot = F.one_hot(ids, m.num_experts) * w.unsqueeze(-1)
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        out = out + hot[..., e, None] * expert(x)
    return out


def switch_stacked(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    every = torch.stack([expert(x) for expert in m.experts], dim=2)
    return (every * (F.one_hot(ids, m.num_experts) * w.unsqueeze(-1)).unsqueeze(-1)).sum(2)


def switch_slot(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """The one slot keeps its dimension until the mask."""
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        mask = (ids == e).squeeze(-1)
        out[mask] = expert(x[mask]) * w[mask]
    return out


_TOP_ONE = (switch, switch_added, switch_coordinates, switch_flat, switch_every_token, switch_stacked)
CASES: tuple[Case, ...] = (
    *(Case(loop) for loop in (coordinates, coordinates_as_rows, masks, nano_moe, slot_by_slot, one_hots)),
    *(Case(loop) for loop in (hot_coordinates, pairs_apart)),
    *(Case(loop) for loop in (every_token, every_token_masked, every_token_unbound)),
    *(Case(loop) for loop in (stacked, stacked_first, stacked_einsum, stacked_second, stacked_last)),
    *(Case(loop) for loop in (stacked_last_summed, stacked_gathered, stacked_matmul)),
    *(Case(loop, route=argmax_apart, top_k=1) for loop in _TOP_ONE),
    *(Case(loop, route=maximum, top_k=1, name=f"{loop.__name__}_max") for loop in _TOP_ONE),
    Case(switch_slot, route=maximum_slot, top_k=1),
)
