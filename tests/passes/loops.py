"""Loops over experts in the ways people write them, each a small function; all compute a top-k layer.

T tokens, D model width, F expert hidden width, E experts, K experts per token, P = T·K pairs. A loop takes
(layer, x (T, D), ids (T, K), weights (T, K)) and returns (T, D).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

D, F_, E, K = 8, 6, 4, 2

Loop = Callable[["Layer", Tensor, Tensor, Tensor], Tensor]


# -- experts ---------------------------------------------------------------------------------------


class SwiGLU(nn.Module):
    """Three products without biases."""

    def __init__(self, hidden: int = F_) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(D, hidden, bias=False), nn.Linear(D, hidden, bias=False)
        self.w2 = nn.Linear(hidden, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return y


class Weighed(SwiGLU):
    """The routing weight is an argument of the expert, as in Phi and Qwen's own code."""

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        y = super().forward(x)
        return y if weight is None else weight * y


def _sequential(act: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Biases, an activation that is a module, dropout that is off in eval."""
    return lambda: nn.Sequential(nn.Linear(D, F_), act(), nn.Dropout(0.1), nn.Linear(F_, D), nn.Dropout(0.1))


class Merged(nn.Module):
    """Gate and up in one product, cut in two."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Linear(D, 2 * F_, bias=False), nn.Linear(F_, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        y: Tensor = self.down(F.silu(gate) * up)
        return y


class Nested(nn.Module):
    """An expert that is a module within a module, its activation called by name."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(D, F_), "fc2": nn.Linear(F_, D)})

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.mlp["fc2"](torch.relu(self.mlp["fc1"](x)).square())
        return y


class Matrices(nn.Module):
    """Parameters multiplied with @, as papers write it."""

    def __init__(self) -> None:
        super().__init__()
        self.w_in, self.w_out = nn.Parameter(torch.empty(D, F_)), nn.Parameter(torch.empty(F_, D))
        self.b_in = nn.Parameter(torch.empty(F_))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.w_in + self.b_in) @ self.w_out


class Normed(SwiGLU):
    """A norm before the expert, with weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


class Cumulative(SwiGLU):
    """An operator along the width that is no body step."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).cumsum(-1)


class StackedParameters(nn.Module):
    """(E, …) parameters; `self[e]` is one expert."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Parameter(torch.empty(E, 2 * F_, D)), nn.Parameter(torch.empty(E, D, F_))

    def __len__(self) -> int:
        return len(self.gate_up)

    def __getitem__(self, e: Any) -> Callable[[Tensor], Tensor]:
        def expert(x: Tensor) -> Tensor:
            gate, up = F.linear(x, self.gate_up[e]).chunk(2, dim=-1)
            return F.linear(F.silu(gate) * up, self.down[e])

        return expert


class StackedTransposed(nn.Module):
    """(E, in, out) parameters with biases, multiplied by matmul."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.empty(E, D, F_)), nn.Parameter(torch.empty(E, F_))
        self.w2, self.b2 = nn.Parameter(torch.empty(E, F_, D)), nn.Parameter(torch.empty(E, D))

    def __len__(self) -> int:
        return len(self.w1)

    def __getitem__(self, e: Any) -> Callable[[Tensor], Tensor]:
        return lambda x: F.gelu(x @ self.w1[e] + self.b1[e]) @ self.w2[e] + self.b2[e]


class FlatParameters(nn.Module):
    """(E·F, D) parameters, each expert a view of some rows, as in DBRX."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.v1 = nn.Parameter(torch.empty(E * F_, D)), nn.Parameter(torch.empty(E * F_, D))
        self.w2 = nn.Parameter(torch.empty(E * F_, D))

    def __len__(self) -> int:
        return E

    def __getitem__(self, e: Any) -> Callable[[Tensor], Tensor]:
        w1, v1, w2 = (w.view(E, F_, D)[e] for w in (self.w1, self.v1, self.w2))
        return lambda x: (F.silu(x @ w1.t()) * (x @ v1.t())) @ w2


class NamedExperts(nn.ModuleDict):
    """Experts under names of their own, as in Switch."""

    def __init__(self) -> None:
        super().__init__({f"expert_{e}": SwiGLU() for e in range(E)})


class Tied(nn.ModuleList):
    """All experts share their last matrix."""

    def __init__(self) -> None:
        super().__init__(SwiGLU() for _ in range(E))
        for expert in list(self)[1:]:
            expert.get_submodule("w2").weight = self[0].get_submodule("w2").weight


def many(expert: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """E experts in a ModuleList."""
    return lambda: nn.ModuleList(expert() for _ in range(E))


# -- routers ---------------------------------------------------------------------------------------


def softmax_top_k(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    weights, ids = torch.topk(F.softmax(logits, dim=-1, dtype=torch.float), top_k, dim=-1)
    return (weights / weights.sum(dim=-1, keepdim=True)).to(logits.dtype), ids


def top_k_softmax(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    weights, ids = logits.topk(top_k, dim=-1)
    return F.softmax(weights, dim=-1, dtype=torch.float).to(logits.dtype), ids


def argmax(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    scores = logits.softmax(-1)
    ids = scores.argmax(dim=-1, keepdim=True)
    return scores.gather(1, ids), ids


def maximum(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """One id a token, without a dimension for slots."""
    weights, ids = logits.softmax(-1).max(dim=-1)
    return weights, ids


def argmax_flat(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    scores = torch.sigmoid(logits)
    ids = torch.argmax(scores, dim=-1)
    return scores.gather(1, ids[:, None]).squeeze(1), ids


# -- layers ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A loop, the experts it visits, the router before it."""

    loop: Loop
    experts: Callable[[], nn.Module] = many(SwiGLU)  # noqa: RUF009
    route: Callable[[Tensor, int], tuple[Tensor, Tensor]] = softmax_top_k
    name: str = ""
    top_k: int = K

    @property
    def slots(self) -> int:
        """Ids a token."""
        return self.top_k if self.route in (softmax_top_k, top_k_softmax) else 1

    def __str__(self) -> str:
        return self.name or self.loop.__name__


class Layer(nn.Module):
    """(B, S, D) -> (B, S, D): flattened, routed, looped, brought back."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case, self.loop = case, case.loop
        self.gate = nn.Linear(D, E, bias=False)
        self.experts: Any = case.experts()
        self.shared = SwiGLU()
        self.num_experts, self.top_k = E, case.top_k

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, x.shape[-1])
        weights, ids = self.case.route(self.gate(flat), self.top_k)
        return self.loop(self, flat, ids, weights).view(x.shape)


def layer(case: Case, dtype: torch.dtype = torch.float32) -> Layer:
    """The layer with weights that depend on nothing but the case."""
    torch.manual_seed(0)
    made = Layer(case)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.4)
    return made.to(dtype).eval().requires_grad_(False)


# -- one_hot, where, index_add ---------------------------------------------------------------------


def mixtral(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros((x.shape[0], D), dtype=x.dtype, device=x.device)
    mask = F.one_hot(ids, num_classes=m.num_experts).permute(2, 1, 0)
    for e in range(m.num_experts):
        expert = m.experts[e]
        idx, top_x = torch.where(mask[e])
        state = x[None, top_x].reshape(-1, D)
        out.index_add_(0, top_x, (expert(state) * w[top_x, idx, None]).to(x.dtype))
    return out


def mixtral_lists(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """As transformers 4.36 wrote it: indices as Python lists."""
    out = torch.zeros((x.shape[0], D), dtype=x.dtype, device=x.device)
    mask = F.one_hot(ids, num_classes=m.num_experts).permute(2, 1, 0)
    for e in range(m.num_experts):
        idx, top_x = torch.where(mask[e])
        if top_x.shape[0] == 0:
            continue
        top_x_list, idx_list = top_x.tolist(), idx.tolist()
        state = x[None, top_x_list].reshape(-1, D)
        y = m.experts[e](state) * w[top_x_list, idx_list, None]
        out.index_add_(0, top_x, y.to(x.dtype))
    return out


def mixtral_hit(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    mask = F.one_hot(ids, num_classes=m.num_experts).permute(2, 1, 0)
    hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
    for e in hit:
        idx, top_x = torch.where(mask[e].squeeze(0))
        state = x[None, top_x].reshape(-1, D)
        out.index_add_(0, top_x, m.experts[e](state) * w[top_x, idx, None])
    return out


def mixtral_hit_first(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    mask = F.one_hot(ids, num_classes=m.num_experts).permute(2, 1, 0)
    for e in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
        e = e[0]
        pos, tok = torch.where(mask[e])
        out.index_add_(0, tok, m.experts[e](x[tok]) * w[tok, pos, None])
    return out


def hit_flat_list(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = x.new_zeros(x.shape)
    mask = F.one_hot(ids, m.num_experts)
    for e in mask.sum(dim=(0, 1)).nonzero().flatten().tolist():
        tok, slot = mask[..., e].nonzero(as_tuple=True)
        out = out.index_add(0, tok, w[tok, slot].unsqueeze(-1) * m.experts[e](x[tok]))
    return out


def hit_tuple(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    mask = F.one_hot(ids, m.num_experts).permute(2, 0, 1)
    (hit,) = (mask.sum((1, 2)) > 0).nonzero(as_tuple=True)
    for e in hit:
        tok, slot = mask[e].nonzero(as_tuple=True)
        out.index_add_(0, tok, m.experts[e](x[tok]).mul_(w[tok, slot].view(-1, 1)))
    return out


def hit_bincount(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    hit = torch.where(torch.bincount(ids.view(-1), minlength=m.num_experts) > 0)[0]
    for e in hit.tolist():
        tok, slot = torch.where(ids == e)
        out[tok] += m.experts[e](x[tok]) * w[tok, slot, None]
    return out


def hit_any(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    mask = F.one_hot(ids, m.num_experts).bool()
    for e in mask.any(dim=1).any(dim=0).nonzero().squeeze(-1):
        tok, slot = torch.where(mask[:, :, e])
        out[tok] += m.experts[e](x[tok]) * w[tok, slot].unsqueeze(1)
    return out


def unique_list(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    hit: list[int] = torch.unique(ids).tolist()
    for e in hit:
        tok, slot = torch.where(ids == e)
        out[tok] += m.experts[e](x[tok]) * w[tok, slot, None]
    return out


def unique_items(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e in ids.unique():  # type: ignore[no-untyped-call]
        rows, cols = (ids == e).nonzero(as_tuple=True)
        out.index_add_(0, rows, m.experts[e.item()](x[rows]) * w[rows, cols, None])
    return out


def unique_flat(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e in torch.unique(ids.flatten()):
        rows, cols = torch.where(torch.eq(ids, e))
        out.index_add_(0, rows, m.experts[int(e)](x[rows]) * w[rows, cols, None])
    return out


def hot_columns(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """(T, E, K) one-hots, one column an expert, coordinates as rows."""
    out = torch.zeros_like(x)
    hot = F.one_hot(ids, m.num_experts).transpose(1, 2)
    for e, expert in enumerate(m.experts):
        at = hot[:, e].nonzero()
        tok, slot = at[:, 0], at[:, 1]
        out.index_add_(0, tok, expert(x[tok]) * w[tok, slot][:, None])
    return out


def coordinates_unbound(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        tok, slot = (ids == e).nonzero().unbind(-1)
        out.index_add_(0, tok, expert(x[tok]) * w[tok, slot][:, None])
    return out


def coordinates_transposed(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        tok, slot = (ids == e).nonzero().t()
        out[tok] += expert(x[tok]) * w[tok, slot].reshape(-1, 1)
    return out


def argwhere(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        at = torch.argwhere(ids == e)
        out[at[:, 0]] += expert(x[at[:, 0]]) * w[at[:, 0], at[:, 1]].unsqueeze(-1)
    return out


def hot_bool_of_expert(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    mask = F.one_hot(ids, m.num_experts).bool().permute(2, 0, 1)
    for e in range(m.num_experts):
        chosen = mask[e]
        if not chosen.any():
            continue
        tok, slot = torch.where(chosen)
        out.index_add_(0, tok, m.experts[e](x.index_select(0, tok)) * w[tok, slot].unsqueeze(-1))
    return out


def unbound_masks(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for expert, mask in zip(m.experts, F.one_hot(ids, m.num_experts).unbind(-1), strict=True):
        tok, slot = torch.where(mask)
        out.index_add_(0, tok, expert(x[tok]) * w[tok, slot, None])
    return out


# -- masks over tokens -----------------------------------------------------------------------------


def token_masks(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        mask = (ids == e).any(dim=-1)
        if mask.any():
            weight = (w * (ids == e)).sum(dim=-1)[mask]
            out[mask] += weight.unsqueeze(-1) * expert(x[mask])
    return out


def token_masks_float(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e in range(m.num_experts):
        mask = (ids == e).float()
        rows = mask.sum(-1) > 0
        if rows.sum() == 0:
            continue
        weight = (w * mask).sum(-1, keepdim=True)
        out[rows] = out[rows] + m.experts[e](x[rows]) * weight[rows]
    return out


def token_masks_where(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        chosen = ids == e
        tok = chosen.any(-1).nonzero(as_tuple=True)[0]
        weight = torch.where(chosen, w, torch.zeros_like(w)).sum(-1)
        if tok.numel() > 0:
            out[tok] += expert(x[tok]) * weight[tok, None]
    return out


def token_masks_filled(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        chosen = ids.eq(e)
        weight = w.masked_fill(~chosen, 0.0).sum(-1)
        tok = chosen.any(-1).nonzero().squeeze(-1)
        if tok.numel() == 0:
            continue
        out.index_add_(0, tok, weight[tok].unsqueeze(-1) * expert(x[tok]))
    return out


def token_masks_of_pairs(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """The weights of w[ids == e] are in the tokens' order, since a token's ids differ."""
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        chosen = ids == e
        rows = chosen.any(-1)
        if not rows.any():
            continue
        out[rows] += expert(x[rows]) * w[chosen].unsqueeze(-1)
    return out


def token_masks_put(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        tok, slot = torch.where(ids == e)
        if len(tok) == 0:
            continue
        out.index_put_((tok,), expert(x[tok]) * w[tok, slot, None], accumulate=True)
    return out


def token_scatter_add(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        tok, slot = torch.where(ids == e)
        y = expert(x[tok]) * w[tok, slot, None]
        out.scatter_add_(0, tok.unsqueeze(-1).expand(-1, D), y)
    return out


def token_scatter_repeated(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        tok, slot = torch.where(ids == e)
        y = expert(x.gather(0, tok.unsqueeze(1).expand(-1, x.shape[1]))) * w[tok, slot, None]
        out = out.scatter_add(0, tok.unsqueeze(1).expand_as(y), y)
    return out


def whole_contribution(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """Each expert's rows in a tensor of all tokens, which are added."""
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        tok, slot = torch.where(ids == e)
        part = torch.zeros_like(x)
        part[tok] = expert(x[tok]) * w[tok, slot, None]
        out = out + part
    return out


def slot_by_slot(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for k in range(m.top_k):
        for e in range(m.num_experts):
            mask = ids[:, k] == e
            if mask.any():
                out[mask] += w[mask, k].unsqueeze(-1) * m.experts[e](x[mask])
    return out


def slot_by_slot_columns(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for k in range(m.top_k):
        chosen, weight = ids[:, k], w[:, k].unsqueeze(1)
        for e in range(m.num_experts):
            mask = chosen == e
            if mask.any():
                out[mask] += weight[mask] * m.experts[e](x[mask])
    return out


def slot_within_expert(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e in range(m.num_experts):
        for k in range(m.top_k):
            tok = (ids[:, k] == e).nonzero(as_tuple=True)[0]
            if tok.numel():
                out[tok] += w[tok, k, None] * m.experts[e](x[tok])
    return out


# -- all tokens through each expert ------------------------------------------------------------------


def every_token(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        weight = (w * (ids == e)).sum(-1, keepdim=True)
        out = out + weight * expert(x)
    return out


def every_token_where(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = 0
    for e, expert in enumerate(m.experts):
        weight = torch.where(ids == e, w, 0.0).sum(-1)
        out += expert(x) * weight[:, None]
    assert isinstance(out, Tensor)
    return out


def every_token_scattered(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    dense = torch.zeros(x.shape[0], m.num_experts, dtype=w.dtype).scatter_(1, ids, w)
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        out += dense[:, e].unsqueeze(-1) * expert(x)
    return out


def every_token_stacked(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    dense = torch.zeros_like(m.gate(x)).scatter(-1, ids, w)
    every = torch.stack([expert(x) for expert in m.experts], dim=1)
    return (every * dense.unsqueeze(-1)).sum(dim=1)


def every_token_gathered(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    every = torch.stack([expert(x) for expert in m.experts], dim=1)
    chosen = every.gather(1, ids.unsqueeze(-1).expand(-1, -1, D))
    return (chosen * w.unsqueeze(-1)).sum(1)


def every_token_einsum(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    dense = torch.zeros_like(m.gate(x)).scatter(1, ids, w)
    every = torch.stack([expert(x) for expert in m.experts])
    return torch.einsum("te,etd->td", dense, every)


# -- dense weights, rows picked by them ------------------------------------------------------------


def dense_column(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    dense = torch.zeros_like(m.gate(x)).scatter_(1, ids, w)
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        tok = (ids == e).any(-1).nonzero(as_tuple=True)[0]
        out[tok] += expert(x[tok]) * dense[tok, e].unsqueeze(-1)
    return out


def dense_column_mask(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    dense = torch.zeros_like(m.gate(x)).scatter_(1, ids, w)
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        mask = (ids == e).any(-1)
        out[mask] += expert(x[mask]) * dense[mask, e, None]
    return out


def dense_column_apart(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    dense = torch.zeros_like(m.gate(x)).scatter_(1, ids, w)
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        tok, _ = torch.where(ids == e)
        out[tok] += dense[:, e][tok][:, None] * expert(x[tok])
    return out


# -- flat pairs ------------------------------------------------------------------------------------


def repeated(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """DeepSeek's forward in training, and many small Mixtrals."""
    rows = x.repeat_interleave(ids.shape[-1], dim=0)
    flat = ids.view(-1)
    y = torch.empty_like(rows)
    for e, expert in enumerate(m.experts):
        y[flat == e] = expert(rows[flat == e])
    return (y.view(*w.shape, -1) * w.unsqueeze(-1)).sum(dim=1)


def repeated_cast(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    rows, flat = x.repeat_interleave(m.top_k, dim=0), ids.flatten()
    y = torch.zeros_like(rows)
    for e in range(m.num_experts):
        mask = flat == e
        if mask.any():
            y[mask] = m.experts[e](rows[mask]).to(y.dtype)
    return torch.einsum("tkd,tk->td", y.view(-1, m.top_k, D), w)


def repeated_bmm(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    rows, flat = x.repeat_interleave(m.top_k, dim=0), ids.reshape(-1)
    y = torch.zeros_like(rows)
    for e in range(m.num_experts):
        at = (flat == e).nonzero(as_tuple=True)[0]
        y[at] = m.experts[e](rows[at])
    return torch.bmm(w.unsqueeze(1), y.view(-1, m.top_k, D)).squeeze(1)


def repeated_expanded(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    rows = x.unsqueeze(1).expand(-1, m.top_k, -1).reshape(-1, D)
    flat, weight = ids.reshape(-1), w.reshape(-1, 1)
    y = torch.zeros_like(rows)
    for e in range(m.num_experts):
        mask = flat == e
        if mask.sum() > 0:
            y[mask] = m.experts[e](rows[mask]) * weight[mask]
    return y.view(-1, m.top_k, D).sum(1)


def flat_tokens(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """Pairs by number, tokens by division."""
    flat, weight = ids.reshape(-1), w.reshape(-1)
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        pairs = torch.where(flat == e)[0]
        tok = pairs // m.top_k
        out.index_add_(0, tok, expert(x[tok]) * weight[pairs].unsqueeze(-1))
    return out


def pairs_of_three_dimensions(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    y = x.new_zeros(x.shape[0], m.top_k, D)
    for e, expert in enumerate(m.experts):
        tok, slot = torch.where(ids == e)
        y[tok, slot] = expert(x[tok])
    return (y * w[..., None]).sum(dim=-2)


def pairs_masked(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    rows = x.unsqueeze(1).expand(-1, m.top_k, -1)
    y = torch.zeros_like(rows)
    for e, expert in enumerate(m.experts):
        mask = ids == e
        y[mask] = expert(rows[mask]) * w[mask].unsqueeze(-1)
    return y.sum(1)


# -- segments of sorted rows -----------------------------------------------------------------------


def _counts(m: Layer, ids: Tensor) -> Tensor:
    counts = ids.new_zeros((ids.shape[0], m.num_experts))
    counts.scatter_(1, ids, 1)
    return counts.sum(dim=0)


@torch.no_grad()
def deepseek(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    idxs = ids.view(-1).argsort()
    sorted_tokens = x[idxs // ids.shape[1]]
    per_expert = _counts(m, ids).cpu().numpy()
    outputs, start = [], 0
    for i, n in enumerate(per_expert):
        end = start + n
        if n == 0:
            continue
        outputs.append(m.experts[i](sorted_tokens[start:end]))
        start = end
    outs = torch.cat(outputs, dim=0) if len(outputs) else sorted_tokens.new_empty(0)
    new = torch.empty_like(outs)
    new[idxs] = outs
    return new.view(*ids.shape, -1).type(w.dtype).mul_(w.unsqueeze(dim=-1)).sum(dim=1).type(new.dtype)


@torch.no_grad()
def deepseek_v1(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """The first release: offsets on the host, each expert's rows scattered to their tokens."""
    flat, weight = ids.view(-1), w.view(-1, 1)
    cache = torch.zeros_like(x)
    idxs = flat.argsort()
    ends = flat.bincount(minlength=m.num_experts).cpu().numpy().cumsum(0)
    tokens = idxs // m.top_k
    for i, end in enumerate(ends):
        start = 0 if i == 0 else ends[i - 1]
        if start == end:
            continue
        at = tokens[start:end]
        y = m.experts[i](x[at])
        y.mul_(weight[idxs[start:end]])
        cache.scatter_reduce_(0, at.view(-1, 1).repeat(1, x.shape[-1]), y, reduce="sum")
    return cache


def counted(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=m.num_experts).tolist()
    rows = x[order // m.top_k]
    parts, start = [], 0
    for e, n in enumerate(counts):
        parts.append(m.experts[e](rows[start : start + n]))
        start += n
    y = torch.cat(parts) * w.flatten()[order].unsqueeze(-1)
    return torch.zeros_like(x).index_add_(0, order // m.top_k, y)


def counted_ends(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    values, order = ids.flatten().sort()
    ends = torch.bincount(values, minlength=m.num_experts).cumsum(0).tolist()
    tok, weight = order // m.top_k, w.reshape(-1)[order]
    out = torch.zeros_like(x)
    for e in range(m.num_experts):
        start, end = (ends[e - 1] if e else 0), ends[e]
        if end > start:
            rows = tok[start:end]
            out.index_add_(0, rows, m.experts[e](x[rows]) * weight[start:end, None])
    return out


def split_by_counts(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    order = ids.view(-1).argsort()
    counts = F.one_hot(ids.view(-1), m.num_experts).sum(0).tolist()
    parts = x[order // m.top_k].split(counts)  # type: ignore[no-untyped-call]
    y = torch.cat([expert(part) for expert, part in zip(m.experts, parts, strict=True)], dim=0)
    return (y[order.argsort()].view(*ids.shape, D) * w.unsqueeze(-1)).sum(1)


def split_tokens(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """The token numbers are split, not the rows."""
    order = torch.sort(ids.reshape(-1), stable=True)[1]
    counts = torch.bincount(ids.reshape(-1), minlength=m.num_experts)
    out = torch.zeros_like(x)
    tokens = (order // m.top_k).split(counts.tolist())  # type: ignore[no-untyped-call]
    weights = w.reshape(-1)[order].split(counts.tolist())  # type: ignore[no-untyped-call]
    for e, (tok, weight) in enumerate(zip(tokens, weights, strict=True)):
        if tok.numel() == 0:
            continue
        out[tok] += m.experts[e](x[tok]) * weight.unsqueeze(-1)
    return out


def split_put(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    order = ids.flatten().argsort()
    counts = (ids.flatten()[:, None] == torch.arange(m.num_experts)).sum(0).tolist()
    rows = x.repeat_interleave(m.top_k, dim=0)[order]
    y = torch.cat([m.experts[e](part) for e, part in enumerate(rows.split(counts, dim=0))])  # type: ignore[no-untyped-call]
    back = torch.zeros_like(y)
    back[order] = y
    return (back.view(-1, m.top_k, D) * w[:, :, None]).sum(1)


def split_items(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """Counts read one by one, with .item()."""
    flat = ids.flatten()
    order = flat.argsort()
    counts = torch.bincount(flat, minlength=m.num_experts)
    start: Any = 0
    rows, parts = x[order // m.top_k], list[Tensor]()
    for e in range(m.num_experts):
        n = counts[e].item()
        if n > 0:
            parts.append(m.experts[e](rows[start : start + n]))
        start += n
    y = torch.cat(parts)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel())
    return (y[inverse].view(*ids.shape, D) * w.unsqueeze(-1)).sum(1)


def written_in_segments(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    order = ids.flatten().argsort()
    counts = torch.bincount(ids.flatten(), minlength=m.num_experts).tolist()
    rows, start = x[order // m.top_k], 0
    y = torch.empty_like(rows)
    for e, n in enumerate(counts):
        y[start : start + n] = m.experts[e](rows[start : start + n])
        start += n
    y = y * w.flatten()[order].unsqueeze(-1)
    return torch.zeros_like(x).index_add(0, order // m.top_k, y)


# -- where the sum starts --------------------------------------------------------------------------


def from_residual(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = x.clone()
    for e, expert in enumerate(m.experts):
        tok, slot = torch.where(ids == e)
        out.index_add_(0, tok, expert(x[tok]) * w[tok, slot, None])
    return out


def from_shared(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = m.shared(x)
    for e, expert in enumerate(m.experts):
        tok, slot = torch.where(ids == e)
        if tok.numel():
            out[tok] += expert(x[tok]) * w[tok, slot, None]
    assert isinstance(out, Tensor)
    return out


def shared_after(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    y: Tensor = mixtral(m, x, ids, w) + m.shared(x)
    return y


def in_another_dtype(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """Summed in fp32 whatever the model's dtype."""
    out = torch.zeros(x.shape, dtype=torch.float32)
    for e, expert in enumerate(m.experts):
        tok, slot = torch.where(ids == e)
        out.index_add_(0, tok, expert(x[tok]).float() * w[tok, slot, None].float())
    return out.to(x.dtype)


# -- the weight elsewhere --------------------------------------------------------------------------


def weight_before(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        tok, slot = torch.where(ids == e)
        out.index_add_(0, tok, expert(x[tok] * w[tok, slot, None]))
    return out


def weight_as_argument(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    mask = F.one_hot(ids, m.num_experts).permute(2, 1, 0)
    for e in range(m.num_experts):
        idx, tok = torch.where(mask[e])
        if tok.shape[0] == 0:
            continue
        out.index_add_(0, tok, m.experts[e](x[tok], w[tok, idx, None]).to(x.dtype))
    return out


def without_weight(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        tok, _ = torch.where(ids == e)
        out.index_add_(0, tok, expert(x[tok]))
    return out


# -- one id a token --------------------------------------------------------------------------------


def top_one(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        mask = ids == e
        if mask.any():
            out[mask] = expert(x[mask]) * w[mask].unsqueeze(-1)
    return out


def top_one_later(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.empty_like(x)
    for e, expert in enumerate(m.experts):
        at = torch.nonzero(ids == e, as_tuple=True)[0]
        out[at] = expert(x[at])
    return out * w.unsqueeze(-1)


def top_one_squeezed(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        at = (ids.squeeze(-1) == e).nonzero().view(-1)
        out[at] += expert(x[at]) * w[at]
    return out


def switch(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """Experts by name, one-hot masks over tokens."""
    mask = F.one_hot(ids, m.num_experts).bool()
    out = torch.zeros_like(x)
    for e, name in enumerate(m.experts):
        rows = mask[:, e]
        out[rows] = m.experts[name](x[rows])
    return out * w.unsqueeze(-1)


def named(m: Layer, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    mask = F.one_hot(ids, m.num_experts).permute(2, 1, 0)
    for e in mask.sum((1, 2)).nonzero():
        idx, tok = torch.where(mask[e].squeeze(0))
        out.index_add_(0, tok, m.experts[f"expert_{e.item()}"](x[tok]) * w[tok, idx, None])
    return out


CASES: tuple[Case, ...] = (
    *(Case(loop) for loop in (mixtral, mixtral_hit, mixtral_hit_first, hit_flat_list)),
    *(Case(loop) for loop in (hit_tuple, hit_bincount, hit_any, unique_list, unique_items, unique_flat)),
    *(Case(loop) for loop in (hot_columns, coordinates_unbound, coordinates_transposed, argwhere)),
    *(Case(loop) for loop in (hot_bool_of_expert, unbound_masks)),
    *(Case(loop) for loop in (token_masks, token_masks_float, token_masks_where, token_masks_filled)),
    *(Case(loop) for loop in (token_masks_of_pairs, token_masks_put, token_scatter_add)),
    *(Case(loop) for loop in (token_scatter_repeated, whole_contribution, slot_by_slot)),
    *(Case(loop) for loop in (slot_by_slot_columns, slot_within_expert)),
    *(Case(loop) for loop in (every_token, every_token_where, every_token_scattered, every_token_stacked)),
    *(Case(loop) for loop in (every_token_gathered, every_token_einsum)),
    *(Case(loop) for loop in (dense_column, dense_column_mask, dense_column_apart)),
    *(Case(loop) for loop in (repeated, repeated_cast, repeated_bmm, repeated_expanded, flat_tokens)),
    *(Case(loop) for loop in (pairs_of_three_dimensions, pairs_masked)),
    *(Case(loop) for loop in (deepseek, deepseek_v1, counted, counted_ends, split_by_counts)),
    *(Case(loop) for loop in (split_tokens, split_put, split_items)),
    *(Case(loop) for loop in (from_residual, from_shared, shared_after, in_another_dtype)),
    *(Case(loop) for loop in (weight_before, without_weight)),
    Case(weight_as_argument, many(Weighed)),
    Case(top_one, route=maximum),
    Case(top_one, route=argmax_flat, name="top_one_argmax"),
    Case(top_one_later, route=argmax_flat),
    Case(top_one_squeezed, route=argmax, top_k=1),
    Case(switch, NamedExperts, maximum),
    Case(named, NamedExperts),
    Case(mixtral, route=argmax, top_k=1, name="mixtral_top_one"),
    Case(mixtral, route=top_k_softmax, name="mixtral_softmax_after"),
    Case(token_masks, many(_sequential(nn.GELU)), name="biases_and_dropout"),
    Case(deepseek, many(_sequential(nn.ReLU)), name="segments_with_biases"),
    Case(mixtral, many(Merged), name="merged_gate_up"),
    Case(unique_list, many(Nested), name="nested"),
    Case(token_masks, many(Matrices), name="matrices"),
    Case(mixtral_hit_first, StackedParameters, name="stacked_hit"),
    Case(mixtral, StackedTransposed, name="stacked_transposed"),
    Case(counted, StackedTransposed, name="stacked_segments"),
    Case(repeated_cast, StackedParameters, name="stacked_repeated"),
    Case(mixtral, Tied, name="tied"),
    Case(mixtral, many(Normed), name="layer_norm"),
    Case(unique_items, FlatParameters, name="flat_parameters"),
)

# Not understood yet, and run as written: (case, the refusal's code, words of its reason).
REFUSED: tuple[tuple[Case, str, str], ...] = (
    (Case(written_in_segments), "R408", "overwritten in place"),
    (
        Case(mixtral, many(Cumulative), name="cumulative"),
        "R301",
        "cumsum is not known on the rows of expert 0",
    ),
)
