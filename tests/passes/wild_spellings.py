"""MoE layers as code outside of libraries writes them, each a small function over the same layer.

T tokens, D model width, F expert hidden width, E experts, K experts per token. Each takes (layer, x (T, D),
ids (T, K), weights (T, K)) and returns (T, D); `apart` says of those that take and return (B, S, D).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.loops import (
    F_,
    Case,
    D,
    E,
    FlatParameters,
    Layer,
    StackedParameters,
    argmax_flat,
    maximum,
    top_k_softmax,
)


class Einsums(nn.Module):
    """(E, F, D), (E, D, F) and (E, F, D): three matrices an expert, read by einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Parameter(torch.empty(E, F_, D)), nn.Parameter(torch.empty(E, F_, D))
        self.w2 = nn.Parameter(torch.empty(E, D, F_))


class EinsumsTransposed(nn.Module):
    """(E, D, F) and (E, F, D)."""

    def __init__(self) -> None:
        super().__init__()
        self.w_in, self.w_out = nn.Parameter(torch.empty(E, D, F_)), nn.Parameter(torch.empty(E, F_, D))


# -- ids of another kind -------------------------------------------------------------------------------


def chosen_or_not(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """A mask over all experts read as ids: expert 1 where a token chose the expert, else expert 0."""
    chosen = F.one_hot(ids[:, 0], E) * (x[:, :1] > 0)
    hits = F.one_hot(chosen, E).permute(2, 1, 0)
    scores = m.gate(x).softmax(-1)
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        slots, tokens = torch.where(hits[e])
        out.index_add_(0, tokens, expert(x[tokens]) * scores[tokens, slots, None])
    return out


# -- weights gathered by ids -----------------------------------------------------------------------


def gpt_fast(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    w1, w3, w2 = m.experts.w1[ids], m.experts.w3[ids], m.experts.w2[ids]
    x1 = F.silu(torch.einsum("ti,taoi -> tao", x, w1))
    x3 = torch.einsum("ti, taoi -> tao", x, w3)
    outs = torch.einsum("tao, taio -> tai", x1 * x3, w2)
    y: Tensor = torch.einsum("tai,ta -> ti", outs, w)
    return y


def gathered_einsum_apart(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """The same at (B, S, D), matrices the other way round."""
    h = F.gelu(torch.einsum("bsd,bskdf->bskf", x, m.experts.w_in[ids]))
    y = torch.einsum("bskf,bskfd->bskd", h, m.experts.w_out[ids])
    return (y * w.unsqueeze(-1)).sum(dim=2)


def gathered_matmul(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """One token for all of its K matrices, by broadcasting."""
    h = F.gelu(x[:, None, None, :] @ m.experts.w_in[ids])
    y: Tensor = (h @ m.experts.w_out[ids]).squeeze(-2) * w[..., None]
    return y.sum(1)


def gathered_columns(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    h = torch.matmul(m.experts.w1[ids], x.unsqueeze(1).unsqueeze(-1)).squeeze(-1)
    up = torch.matmul(m.experts.w3[ids], x.unsqueeze(1).unsqueeze(-1)).squeeze(-1)
    y = torch.matmul(m.experts.w2[ids], (F.silu(h) * up).unsqueeze(-1)).squeeze(-1)
    return torch.einsum("tk,tkd->td", w, y)


def gathered_by_slot(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """K separate passes, one a slot."""
    out = torch.zeros_like(x)
    for k in range(m.top_k):
        at = ids[:, k]
        h = F.gelu(torch.bmm(x.unsqueeze(1), m.experts.w_in[at]))
        out = out + torch.bmm(h, m.experts.w_out[at]).squeeze(1) * w[:, k : k + 1]
    return out


# -- all experts, then the weights -----------------------------------------------------------------


def all_by_einsum(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    dense = torch.zeros_like(m.gate(x)).scatter(1, ids, w)
    h = F.silu(torch.einsum("td,efd->tef", x, m.experts.w1)) * torch.einsum("td,efd->tef", x, m.experts.w3)
    y = torch.einsum("tef,edf->ted", h, m.experts.w2)
    return torch.einsum("ted,te->td", y, dense)


def all_by_einsum_apart(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    dense = torch.zeros_like(m.gate(x)).scatter(-1, ids, w)
    h = F.gelu(torch.einsum("bsd,edf->bsef", x, m.experts.w_in))
    y = torch.einsum("bsef,efd->bsed", h, m.experts.w_out)
    return (y * dense.unsqueeze(-1)).sum(-2)


def softmax_of_scattered(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """makeMoE: the logits that were not chosen become -inf before the softmax."""
    logits = m.gate(x)
    top, at = logits.topk(m.top_k, dim=-1)
    dense = torch.full_like(logits, float("-inf")).scatter(-1, at, top).softmax(dim=-1)
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        mask = (at == e).any(dim=-1)
        if mask.any():
            out[mask] += (expert(x[mask]) * dense[mask, e].unsqueeze(1)).squeeze(1)
    return out


def softmax_before_all(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """The same weights, and every expert on every token."""
    logits = m.gate(x)
    top, at = logits.topk(m.top_k, dim=-1)
    dense = torch.full_like(logits, float("-inf")).scatter(-1, at, top).softmax(dim=-1)
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        out = out + dense[:, e, None] * expert(x)
    return out


def top_one_by_einsum(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    every = torch.stack([expert(x) for expert in m.experts])
    return torch.einsum("te,etd->td", F.one_hot(ids, m.num_experts) * w[:, None], every)


def top_one_stacked(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    every = torch.stack([expert(x) for expert in m.experts], dim=1)
    gate = F.one_hot(ids, m.num_experts).to(w.dtype) * w.unsqueeze(1)
    return (every * gate.unsqueeze(-1)).sum(1)


def dropped_by_einsum(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """Half of the tokens have no expert: no number from 0 is -1."""
    some = torch.where(ids > 1, ids, -1)
    hot = (some.unsqueeze(-1) == torch.arange(m.num_experts)).to(w.dtype)
    every = torch.stack([expert(x) for expert in m.experts])
    return torch.einsum("te,etd->td", hot * w[:, None], every)


def concatenated(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    dense = torch.zeros_like(m.gate(x)).scatter(1, ids, w)
    every = torch.cat([expert(x).unsqueeze(1) for expert in m.experts], dim=1)
    return (dense.unsqueeze(-1) * every).sum(1)


def stacked_last(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    dense = torch.zeros_like(m.gate(x)).scatter(1, ids, w)
    every = torch.stack([expert(x) for expert in m.experts], dim=2)
    return torch.sum(every * dense.unsqueeze(1).expand_as(every), dim=2)


def stacked_times_column(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    dense = torch.zeros_like(m.gate(x)).scatter(1, ids, w)
    every = torch.stack([expert(x) for expert in m.experts], dim=-1)
    return (every @ dense.unsqueeze(-1)).squeeze(-1)


def row_times_stacked(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    dense = torch.zeros_like(m.gate(x)).scatter(1, ids, w)
    every = torch.stack([expert(x) for expert in m.experts], dim=1)
    return torch.bmm(dense.unsqueeze(1), every).squeeze(1)


def stacked_indexed(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    every = torch.stack([expert(x) for expert in m.experts], dim=1)
    chosen = every[torch.arange(x.shape[0]).unsqueeze(1), ids]
    return (chosen * w.unsqueeze(-1)).sum(dim=1)


def stacked_first_indexed(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    every = torch.stack([expert(x) for expert in m.experts])
    chosen = every[ids, torch.arange(x.shape[0])[:, None]]
    return torch.einsum("tkd,tk->td", chosen, w)


def summed(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """Python's sum, which starts from the number 0."""
    dense = (F.one_hot(ids, m.num_experts) * w[..., None]).sum(1)
    found = sum(dense[:, e, None] * expert(x) for e, expert in enumerate(m.experts))
    assert isinstance(found, Tensor)
    return found


def where_added(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        mask = ids == e
        out = out + torch.where(mask.unsqueeze(-1), expert(x), 0.0)
    return out * w.unsqueeze(-1)


def where_weighed(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        weight = torch.where(ids == e, w, torch.zeros_like(w)).sum(-1, keepdim=True)
        out = torch.where((ids == e).any(-1, keepdim=True), out + weight * expert(x), out)
    return out


def mask_times_rows(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        mask = (ids == e).to(x.dtype).unsqueeze(-1)
        out += mask * expert(x)
    return w.unsqueeze(-1) * out


def scores_at_chosen(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """Scores of all experts times who was chosen, normalised after."""
    scores = m.gate(x).softmax(-1)
    dense = scores * F.one_hot(ids, m.num_experts).sum(1)
    dense = dense / dense.sum(-1, keepdim=True)
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        out += dense[:, e].unsqueeze(1) * expert(x)
    return out


# -- rows taken and put ----------------------------------------------------------------------------


def litgpt(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    masks = (ids.unsqueeze(-1) == torch.arange(m.num_experts)).permute(2, 0, 1)
    y = torch.zeros_like(x)
    for mask, expert in zip(masks, m.experts, strict=True):
        token, slot = torch.where(mask)
        y[token] += w[token, slot, None] * expert(x[token])
    return y


def minimind(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    flat, rows = ids.view(-1), x.repeat_interleave(m.top_k, dim=0)
    y = torch.empty_like(rows, dtype=rows.dtype)
    for e, expert in enumerate(m.experts):
        y[flat == e] = expert(rows[flat == e]).to(y.dtype)
    return (y.view(*w.shape, -1) * w.unsqueeze(-1)).sum(dim=1)


def qwen_remote(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    hot = F.one_hot(ids, num_classes=m.num_experts).permute(2, 1, 0)
    out = torch.zeros((x.shape[0], D), dtype=x.dtype)
    for e in range(m.num_experts):
        expert = m.experts[e]
        idx, top_x = torch.where(hot[e])
        state = x[None, top_x].reshape(-1, D)
        out.index_add_(0, top_x, (expert(state) * w[top_x, idx, None]).to(x.dtype))
    return out


def labml(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    final = x.new_zeros(x.shape)
    lists = [torch.eq(ids, e).nonzero(as_tuple=True)[0] for e in range(m.num_experts)]
    outputs = [m.experts[e](x[lists[e], :]) for e in range(m.num_experts)]
    for e in range(m.num_experts):
        final[lists[e], :] = outputs[e]
    return final * w.view(-1, 1)


def index_copy(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        at = torch.nonzero(ids == e).flatten()
        out.index_copy_(0, at, expert(x.index_select(0, at)))
    return out * w[:, None]


def masked_scatter(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        mask = (ids == e).any(-1)
        weight = (w * (ids == e)).sum(-1)
        y = expert(x[mask]) * weight[mask].unsqueeze(-1)
        out = out + torch.zeros_like(x).masked_scatter(mask.unsqueeze(-1), y)
    return out


def jetmoe(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """Each product a loop of its own over the sorted rows."""
    sizes = torch.zeros(x.shape[0], m.num_experts).scatter(1, ids, 1).long().sum(0).tolist()
    _, order = ids.flatten().sort(0)
    token = order.div(m.top_k, rounding_mode="trunc")
    weight = w.flatten()[order]

    def product(rows: Tensor, parameter: Tensor) -> Tensor:
        parts = rows.split(sizes, dim=0)  # type: ignore[no-untyped-call]
        return torch.cat([F.linear(part, parameter[e]) for e, part in enumerate(parts)], dim=0)

    gate, up = product(x[token], m.experts.gate_up).chunk(2, dim=-1)
    y = product(F.silu(gate) * up, m.experts.down) * weight[:, None]
    return torch.zeros_like(x).index_add(0, token, y)


def llama_moe(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """Sorted by expert, split, weighed, added."""
    flat_ids, weight = ids.flatten(), w.flatten()
    _, order = flat_ids.sort(0)
    token = torch.arange(x.shape[0]).repeat_interleave(m.top_k)[order]
    sizes = flat_ids.bincount(minlength=m.num_experts).tolist()
    parts = torch.split(x[token], sizes, dim=0)
    y = torch.cat([m.experts[e](part) for e, part in enumerate(parts)], 0)
    return torch.zeros_like(x).index_add(0, token, y * weight[order][:, None])


def dbrx(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    hot = F.one_hot(ids, num_classes=m.num_experts).permute(2, 1, 0)
    w1, v1, w2 = (p.view(E, F_, D).chunk(E, dim=0) for p in (m.experts.w1, m.experts.v1, m.experts.w2))
    for e in range(m.num_experts):
        slot, token = torch.where(hot[e])
        rows = x[None, token].reshape(-1, D)
        gate, up = rows.matmul(w1[e].squeeze(0).t()), rows.matmul(v1[e].squeeze(0).t())
        y = (F.silu(gate) * up).matmul(w2[e].squeeze(0)) * w[token, slot, None]
        out.index_add_(0, token, y)
    return out


def phi_moe(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """Slots chosen one by one, joined."""
    logits = m.gate(x)
    first = logits.max(dim=-1, keepdim=True)
    rest = logits.masked_fill(F.one_hot(first.indices[:, 0], m.num_experts).bool(), float("-inf"))
    second = rest.max(dim=-1, keepdim=True)
    chosen = torch.cat([first.indices, second.indices], dim=-1)
    weight = torch.cat([first.values, second.values], dim=-1).sigmoid()
    return qwen_remote(m, x, chosen, weight)


def deepseek_training(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    shape, flat = x.shape, ids.view(-1)
    rows = x.repeat_interleave(m.top_k, dim=0)
    y = torch.empty_like(rows)
    for i, expert in enumerate(m.experts):
        y[flat == i] = expert(rows[flat == i])
    y = (y.view(*w.shape, -1) * w.unsqueeze(-1)).sum(dim=1)
    return y.to(x.dtype).view(*shape)


def gates_above_zero(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    gates = torch.zeros_like(m.gate(x)).scatter(1, ids, w)
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        mask = gates[:, e] > 0
        if mask.any():
            out[mask] += gates[mask, e].unsqueeze(1) * expert(x[mask])
    return out


def gates_not_zero(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    gates = torch.zeros_like(m.gate(x)).scatter(1, ids, torch.relu(w - 0.5))
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        at = torch.nonzero(gates[:, e]).squeeze(-1)
        out.index_add_(0, at, expert(x[at]) * gates[at, e, None])
    return out


def gates_without_weights(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """A pair that weighs 0 has no row, though rows have no weight."""
    gates = torch.zeros_like(m.gate(x)).scatter(1, ids, torch.relu(w - 0.5))
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        (at,) = torch.where(gates[:, e] != 0)
        out[at] += expert(x[at])
    return out


# -- what comes after the sum ----------------------------------------------------------------------


def normalised_after(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        token, slot = torch.where(ids == e)
        out[token] += expert(x[token]) * w[token, slot, None]
    return out / w.sum(-1, keepdim=True)


def scaled_after(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    scale = m.gate(x).sigmoid().amax(-1, keepdim=True)
    for e, expert in enumerate(m.experts):
        token, _ = torch.where(ids == e)
        out[token] += expert(x[token])
    y: Tensor = out * scale
    return y


def recursive(m: Layer, x: Tensor, ids: Tensor, w: Tensor, k: int = 0) -> Tensor:
    """One slot, then the others."""
    if k == m.top_k:
        return torch.zeros_like(x)
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        mask = ids[:, k] == e
        out[mask] = w[mask, k, None] * expert(x[mask])
    return out + recursive(m, x, ids, w, k + 1)


CASES: tuple[Case, ...] = (
    Case(gpt_fast, Einsums),
    Case(gathered_matmul, EinsumsTransposed),
    Case(gathered_columns, Einsums),
    Case(gathered_by_slot, EinsumsTransposed),
    Case(all_by_einsum, Einsums),
    Case(chosen_or_not, top_k=E),
    *(
        Case(loop)
        for loop in (
            softmax_of_scattered,
            softmax_before_all,
            concatenated,
            stacked_last,
            stacked_times_column,
        )
    ),
    *(Case(loop) for loop in (row_times_stacked, stacked_indexed, stacked_first_indexed, summed)),
    Case(where_added, route=argmax_flat, top_k=1),
    Case(where_weighed),
    Case(mask_times_rows, route=maximum, top_k=1),
    *(Case(loop) for loop in (scores_at_chosen, litgpt, minimind, qwen_remote)),
    *(Case(loop, route=maximum, top_k=1) for loop in (labml, top_one_by_einsum, top_one_stacked)),
    *(Case(loop) for loop in (gates_above_zero, gates_not_zero, gates_without_weights)),
    Case(dropped_by_einsum, route=maximum, top_k=1),
    Case(index_copy, route=argmax_flat, top_k=1),
    Case(masked_scatter),
    Case(jetmoe, StackedParameters, top_k_softmax),
    Case(llama_moe),
    Case(dbrx, FlatParameters),
    Case(phi_moe),
    *(Case(loop) for loop in (deepseek_training, normalised_after, scaled_after, recursive)),
)
APART: tuple[Case, ...] = (
    Case(gathered_einsum_apart, EinsumsTransposed),
    Case(all_by_einsum_apart, EinsumsTransposed),
)
