"""Layers that do not look like one, though out[t] = Σ_k W[t,k] · f_{I[t,k]}(x[t]) holds: all must fuse.

What is returned beside the output, or done to ids and weights before they meet the experts, changes nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.adversarial.layer import (
    Adversary,
    Case,
    D,
    E,
    K,
    everywhere,
    of_pairs,
    visited,
    with_ids,
    with_words,
)
from tests.passes.spellings import dense_einsum, dense_expand, gathered, grouped, grouped_index_add

# -- which experts: any map from ids to weights ----------------------------------------------------


def table_gathered(m: Adversary, x: Tensor) -> Tensor:
    """Experts have places: a table says where each one's weights lie."""
    weights, ids = m.route(x)
    return gathered(m.experts, x, m.table[ids], weights)


def table_grouped(m: Adversary, x: Tensor) -> Tensor:
    weights, ids = m.route(x)
    return grouped(m.experts, x, m.table[ids], weights)


def table_visited(m: Adversary, x: Tensor) -> Tensor:
    weights, ids = m.route(x)
    return visited(m, x, m.table[ids], weights)


def table_of_two_for_one(m: Adversary, x: Tensor) -> Tensor:
    """Pairs of experts share weights, so that a token may have one twice."""
    weights, ids = m.route(x)
    return gathered(m.experts, x, m.halves[ids], weights)


def table_of_two_for_one_grouped(m: Adversary, x: Tensor) -> Tensor:
    weights, ids = m.route(x)
    return grouped_index_add(m.experts, x, m.halves[ids], weights)


def table_of_two_for_one_visited(m: Adversary, x: Tensor) -> Tensor:
    weights, ids = m.route(x)
    return visited(m, x, m.halves[ids], weights)


def table_in_the_code(m: Adversary, x: Tensor) -> Tensor:
    weights, ids = m.route(x)
    return grouped(m.experts, x, torch.tensor([3, 1, 0, 2])[ids], weights)


def numbered_backwards(m: Adversary, x: Tensor) -> Tensor:
    weights, ids = m.route(x)
    return grouped(m.experts, x, E - 1 - ids, weights)


def numbered_round(m: Adversary, x: Tensor) -> Tensor:
    weights, ids = m.route(x)
    return grouped(m.experts, x, (ids + 3) % E, weights)


def visited_in_any_order(m: Adversary, x: Tensor) -> Tensor:
    """Expert e of the ids is module (3e + 1) mod E, visited third, first, last, second."""
    weights, ids = m.route(x)
    out = torch.zeros_like(x)
    for e in (2, 0, 3, 1):
        token, slot = torch.where(ids == e)
        out.index_add_(0, token, m.each[(3 * e + 1) % E](x[token]) * weights[token, slot, None])
    return out


def one_module_for_all(m: Adversary, x: Tensor) -> Tensor:
    """All experts are one module."""
    weights, ids = m.route(x)
    return visited(m, x, ids, weights, [m.each[0]] * E)


def two_tied(m: Adversary, x: Tensor) -> Tensor:
    """The last expert is the first."""
    weights, ids = m.route(x)
    return visited(m, x, ids, weights, [m.each[0], m.each[1], m.each[2], m.each[0]])


def half_of_the_experts(m: Adversary, x: Tensor) -> Tensor:
    """The router scores fewer experts than there are weights."""
    weights, ids = m.gate(x)[:, :2].softmax(-1).topk(K, dim=-1)
    return gathered(m.experts, x, ids, weights)


# -- which ids -------------------------------------------------------------------------------------


