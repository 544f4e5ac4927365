"""Layers that look like one and are none, or not the one they look like: fused or not, they run as eager.

Those of one spelling are in tests/passes/lookalikes.py, of loops in tests/passes/loop_lookalikes.py; here is
what lies between spellings, or outside of them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.adversarial.layer import Adversary, Case, D, E, K, everywhere, of_pairs, visited, with_ids
from tests.passes.spellings import dense_expand, gathered, grouped, grouped_gemm, segments

# -- ids that are no expert's ----------------------------------------------------------------------


def _sorted_products(m: Adversary, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    ordered, perm = torch.sort(ids.reshape(-1))
    y = m.experts.body.run(x[perm // K], grouped_gemm(m.experts, segments(m.experts, ordered), ordered))
    return (y[perm.argsort()].view(x.shape[0], K, D) * weights.unsqueeze(-1)).sum(1)


def minus_one_is_sorted_first(m: Adversary, x: Tensor) -> Tensor:
    """Rows of -1 lie where the first expert's begin, and are counted nowhere: all rows meet other weights."""
    weights, ids = m.route(x)
    return _sorted_products(m, x, ids.masked_fill(ids == 1, -1), weights)


def below_zero_is_sorted_first(m: Adversary, x: Tensor) -> Tensor:
    weights, ids = m.route(x)
    return _sorted_products(m, x, ids - 2, weights)


def past_the_end_is_sorted_last(m: Adversary, x: Tensor) -> Tensor:
    """Rows of E lie behind the last expert's and stay zero."""
    weights, ids = m.route(x)
    return _sorted_products(m, x, torch.where(ids == 1, E, ids), weights)


def past_the_end_by_a_table(m: Adversary, x: Tensor) -> Tensor:
    weights, ids = m.route(x)
    return _sorted_products(m, x, torch.tensor([0, 5, 1, 4])[ids], weights)


def handed_in_past_the_end(m: Adversary, x: Tensor, ids: Tensor) -> Tensor:
    return _sorted_products(m, x, ids.view(x.shape[0], K), m.scores(x)[:, :K])


