"""Layers and routers that one obligation stands against: refused in its words, they run as eager."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.adversarial.layer import Adversary, Case, D, E, K, of_pairs
from tests.passes.spellings import dense_expand, gathered, grouped_gemm

# -- ids that repeat -------------------------------------------------------------------------------


def one_hot_of_repeated(m: Adversary, x: Tensor) -> Tensor:
    weights, ids = m.route(x)
    return dense_expand(m.experts, x, ids // 2, weights)


def counted_in_a_mask(m: Adversary, x: Tensor) -> Tensor:
    """A token that chose an expert twice counts once in a mask of ones, twice here."""
    weights, ids = m.route(x)
    ids = ids // 2
    ordered, perm = torch.sort(ids.reshape(-1))
    ends = F.one_hot(ids, E).sum(1).sum(0).cumsum(0).int()
    y = m.experts.body.run(x[perm // K], grouped_gemm(m.experts, ends, ordered))
    return (y[perm.argsort()].view(x.shape[0], K, D) * weights.unsqueeze(-1)).sum(1)


def _of_repeated(m: Adversary, x: Tensor, kind: str) -> Tensor:
    weights, ids = m.route(x)
    ids, out = ids // 2, torch.zeros_like(x)
    for e in range(2):
        chosen = ids == e
        token = {
            "summed": lambda chosen=chosen: torch.where(chosen.sum(-1))[0],
            "any": lambda chosen=chosen: torch.where(chosen.any(-1))[0],
            "copied": lambda chosen=chosen: torch.where(chosen)[0],
            "masked": lambda chosen=chosen: torch.where(chosen)[0],
        }[kind]()
        y = m.each[e](x[token])
        if kind == "masked":
            y = y * (weights * chosen).sum(-1)[token].unsqueeze(-1)
        if kind == "copied":
            out = out + torch.zeros_like(x).index_copy(0, token, y)
        else:
            out = out.index_add(0, token, y)
    return out


summed_of_repeated, any_of_repeated, copied_of_repeated, masked_of_repeated = (
    partial(_of_repeated, kind=kind) for kind in ("summed", "any", "copied", "masked")
)

# -- what rows meet --------------------------------------------------------------------------------


def weights_computed(m: Adversary, x: Tensor) -> Tensor:
    """An expert's rows meet a matrix that is made of the tokens."""
    weights, ids = m.route(x)
    out = torch.zeros_like(x)
    for e in range(E):
        token, slot = torch.where(ids == e)
        y = m.each[e](F.linear(x[token], x.t() @ x))
        out.index_add_(0, token, y * weights[token, slot, None])
    return out


def stacked_grow_before_the_sum(m: Adversary, x: Tensor) -> Tensor:
    """The experts' weights change after they were read, before the rows are summed."""
    weights, ids = m.route(x)
    y = m.experts.body.run(x.repeat_interleave(K, dim=0), of_pairs(m.experts, ids.reshape(-1)))
    m.experts.get_parameter("down").mul_(1.5)
    return (y.view(x.shape[0], K, D) * weights.unsqueeze(-1)).sum(1)


def _grows_in_the_loop(m: Adversary, x: Tensor, kind: str) -> Tensor:
    weights, ids = m.route(x)
    out = torch.zeros_like(x)
    for e in range(E):
        token, slot = torch.where(ids == e)
        y = F.linear(x[token], m.get_buffer(f"own_{e}"))
        y = y + F.linear(x[token], m.get_buffer("own_0")) if kind == "shared" else y
        out.index_add_(0, token, y * weights[token, slot, None])
        m.get_buffer("own_0").add_(0.5)
    return out


own_grows, shared_grows = (partial(_grows_in_the_loop, kind=kind) for kind in ("own", "shared"))