def ids_repeat(m: Adversary, x: Tensor) -> Tensor:
    weights, ids = m.route(x)
    return gathered(m.experts, x, ids // 2, weights)


def ids_repeat_grouped(m: Adversary, x: Tensor) -> Tensor:
    weights, ids = m.route(x)
    return grouped(m.experts, x, ids // 2, weights)


def ids_all_the_first(m: Adversary, x: Tensor) -> Tensor:
    weights, ids = m.route(x)
    return gathered(m.experts, x, ids[:, :1].expand(-1, K).contiguous(), weights)


def ids_handed_in(m: Adversary, x: Tensor, ids: Tensor) -> Tensor:
    return gathered(m.experts, x, ids, m.scores(x)[:, :K])


def ids_handed_in_grouped(m: Adversary, x: Tensor, ids: Tensor) -> Tensor:
    return grouped(m.experts, x, ids.view(x.shape[0], K), m.scores(x)[:, :K])


def ids_handed_in_visited(m: Adversary, x: Tensor, ids: Tensor) -> Tensor:
    return visited(m, x, ids.view(x.shape[0], K), m.scores(x)[:, :K])


def hashed(m: Adversary, x: Tensor, words: Tensor) -> Tensor:
    """One expert a token, by a hash of its word."""
    ids = (words * 31 + 7) % E
    return gathered(m.experts, x, ids[:, None], m.scores(x).gather(1, ids[:, None]))


def hashed_twice(m: Adversary, x: Tensor, words: Tensor) -> Tensor:
    ids = torch.stack([words % E, (words // 7) % E], dim=-1)
    return grouped(m.experts, x, ids, torch.full((x.shape[0], K), 0.5))


def by_place(m: Adversary, x: Tensor) -> Tensor:
    """Token t goes to experts t and t + 1."""
    at = torch.arange(x.shape[0])
    return gathered(m.experts, x, torch.stack([at % E, (at + 1) % E], dim=-1), m.scores(x)[:, :K])


def slots_reversed(m: Adversary, x: Tensor) -> Tensor:
    weights, ids = m.route(x)
    return grouped(m.experts, x, ids.flip(-1), weights.flip(-1))


def slots_sorted(m: Adversary, x: Tensor) -> Tensor:
    """A token's experts in ascending order, its weights with them."""
    weights, ids = m.route(x)
    ids, order = ids.sort(-1)
    return grouped(m.experts, x, ids, weights.gather(-1, order))


def experts_first(m: Adversary, x: Tensor) -> Tensor:
    """Scores (E, T), top-k along the first dimension."""
    weights, ids = m.scores(x).t().topk(K, dim=0)
    return gathered(m.experts, x, ids.t(), weights.t())


def ids_in_few_bits(m: Adversary, x: Tensor) -> Tensor:
    weights, ids = m.route(x)
    return gathered(m.experts, x, ids.to(torch.uint8).to(torch.int8).long(), weights)


def ids_through_half(m: Adversary, x: Tensor) -> Tensor:
    """Small integers are whole numbers in half precision."""
    weights, ids = m.route(x)
    return gathered(m.experts, x, ids.half().long(), weights)


def ids_that_overflow(m: Adversary, x: Tensor) -> Tensor:
    """uint8 wraps at 256, in place too: whatever comes out are the ids."""
    weights, ids = m.route(x)
    small = ids.to(torch.uint8)
    small += torch.full_like(ids, 255)
    return gathered(m.experts, x, (small.long() * 3) % E, weights)


# -- ids of experts that are elsewhere -------------------------------------------------------------


def elsewhere_weighs_nothing(m: Adversary, x: Tensor) -> Tensor:
    """Expert parallelism: this rank has experts 1 to 3, pairs of the first are sent to any with weight 0."""
    weights, ids = m.route(x)
    here = ids >= 1
    return gathered(m.experts, x, torch.where(here, ids - 1, 0), weights * here)


def elsewhere_weighs_nothing_grouped(m: Adversary, x: Tensor) -> Tensor:
    weights, ids = m.route(x)
    here = ids < 3
    return grouped(m.experts, x, ids.clamp(max=2), weights.masked_fill(~here, 0.0))


def elsewhere_is_minus_one(m: Adversary, x: Tensor) -> Tensor:
    weights, ids = m.route(x)
    return visited(m, x, ids.masked_fill(ids == 1, -1), weights)


def elsewhere_is_past_the_end(m: Adversary, x: Tensor) -> Tensor:
    weights, ids = m.route(x)
    return visited(m, x, torch.where(ids == 1, E, ids), weights)


def elsewhere_has_a_column(m: Adversary, x: Tensor) -> Tensor:
    """one_hot over one class more than there are experts."""
    weights, ids = m.route(x)
    hot = F.one_hot(ids.masked_fill(ids == 1, E), E + 1).permute(2, 1, 0)
    out = torch.zeros_like(x)
    for e in range(E):
        slot, token = torch.where(hot[e])
        out.index_add_(0, token, m.each[e](x[token]) * weights[token, slot, None])
    return out


def own_ids_of_two(m: Adversary, x: Tensor) -> Tensor:
    """ids counted from this rank's first expert, the others' outside 0 … 1."""
    weights, ids = m.route(x)
    return visited(m, x, ids - 2, weights, list(m.each)[:2])


def nan_where_nobody_routes(m: Adversary, x: Tensor) -> Tensor:
    """Tokens of id -1 hold NaN, which reaches no expert."""
    weights, ids = m.route(x)
    gone = x[:, :1] > 0.5
    x = x.masked_fill(gone, torch.nan)
    return visited(m, x, torch.where(gone, -1, ids), weights)


# -- which weights ---------------------------------------------------------------------------------


def signed(m: Adversary, x: Tensor) -> Tensor:
    logits = m.gate(x).tanh()
    ids = logits.abs().topk(K, dim=-1)[1]
    return dense_expand(m.experts, x, ids, logits.gather(1, ids))


def negative(m: Adversary, x: Tensor) -> Tensor:
    weights, ids = m.route(x)
    return grouped(m.experts, x, ids, -weights)


def small_ones_dropped(m: Adversary, x: Tensor) -> Tensor:
    weights, ids = m.route(x)
    return grouped(m.experts, x, ids, torch.where(weights > 0.3, weights, 0.0))


def unweighted(m: Adversary, x: Tensor) -> Tensor:
    _, ids = m.route(x)
    y = m.experts.body.run(x.repeat_interleave(K, dim=0), of_pairs(m.experts, ids.reshape(-1)))
    return y.view(x.shape[0], K, D).sum(1)


def weighed_after_the_sum(m: Adversary, x: Tensor) -> Tensor:
    """A number a token scales the sum."""
    weights, ids = m.route(x)
    return gathered(m.experts, x, ids, weights) * torch.sigmoid(x[:, :1])


def weighed_twice(m: Adversary, x: Tensor) -> Tensor:
    weights, ids = m.route(x)
    return gathered(m.experts, x, ids, weights * weights)


def weights_in_place(m: Adversary, x: Tensor) -> Tensor:
    weights, ids = m.route(x)
    weights /= weights.sum(-1, keepdim=True)
    weights *= 2.5
    weights.clamp_(max=1.5)
    return grouped(m.experts, x, ids, weights)


def half_in_place(m: Adversary, x: Tensor) -> Tensor:
    """bfloat16 weights stay that when float32 is added in place."""
    weights, ids = m.route(x)
    weights = weights.to(torch.bfloat16)
    weights += torch.full_like(weights, 0.001, dtype=torch.float32)
    return grouped(m.experts, x, ids, weights.float())


# -- what is returned beside -----------------------------------------------------------------------


def logits_beside(m: Adversary, x: Tensor) -> tuple[Tensor, Tensor]:
    logits = m.gate(x)
    weights, ids = logits.softmax(-1).topk(K, dim=-1)
    return grouped(m.experts, x, ids, weights), logits


def everything_of_the_router_beside(m: Adversary, x: Tensor) -> tuple[Tensor, ...]:
    logits = m.gate(x)
    scores = logits.softmax(-1)
    weights, ids = scores.topk(K, dim=-1)
    return gathered(m.experts, x, ids, weights), logits, scores, weights, ids


def balance_loss(m: Adversary, x: Tensor) -> tuple[Tensor, Tensor]:
    """Switch Transformers, eq. 4: E · Σ_e (fraction of tokens) · (mean score)."""
    scores = m.scores(x)
    weights, ids = scores.topk(K, dim=-1)
    fraction = F.one_hot(ids, E).float().mean((0, 1))
    return grouped(m.experts, x, ids, weights), E * (fraction * scores.mean(0)).sum()


def balance_loss_of_a_loop(m: Adversary, x: Tensor) -> tuple[Tensor, Tensor]:
    scores = m.scores(x)
    weights, ids = scores.topk(K, dim=-1)
    counts = torch.zeros(E).scatter_add_(0, ids.reshape(-1), torch.ones(ids.numel()))
    return visited(m, x, ids, weights), (counts / ids.numel() * scores.mean(0)).sum()


def z_loss_and_counts(m: Adversary, x: Tensor) -> tuple[Tensor, ...]:
    logits = m.gate(x)
    weights, ids = logits.softmax(-1).topk(K, dim=-1)
    counts = torch.bincount(ids.reshape(-1), minlength=E)
    return grouped(m.experts, x, ids, weights), logits.logsumexp(-1).square().mean(), counts


def entropy_beside_a_dense_layer(m: Adversary, x: Tensor) -> tuple[Tensor, Tensor]:
    scores = m.scores(x)
    weights, ids = scores.topk(K, dim=-1)
    return dense_einsum(m.experts, x, ids, weights), -(scores * scores.log()).sum(-1)


def rows_beside(m: Adversary, x: Tensor) -> tuple[Tensor, Tensor]:
    """The experts' own rows are returned, too."""
    weights, ids = m.route(x)
    y = m.experts.body.run(x.repeat_interleave(K, dim=0), of_pairs(m.experts, ids.reshape(-1)))
    y = y.view(x.shape[0], K, D)
    return (y * weights.unsqueeze(-1)).sum(1), y


def hidden_rows_beside(m: Adversary, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the activation gives, pair by pair."""
    weights, ids = m.route(x)
    gemm = of_pairs(m.experts, ids.reshape(-1))
    gate, up = gemm("gate_up", x.repeat_interleave(K, dim=0)).chunk(2, dim=-1)
    h = F.silu(gate) * up
    return (gemm("down", h).view(x.shape[0], K, D) * weights.unsqueeze(-1)).sum(1), h


def dense_weights_beside(m: Adversary, x: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = m.route(x)
    dense = torch.zeros(x.shape[0], E).scatter(1, ids, weights)
    return (everywhere(m.experts, x) * dense.t().unsqueeze(-1)).sum(0), dense


# -- more than one layer ---------------------------------------------------------------------------


def one_score_matrix_two_selections(m: Adversary, x: Tensor) -> Tensor:
    """The best experts add, the worst of the others subtract; both are weighed by one matrix of scores."""
    scores = m.scores(x)
    zeros = torch.zeros_like(scores)
    best, worst = scores.topk(K, -1)[1], scores.topk(K, -1, largest=False)[1]
    add, subtract = (zeros.scatter(1, ids, 1.0) * scores for ids in (best, worst))
    y = (everywhere(m.experts, x) * add.t().unsqueeze(-1)).sum(0)
    return y - (everywhere(m.other, x) * subtract.t().unsqueeze(-1)).sum(0)


def one_pair_of_weights_two_selections(m: Adversary, x: Tensor) -> Tensor:
    weights, ids = m.route(x)
    zeros, others = torch.zeros(x.shape[0], E), m.gate(-x).topk(K, -1)[1]
    y = (everywhere(m.experts, x) * zeros.scatter(1, ids, weights).t().unsqueeze(-1)).sum(0)
    return y - (everywhere(m.other, x) * zeros.scatter(1, others, weights).t().unsqueeze(-1)).sum(0)


def dense_then_gathered(m: Adversary, x: Tensor) -> Tensor:
    """One weight value is read as a dense layer's and as a sparse one's."""
    weights, ids = m.route(x)
    return dense_expand(m.experts, x, ids, weights) + gathered(m.other, x, ids, weights)


def same_experts_twice(m: Adversary, x: Tensor) -> Tensor:
    weights, ids = m.route(x)
    y = x + grouped(m.experts, x, ids, weights)
    weights, ids = m.route(y)
    return y + grouped(m.experts, y, ids, weights)


def same_separate_experts_twice(m: Adversary, x: Tensor) -> Tensor:
    weights, ids = m.route(x)
    y = x + visited(m, x, ids, weights)
    weights, ids = m.route(y)
    return y + visited(m, y, ids, weights)


# -- around the layer ------------------------------------------------------------------------------


def normed_and_added(m: Adversary, x: Tensor) -> Tensor:
    y = F.rms_norm(x, (D,))
    weights, ids = m.route(y)
    return x + grouped(m.experts, y, ids, weights)


def routed_by_another_value(m: Adversary, x: Tensor) -> Tensor:
    """The router reads the input before its norm."""
    weights, ids = m.route(x)
    return grouped(m.experts, F.rms_norm(x, (D,)), ids, weights)


def into_a_buffer(m: Adversary, x: Tensor) -> Tensor:
    weights, ids = m.route(x)
    out = torch.empty_like(x)
    out.copy_(grouped(m.experts, x, ids, weights))
    return out


def onto_the_residual_in_place(m: Adversary, x: Tensor) -> Tensor:
    weights, ids = m.route(x)
    residual = x * m.gain
    residual += grouped(m.experts, x, ids, weights)
    return residual


def after_a_shared_expert(m: Adversary, x: Tensor) -> Tensor:
    weights, ids = m.route(x)
    shared: nn.Module = m.shared
    out: Tensor = shared(x)
    return out + visited(m, x, ids, weights)


MUST_FUSE: tuple[Case, ...] = (
    Case(table_gathered),
    Case(table_grouped),
    Case(table_visited),
    Case(table_of_two_for_one),
    Case(table_of_two_for_one_grouped),
    Case(table_of_two_for_one_visited),
    Case(table_in_the_code),
    Case(numbered_backwards),
    Case(numbered_round),
    Case(visited_in_any_order),
    Case(one_module_for_all),
    Case(two_tied),
    Case(half_of_the_experts),
    Case(ids_repeat),
    Case(ids_repeat_grouped),
    Case(ids_all_the_first),
    Case(ids_handed_in, with_ids),
    Case(ids_handed_in_grouped, with_ids),
    Case(ids_handed_in_visited, with_ids),
    Case(hashed, with_words),
    Case(hashed_twice, with_words),
    Case(by_place),
    Case(slots_reversed),
    Case(slots_sorted),
    Case(experts_first),
    Case(ids_in_few_bits),
    Case(ids_through_half),
    Case(ids_that_overflow),
    Case(elsewhere_weighs_nothing),
    Case(elsewhere_weighs_nothing_grouped),
    Case(elsewhere_is_minus_one),
    Case(elsewhere_is_past_the_end),
    Case(elsewhere_has_a_column),
    Case(own_ids_of_two),
    Case(nan_where_nobody_routes),
    Case(signed),
    Case(negative),
    Case(small_ones_dropped),
    Case(unweighted),
    Case(weighed_after_the_sum),
    Case(weighed_twice),
    Case(weights_in_place),
    Case(half_in_place),
    Case(logits_beside),
    Case(everything_of_the_router_beside),
    Case(balance_loss),
    Case(balance_loss_of_a_loop),
    Case(z_loss_and_counts),
    Case(entropy_beside_a_dense_layer),
    Case(rows_beside),
    Case(hidden_rows_beside),
    Case(dense_weights_beside),
    Case(one_score_matrix_two_selections, layers=2),
    Case(one_pair_of_weights_two_selections, layers=2),
    Case(dense_then_gathered, layers=2),
    Case(same_experts_twice, layers=2),
    Case(same_separate_experts_twice, layers=2),
    Case(normed_and_added),
    Case(routed_by_another_value),
    Case(into_a_buffer),
    Case(onto_the_residual_in_place),
    Case(after_a_shared_expert),
)