def segments_behind_minus_one(m: Adversary, x: Tensor) -> Tensor:
    """Counts of what is in range, segments from the first row on."""
    weights, ids = m.route(x)
    ids = ids - 1
    ordered, perm = torch.sort(ids.reshape(-1))
    counts = (ids.reshape(-1, 1) == torch.arange(E)).sum(0)
    ends = counts.cumsum(0)
    y = torch.zeros(x.shape[0] * K, D)
    start = 0
    for e in range(E):
        stop = int(ends[e])
        y[perm[start:stop]] = m.each[e](x[perm[start:stop] // K])
        start = stop
    return (y.view(x.shape[0], K, D) * weights.unsqueeze(-1)).sum(1)


def loop_from_minus_one(m: Adversary, x: Tensor) -> Tensor:
    weights, ids = m.route(x)
    out = torch.zeros_like(x)
    for e in range(-1, E - 1):
        token, slot = torch.where(ids - 1 == e)
        out.index_add_(0, token, m.each[e](x[token]) * weights[token, slot, None])
    return out


def only_minus_one(m: Adversary, x: Tensor) -> Tensor:
    weights, ids = m.route(x)
    token, slot = torch.where(ids - 1 == -1)
    return torch.zeros_like(x).index_add(0, token, m.each[0](x[token]) * weights[token, slot, None])


def index_from_the_end(m: Adversary, x: Tensor) -> Tensor:
    """An index counts -1 from the end."""
    weights, ids = m.route(x)
    return gathered(m.experts, x, ids - 1, weights)


def overflowed(m: Adversary, x: Tensor) -> Tensor:
    """int8 wraps at 128."""
    weights, ids = m.route(x)
    return _sorted_products(m, x, (ids.to(torch.int8) + 126).long(), weights)


def rounded_by_half(m: Adversary, x: Tensor) -> Tensor:
    """Half precision holds even numbers only from 2048 on."""
    weights, ids = m.route(x)
    return gathered(m.experts, x, ((ids + 2048).half() - 2048).long() % E, weights)


def rounded_by_bfloat(m: Adversary, x: Tensor) -> Tensor:
    weights, ids = m.route(x)
    return grouped(m.experts, x, ((ids + 256).bfloat16().long() - 256).clamp(0, E - 1), weights)


# -- ids that repeat -------------------------------------------------------------------------------


def scattered_twice(m: Adversary, x: Tensor) -> Tensor:
    """Of two weights for one expert, a scatter keeps the last."""
    weights, ids = m.route(x)
    return dense_expand(m.experts, x, m.halves[ids], weights) + _scattered(m, x, m.halves[ids], weights)


def _scattered(m: Adversary, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    dense = torch.zeros(x.shape[0], E).scatter(1, ids, weights)
    return (everywhere(m.experts, x) * dense.t().unsqueeze(-1)).sum(0)


def scattered_by_a_clamp(m: Adversary, x: Tensor) -> Tensor:
    weights, ids = m.route(x)
    return _scattered(m, x, ids.clamp(max=2), weights)


def scattered_ids_handed_in(m: Adversary, x: Tensor, ids: Tensor) -> Tensor:
    return _scattered(m, x, ids.view(x.shape[0], K), m.scores(x)[:, :K])


def marked_twice(m: Adversary, x: Tensor) -> Tensor:
    """A mask holds 1 where an expert was chosen once or twice."""
    _, ids = m.route(x)
    mask = torch.zeros(x.shape[0], E).scatter(1, ids // 2, 1.0)
    return (everywhere(m.experts, x) * (mask * m.scores(x)).t().unsqueeze(-1)).sum(0)


def read_added_written_back(m: Adversary, x: Tensor) -> Tensor:
    """out[token] += y keeps one of a token's two rows of an expert."""
    weights, ids = m.route(x)
    ids, out = m.halves[ids], torch.zeros_like(x)
    for e in range(2):
        token, slot = torch.where(ids == e)
        out[token] += m.each[e](x[token]) * weights[token, slot, None]
    return out


# -- casts -----------------------------------------------------------------------------------------


def whole_weights(m: Adversary, x: Tensor) -> Tensor:
    """Dense weights cast to integers and back."""
    weights, ids = m.route(x)
    hot = F.one_hot(ids, E) * (4 * weights).unsqueeze(-1)
    return (everywhere(m.experts, x) * hot.long().sum(1).to(x.dtype).t().unsqueeze(-1)).sum(0)


def rounded_weights(m: Adversary, x: Tensor) -> Tensor:
    weights, ids = m.route(x)
    hot = (F.one_hot(ids, E) * (100 * weights).unsqueeze(-1)).to(torch.bfloat16)
    return (everywhere(m.experts, x) * hot.sum(1).to(x.dtype).t().unsqueeze(-1)).sum(0)


def true_weights(m: Adversary, x: Tensor) -> Tensor:
    """Dense weights cast to truth: 1 at the ids."""
    weights, ids = m.route(x)
    dense = torch.zeros(x.shape[0], E).scatter(1, ids, weights).bool().to(x.dtype)
    return (everywhere(m.experts, x) * dense.t().unsqueeze(-1)).sum(0)


def zeros_and_ones_are_rows(m: Adversary, x: Tensor) -> Tensor:
    """An integer mask picks the rows 0 and 1, not those where it is 1."""
    weights, ids = m.route(x)
    dense, out = torch.zeros(x.shape[0], E).scatter(1, ids, weights), torch.zeros_like(x)
    for e in range(E):
        mask = (ids == e).any(-1).long()
        out[mask] += m.each[e](x[mask]) * dense[mask, e, None]
    return out


# -- selections ------------------------------------------------------------------------------------


def experts_choose(m: Adversary, x: Tensor) -> Tensor:
    """Expert choice: each expert takes the tokens that it scores highest."""
    weights, tokens = m.scores(x).t().topk(2, dim=-1)
    y = m.experts.body.run(x[tokens], lambda name, rows: torch.bmm(rows, m.experts.in_out(name)))
    return torch.zeros_like(x).index_add(0, tokens.reshape(-1), (y * weights.unsqueeze(-1)).reshape(-1, D))


def experts_choose_in_a_loop(m: Adversary, x: Tensor) -> Tensor:
    weights, tokens = m.scores(x).topk(2, dim=0)
    out = torch.zeros_like(x)
    for e in range(E):
        out.index_add_(0, tokens[:, e], m.each[e](x[tokens[:, e]]) * weights[:, e, None])
    return out


def top_over_tokens(m: Adversary, x: Tensor) -> Tensor:
    """Top-k along the tokens, its places taken for experts."""
    scores = m.scores(x)
    ids = scores[:E].topk(K, dim=0)[1].t()[:, :K]
    return gathered(m.experts, x[:E], ids, scores[:E, :K]).sum(0, keepdim=True) + 0 * x


def top_in_each_half(m: Adversary, x: Tensor) -> Tensor:
    """The best of each half of the experts, both numbered from 0."""
    weights, ids = m.scores(x).view(x.shape[0], 2, 2).max(-1)
    return gathered(m.experts, x, ids, weights)


def sorted_scores(m: Adversary, x: Tensor) -> Tensor:
    """A full sort in place of a top-k, cut to its first two columns."""
    weights, ids = m.scores(x).sort(-1, descending=True)
    return gathered(m.experts, x, ids[:, :K].contiguous(), weights[:, :K].contiguous())


def ties(m: Adversary, x: Tensor) -> Tensor:
    """Half of the tokens score all experts alike."""
    weights, ids = m.route(torch.where(x[:, :1] > 0, x, 0.0))
    return grouped(m.experts, x, ids, weights)


# -- capacity --------------------------------------------------------------------------------------


def first_come(m: Adversary, x: Tensor) -> Tensor:
    """An expert takes two pairs, first slots of all tokens before second ones."""
    weights, ids = m.route(x)
    hot = F.one_hot(ids.t().reshape(-1), E)
    place = ((hot.cumsum(0) - hot) * hot).sum(-1).view(K, x.shape[0]).t()
    return gathered(m.experts, x, ids, weights * (place < 2))


def token_by_token(m: Adversary, x: Tensor) -> Tensor:
    """The same capacity counted token by token: others are dropped."""
    weights, ids = m.route(x)
    hot = F.one_hot(ids.reshape(-1), E)
    place = ((hot.cumsum(0) - hot) * hot).sum(-1).view(x.shape[0], K)
    return gathered(m.experts, x, ids, weights * (place < 2))


def dropped_to_the_first(m: Adversary, x: Tensor) -> Tensor:
    """What has no place goes to expert 0 with its own weight."""
    weights, ids = m.route(x)
    place = F.one_hot(ids.reshape(-1), E).cumsum(0).gather(1, ids.reshape(-1, 1)).view(x.shape[0], K)
    return grouped(m.experts, x, torch.where(place <= 2, ids, 0), weights)


# -- memory ----------------------------------------------------------------------------------------


def sum_starts_before_it_is_overwritten(m: Adversary, x: Tensor) -> Tensor:
    """What the first expert's rows are added to changes before the second's are."""
    weights, ids = m.route(x)
    start = x * 1
    view, out = start[:1], start
    for e in range(E):
        token, slot = torch.where(ids == e)
        out = out.index_add(0, token, m.each[e](x[token]) * weights[token, slot, None])
        if e == 0:
            start.mul_(2)
    return out + 0 * view.sum()


def scores_overwritten(m: Adversary, x: Tensor) -> Tensor:
    """The scores that weigh change after the ids were chosen, seen through an older view."""
    scores = m.scores(x)
    view = scores[:, :1]
    ids = scores.topk(K, dim=-1)[1]
    scores.mul_(0.5)
    return gathered(m.experts, x, ids, scores.gather(1, ids)) + 0 * view


def ids_overwritten(m: Adversary, x: Tensor) -> Tensor:
    weights, ids = m.route(x)
    y = visited(m, x, ids, weights)
    ids.zero_()
    return y + visited(m, x, ids, weights)


def weight_grows(m: Adversary, x: Tensor) -> Tensor:
    """A weight is changed between two uses of the experts."""
    weights, ids = m.route(x)
    y = gathered(m.experts, x, ids, weights)
    m.experts.get_parameter("down").mul_(1.5)
    return y + gathered(m.experts, x, ids, weights)


def table_changes(m: Adversary, x: Tensor) -> Tensor:
    """Experts change places after each call."""
    weights, ids = m.route(x)
    y = grouped(m.experts, x, m.table[ids], weights)
    m.table.copy_(m.table.roll(1))
    return y


def gain_changes(m: Adversary, x: Tensor) -> Tensor:
    weights, ids = m.route(x)
    y = grouped(m.experts, x * m.gain, ids, weights)
    m.gain.mul_(2)
    return y * m.gain


def rows_in_place(m: Adversary, x: Tensor) -> Tensor:
    """Rows change in place between the products, an older view of them is read at the end."""
    weights, ids = m.route(x)
    gemm = of_pairs(m.experts, ids.reshape(-1))
    h = gemm("gate_up", x.repeat_interleave(K, dim=0))
    gate, up = h.chunk(2, dim=-1)
    y = gemm("down", F.silu(gate) * up)
    h.mul_(0)
    return (y.view(x.shape[0], K, D) * weights.unsqueeze(-1)).sum(1) + gate.sum()


def output_changed_after(m: Adversary, x: Tensor) -> Tensor:
    """The first tokens' sums are overwritten."""
    weights, ids = m.route(x)
    out = grouped(m.experts, x, ids, weights)
    out[:1] = 0
    return out


def output_summed_twice(m: Adversary, x: Tensor) -> Tensor:
    """Rows already summed are brought together once more."""
    weights, ids = m.route(x)
    y = gathered(m.experts, x, ids, weights)
    return (y[ids.clamp(max=0)] * weights.unsqueeze(-1)).sum(1)


# -- sums ------------------------------------------------------------------------------------------


def own_rows_summed(m: Adversary, x: Tensor) -> Tensor:
    """The sum over the tokens of one expert, not over those of one token."""
    _, ids = m.route(x)
    out = torch.zeros(1, D)
    for e in range(E):
        token = torch.where(ids == e)[0]
        out = out + F.linear(x[None, token], m.experts.get_parameter("gate_up")[e]).sum(1)[:, :D]
    return out + 0 * x


def two_selections_in_one_sum(m: Adversary, x: Tensor) -> Tensor:
    """One pair of weights at two sets of ids, in one sum."""
    weights, ids = m.route(x)
    zeros, others, y = torch.zeros(x.shape[0], E), m.gate(-x).topk(K, -1)[1], everywhere(m.experts, x)
    one, other = (zeros.scatter(1, i, weights).t().unsqueeze(-1) for i in (ids, others))
    return (y * one + y * other).sum(0)


def maximum_over_slots(m: Adversary, x: Tensor) -> Tensor:
    weights, ids = m.route(x)
    y = m.experts.body.run(x.repeat_interleave(K, dim=0), of_pairs(m.experts, ids.reshape(-1)))
    return (y.view(x.shape[0], K, D) * weights.unsqueeze(-1)).amax(1)


def mean_over_slots(m: Adversary, x: Tensor) -> Tensor:
    weights, ids = m.route(x)
    y = m.experts.body.run(x.repeat_interleave(K, dim=0), of_pairs(m.experts, ids.reshape(-1)))
    return (y.view(x.shape[0], K, D) * weights.unsqueeze(-1)).mean(1)


def summed_over_all_tokens(m: Adversary, x: Tensor) -> Tensor:
    weights, ids = m.route(x)
    y = m.experts.body.run(x.repeat_interleave(K, dim=0), of_pairs(m.experts, ids.reshape(-1)))
    return (y.view(x.shape[0], K, D) * weights.unsqueeze(-1)).sum((0, 1)) + 0 * x


def slots_swapped_between_tokens(m: Adversary, x: Tensor) -> Tensor:
    """Second slots are those of the next token."""
    weights, ids = m.route(x)
    ids = torch.stack([ids[:, 0], ids[:, 1].roll(1)], dim=-1)
    return gathered(m.experts, x, ids, weights)


def second_slot_elsewhere(m: Adversary, x: Tensor) -> Tensor:
    """Slots 0 read x, slots 1 read x of another token."""
    weights, ids = m.route(x)
    rows = torch.stack([x, x.roll(1, 0)], dim=1).reshape(-1, D)
    y = m.experts.body.run(rows, of_pairs(m.experts, ids.reshape(-1)))
    return (y.view(x.shape[0], K, D) * weights.unsqueeze(-1)).sum(1)


def _past_the_end(tokens: int) -> tuple[Tensor, ...]:
    """ids handed in, some of them E: experts of another rank."""
    x, ids = with_ids(tokens)
    return x, torch.where(torch.rand(ids.shape) < 0.3, E, ids)


AS_EAGER: tuple[Case, ...] = (
    Case(minus_one_is_sorted_first),
    Case(below_zero_is_sorted_first),
    Case(past_the_end_is_sorted_last),
    Case(past_the_end_by_a_table),
    Case(handed_in_past_the_end, _past_the_end),
    Case(segments_behind_minus_one),
    Case(loop_from_minus_one),
    Case(only_minus_one),
    Case(index_from_the_end),
    Case(overflowed),
    Case(rounded_by_half),
    Case(rounded_by_bfloat),
    Case(scattered_twice),
    Case(scattered_by_a_clamp),
    Case(scattered_ids_handed_in, with_ids),
    Case(marked_twice),
    Case(read_added_written_back),
    Case(whole_weights),
    Case(rounded_weights),
    Case(true_weights),
    Case(zeros_and_ones_are_rows),
    Case(experts_choose),
    Case(experts_choose_in_a_loop),
    Case(top_over_tokens),
    Case(top_in_each_half),
    Case(sorted_scores),
    Case(ties),
    Case(first_come),
    Case(token_by_token),
    Case(dropped_to_the_first),
    Case(sum_starts_before_it_is_overwritten),
    Case(scores_overwritten),
    Case(ids_overwritten),
    Case(weight_grows),
    Case(table_changes),
    Case(gain_changes),
    Case(rows_in_place),
    Case(output_changed_after),
    Case(output_summed_twice),
    Case(own_rows_summed),
    Case(two_selections_in_one_sum),
    Case(maximum_over_slots),
    Case(mean_over_slots),
    Case(summed_over_all_tokens),
    Case(slots_swapped_between_tokens),
    Case(second_slot_elsewhere),
)