def segments_of_ids_below_zero(m: Adversary, x: Tensor) -> Tensor:
    """Counts leave out -1, whose rows are sorted first."""
    weights, ids = m.route(x)
    flat = (ids - 1).flatten()
    perm = flat.argsort()
    rows, token, own = x[perm // K], perm // K, weights.flatten()[perm]
    out, start = torch.zeros_like(x), 0
    for e, n in enumerate(torch.histc(flat.float(), E, 0, E - 1).long().tolist()):
        y = m.each[e](rows[start : start + n]) * own[start : start + n].unsqueeze(-1)
        out = out.index_add(0, token[start : start + n], y)
        start += n
    return out


def a_row_more(m: Adversary, x: Tensor) -> Tensor:
    """The sum has a row that is no token's."""
    weights, ids = m.route(x)
    out = torch.zeros(x.shape[0] + 1, D)
    for e in range(E):
        token, slot = torch.where(ids == e)
        out = out.index_add(0, token, m.each[e](x[token]) * weights[token, slot, None])
    return out


def last_hands_back_another(m: Adversary, x: Tensor) -> Tensor:
    """The last expert has no weights and hands back twice the token."""
    weights, ids = m.route(x)
    doubled, out = 2 * x, torch.zeros_like(x)
    for e in range(E):
        token, slot = torch.where(ids == e)
        y = m.each[e](x[token]) if e < E - 1 else doubled[token]
        out.index_add_(0, token, y * weights[token, slot, None])
    return out


# -- routers ---------------------------------------------------------------------------------------


def scores_fewer(m: Adversary, x: Tensor) -> Tensor:
    weights, ids = m.half_gate(x).softmax(-1).topk(1, dim=-1)
    return gathered(m.experts, x, ids, weights)


def ranks_half(m: Adversary, x: Tensor) -> Tensor:
    scores = m.scores(x)
    ids = scores[:, :2].topk(K, dim=-1)[1]
    return gathered(m.experts, x, ids, scores.gather(1, ids))


def ranks_others(m: Adversary, x: Tensor) -> Tensor:
    scores = m.scores(x)
    ids = (scores - 0.3).abs().topk(K, dim=-1)[1]
    return gathered(m.experts, x, ids, scores.gather(1, ids))


def weighs_by_another_top_k(m: Adversary, x: Tensor) -> Tensor:
    logits = m.gate(x)
    return gathered(m.experts, x, logits.topk(K, dim=-1)[1], (-logits).topk(K, dim=-1)[0].softmax(-1))


def divided_by_more(m: Adversary, x: Tensor) -> Tensor:
    weights, ids = m.route(x)
    return gathered(m.experts, x, ids, weights / (weights.sum(-1, keepdim=True) + x[:, :1].abs()))


def _in_groups(m: Adversary, x: Tensor, kind: str) -> Tensor:
    scores = m.gate(x).sigmoid()
    ranked = scores.flip(-1) if kind == "by others" else scores
    kept = ranked.view(-1, 2, 2).amax(-1).topk(1, dim=-1)[1]
    zeros = torch.full((x.shape[0], 2), 0.0) if kind == "on another value" else torch.zeros(x.shape[0], 2)
    mask = zeros.scatter(1, kept, 1).unsqueeze(-1).expand(-1, 2, 2).reshape(-1, E).bool()
    ids = scores.masked_fill(mask if kind == "rejected" else ~mask, 0.0).topk(K, dim=-1)[1]
    return gathered(m.experts, x, ids, scores.gather(1, ids))


groups_by_others, groups_on_another_value, groups_rejected = (
    partial(_in_groups, kind=kind) for kind in ("by others", "on another value", "rejected")
)


def logits_cast_twice(m: Adversary, x: Tensor) -> Tensor:
    weights, ids = m.gate(x).double().softmax(-1, dtype=torch.float32).topk(K, dim=-1)
    return gathered(m.experts, x, ids, weights)


def operands_of_two_types(m: Adversary, x: Tensor) -> Tensor:
    weights, ids = F.linear(x.double(), m.fine_gate).softmax(-1).topk(K, dim=-1)
    return gathered(m.experts, x, ids, weights.float())


def router_computed(m: Adversary, x: Tensor) -> Tensor:
    weights, ids = F.linear(x, m.gate.weight * 2).softmax(-1).topk(K, dim=-1)
    return gathered(m.experts, x, ids, weights)


def _router(run: partial[Tensor] | object, because: str) -> Case:
    return Case(run, refused="R2", because=because, router=True)  # type: ignore[arg-type]


REFUSED: tuple[Case, ...] = (
    Case(one_hot_of_repeated, refused="R404"),
    Case(counted_in_a_mask, refused="R404"),
    Case(summed_of_repeated, refused="R404"),
    Case(any_of_repeated, refused="R404"),
    Case(copied_of_repeated, refused="R404"),
    Case(masked_of_repeated, refused="R404"),
    Case(weights_computed, refused="R301", because="no tensor of the expert's own"),
    Case(stacked_grow_before_the_sum, refused="R408"),
    Case(own_grows, refused="R408"),
    Case(shared_grows, refused="R408"),
    Case(segments_of_ids_below_zero, refused="R401", because="below 0"),
    Case(a_row_more, refused="R303", because="are added to"),
    Case(last_hands_back_another, refused="R308", because="reads"),
    _router(scores_fewer, "another number of experts"),
    _router(ranks_half, "all the experts of a token together"),
    _router(ranks_others, "ranks other values"),
    _router(weighs_by_another_top_k, "not those of the selected logits"),
    _router(divided_by_more, "not their sum plus a number"),
    _router(groups_by_others, "ranked by other scores"),
    _router(groups_on_another_value, "scatter of ones onto zeros"),
    _router(groups_rejected, "complement of the groups kept"),
    _router(logits_cast_twice, "cast twice"),
    _router(operands_of_two_types, "cast to different types"),
    _router(router_computed, "computed, not a parameter"),
)
