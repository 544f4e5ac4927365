"""Layers that look like a known spelling and compute something else, or compute the same by another way.

Each takes (experts, x, ids, weights) like a spelling. Fused or not, the program must compute what it
computes, also with verification off.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.spellings import (
    Experts,
    Gemm,
    Route,
    Router,
    SharedExpert,
    Spec,
    Spelled,
    gathered,
    grouped_gemm,
    layer,
    one_hot,
    scattered,
    segments,
)


def _gathered_gemm(experts: Experts, flat: Tensor, down: Tensor | None = None) -> Gemm:
    """Each pair's own weights; the last product with those of `down` instead."""

    def gemm(name: str, rows: Tensor) -> Tensor:
        ids = flat if down is None or name != "down" else down
        return torch.bmm(experts.get_parameter(name)[ids], rows.unsqueeze(-1)).squeeze(-1)

    return gemm


def _combined(y: Tensor, weights: Tensor) -> Tensor:
    return (y.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(1)


# -- the permutation -------------------------------------------------------------------------------


def wrong_divisor(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    perm, ends, rows = _sorted(experts, ids)
    y = experts.body.run(x[perm // (ids.shape[-1] + 1)], grouped_gemm(experts, ends, rows))
    return _combined(y[perm.argsort()], weights)


def divisor_from_another_place(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The pairs are those of all K ids, the tokens those of one fewer slot each."""
    perm, ends, rows = _sorted(experts, ids)
    y = experts.body.run(x[perm // max(ids.shape[-1] - 1, 1) % x.shape[0]], grouped_gemm(experts, ends, rows))
    return _combined(y[perm.argsort()], weights)


def rounded_division(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """perm / K rounded to the nearest, not down."""
    perm, ends, rows = _sorted(experts, ids)
    tokens = (perm / ids.shape[-1]).round().long().clamp(max=x.shape[0] - 1)
    y = experts.body.run(x[tokens], grouped_gemm(experts, ends, rows))
    return _combined(y[perm.argsort()], weights)


def never_brought_back(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    perm, ends, rows = _sorted(experts, ids)
    y = experts.body.run(x[perm // ids.shape[-1]], grouped_gemm(experts, ends, rows))
    return _combined(y, weights)


def permuted_again(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The permutation where its inverse belongs."""
    perm, ends, rows = _sorted(experts, ids)
    y = experts.body.run(x[perm // ids.shape[-1]], grouped_gemm(experts, ends, rows))
    return _combined(y[perm], weights)


def inverse_backwards(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    perm, ends, rows = _sorted(experts, ids)
    y = experts.body.run(x[perm // ids.shape[-1]], grouped_gemm(experts, ends, rows))
    return _combined(y[perm.argsort(descending=True)], weights)


def inverse_of_another(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Brought back by the inverse of a permutation that sorts other ids."""
    perm, ends, rows = _sorted(experts, ids)
    other = torch.sort(ids.flip(0).reshape(-1))[1]
    y = experts.body.run(x[perm // ids.shape[-1]], grouped_gemm(experts, ends, rows))
    return _combined(y[other.argsort()], weights)


def descending(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    perm, ends, rows = _sorted(experts, ids, descending=True)
    y = experts.body.run(x[perm // ids.shape[-1]], grouped_gemm(experts, ends, rows))
    return _combined(y[perm.argsort()], weights)


def counts_of_others(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    perm, _, rows = _sorted(experts, ids)
    _, ends, _ = _sorted(experts, (ids + 1) % experts.count)
    y = experts.body.run(x[perm // ids.shape[-1]], grouped_gemm(experts, ends, rows))
    return _combined(y[perm.argsort()], weights)


def counts_shifted(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The histogram is of the ids plus one, computed in floating point."""
    perm, _, rows = _sorted(experts, ids)
    shifted = (rows.float() + 1).clamp(max=experts.count - 1)
    ends = segments(experts, shifted)
    y = experts.body.run(x[perm // ids.shape[-1]], grouped_gemm(experts, ends, rows))
    return _combined(y[perm.argsort()], weights)


def counts_as_flags(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Whether each expert has rows, in place of how many."""
    perm, _, rows = _sorted(experts, ids)
    counts = torch.histc(rows.float(), bins=experts.count, min=0, max=experts.count - 1)
    ends = torch.cumsum(counts.to(torch.bool), dim=0, dtype=torch.int32)
    y = experts.body.run(x[perm // ids.shape[-1]], grouped_gemm(experts, ends, rows))
    return _combined(y[perm.argsort()], weights)


def choice_major(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Pairs numbered slot by slot, tokens by remainder: the same function by another numbering."""
    flat = ids.t().reshape(-1)
    y = experts.body.run(x.repeat(ids.shape[-1], 1), _gathered_gemm(experts, flat))
    y = y * weights.t().reshape(-1, 1)
    return y.view(ids.shape[-1], x.shape[0], x.shape[1]).sum(0)


def ids_choice_major(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The ids are flattened slot by slot, the rows and the weights token by token."""
    rows = x.repeat_interleave(ids.shape[-1], dim=0)
    y = experts.body.run(rows, _gathered_gemm(experts, ids.t().reshape(-1)))
    return _combined(y, weights)


def weights_choice_major(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    rows = x.repeat_interleave(ids.shape[-1], dim=0)
    y = experts.body.run(rows, _gathered_gemm(experts, ids.reshape(-1))) * weights.t().reshape(-1, 1)
    return y.view(x.shape[0], ids.shape[-1], x.shape[1]).sum(1)


def weights_reversed(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """A token's weights the other way round than its ids."""
    rows = x.repeat_interleave(ids.shape[-1], dim=0)
    return _combined(experts.body.run(rows, _gathered_gemm(experts, ids.reshape(-1))), weights.flip(1))


def weights_unpermuted(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Sorted rows meet weights that are not sorted."""
    perm, ends, rows = _sorted(experts, ids)
    y = experts.body.run(x[perm // ids.shape[-1]], grouped_gemm(experts, ends, rows)) * weights.reshape(-1, 1)
    return y[perm.argsort()].view(x.shape[0], ids.shape[-1], x.shape[1]).sum(1)


def summed_over_tokens(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """(K, T, D) rows read as (T, K, D) where T = K, summed along the other dimension."""
    rows = x.repeat_interleave(ids.shape[-1], dim=0)
    y = experts.body.run(rows, _gathered_gemm(experts, ids.reshape(-1))) * weights.reshape(-1, 1)
    return y.view(x.shape[0], ids.shape[-1], x.shape[1]).sum(0)[: x.shape[0]] + 0 * x[: ids.shape[-1]]


def added_to_other_tokens(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    perm, ends, rows = _sorted(experts, ids)
    y = experts.body.run(x[perm // ids.shape[-1]], grouped_gemm(experts, ends, rows))
    y = y * weights.reshape(-1)[perm].unsqueeze(-1)
    return torch.zeros_like(x).index_add(0, perm % x.shape[0], y)


def added_onto_the_input(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The sum starts at x, not at zero."""
    perm, ends, rows = _sorted(experts, ids)
    y = experts.body.run(x[perm // ids.shape[-1]], grouped_gemm(experts, ends, rows))
    y = y * weights.reshape(-1)[perm].unsqueeze(-1)
    return x.clone().index_add_(0, perm // ids.shape[-1], y)


# -- the experts -----------------------------------------------------------------------------------


def other_ids_down(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The second product uses another expert than the first."""
    flat = ids.reshape(-1)
    rows = x.repeat_interleave(ids.shape[-1], dim=0)
    return _combined(
        experts.body.run(rows, _gathered_gemm(experts, flat, (flat + 1) % experts.count)), weights
    )


def next_expert(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Every product uses the expert after the one chosen: ids like any others."""
    flat = ((ids + 1) % experts.count).reshape(-1)
    return _combined(
        experts.body.run(x.repeat_interleave(ids.shape[-1], dim=0), _gathered_gemm(experts, flat)), weights
    )


def counted_from_the_end(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """ids − 1 is −1 for expert 0, which an index reads as the last expert."""
    flat = (ids - 1).reshape(-1)
    return _combined(
        experts.body.run(x.repeat_interleave(ids.shape[-1], dim=0), _gathered_gemm(experts, flat)), weights
    )


def searched_below_zero(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """ids − 1, whose −1 a search puts with expert 0."""
    sorted_ids, perm = torch.sort((ids - 1).reshape(-1))
    ends = torch.searchsorted(sorted_ids, torch.arange(experts.count), right=True).int()
    y = experts.body.run(x[perm // ids.shape[-1]], grouped_gemm(experts, ends, sorted_ids))
    return _combined(y[perm.argsort()], weights)


def swapped_gate_and_up(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    gemm = _gathered_gemm(experts, ids.reshape(-1))
    up, gate = gemm("gate_up", x.repeat_interleave(ids.shape[-1], dim=0)).chunk(2, dim=-1)
    return _combined(gemm("down", F.silu(gate) * up), weights)


def gate_of_another_expert(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    gemm, other = (_gathered_gemm(experts, i.reshape(-1)) for i in (ids, ids.flip(1)))
    rows = x.repeat_interleave(ids.shape[-1], dim=0)
    gate, up = other("gate_up", rows).chunk(2, dim=-1)[0], gemm("gate_up", rows).chunk(2, dim=-1)[1]
    return _combined(gemm("down", F.silu(gate) * up), weights)


def two_inputs(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    gemm = _gathered_gemm(experts, ids.reshape(-1))
    k = ids.shape[-1]
    gate = gemm("gate_up", x.repeat_interleave(k, dim=0)).chunk(2, dim=-1)[0]
    up = gemm("gate_up", x.flip(0).repeat_interleave(k, dim=0)).chunk(2, dim=-1)[1]
    return _combined(gemm("down", F.silu(gate) * up), weights)


def rows_of_other_tokens(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    rows = x.roll(1, 0).repeat_interleave(ids.shape[-1], dim=0)
    return _combined(experts.body.run(rows, _gathered_gemm(experts, ids.reshape(-1))), weights)


def more_rows_than_tokens(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The pairs' tokens are the first rows of a longer input."""
    perm, ends, rows = _sorted(experts, ids)
    longer = torch.cat([x, x + 1])
    y = experts.body.run(longer[perm // ids.shape[-1]], grouped_gemm(experts, ends, rows))
    return _combined(y[perm.argsort()], weights)


def one_row_for_all(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """One row broadcast against every pair's weights."""
    gemm_ids = ids.reshape(-1)

    def gemm(name: str, rows: Tensor) -> Tensor:
        return torch.matmul(experts.get_parameter(name)[gemm_ids], rows.unsqueeze(-1)).squeeze(-1)

    return _combined(experts.body.run(x.mean(0, keepdim=True).repeat_interleave(1, dim=0), gemm), weights)


def crossed_rows(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """(T, 1, K) rows against (1, T, K) weights: a product brings every token to every token's experts."""
    tokens, k = ids.shape
    by_token = ids.view(1, tokens, k)

    def gemm(name: str, rows: Tensor) -> Tensor:
        return torch.matmul(experts.get_parameter(name)[by_token], rows.unsqueeze(-1)).squeeze(-1)

    y = experts.body.run(x.repeat_interleave(k, dim=0).view(tokens, 1, k, x.shape[1]), gemm)
    return (y * weights.view(1, tokens, k, 1)).sum(2).sum(0)


def crossed_sum(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The same crossing by an addition of rows."""
    y = experts.body.run(x.repeat_interleave(ids.shape[-1], dim=0), _gathered_gemm(experts, ids.reshape(-1)))
    y = y * weights.reshape(-1, 1)
    tokens, k = ids.shape
    return (y.view(tokens, 1, k, x.shape[1]) + y.view(1, tokens, k, x.shape[1])).sum(2).sum(0)


def expanded_single_row(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    mean = x.mean(0, keepdim=True)
    rows = mean.unsqueeze(1).expand(x.shape[0], ids.shape[-1], x.shape[1]).reshape(-1, x.shape[1])
    return _combined(experts.body.run(rows, _gathered_gemm(experts, ids.reshape(-1))), weights)


def bias_on_the_sum(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Something is added between the experts and the sum over slots: to every slot."""
    rows = x.repeat_interleave(ids.shape[-1], dim=0)
    y = experts.body.run(rows, _gathered_gemm(experts, ids.reshape(-1))) + x.repeat_interleave(
        ids.shape[-1], dim=0
    )
    return _combined(y, weights) + 1


def clamped_rows(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """A running maximum along the rows, not along the width."""
    rows = x.repeat_interleave(ids.shape[-1], dim=0)
    y = experts.body.run(rows, _gathered_gemm(experts, ids.reshape(-1)))
    return _combined(torch.cummax(y, dim=0).values, weights)


def normalised_over_slots(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    rows = x.repeat_interleave(ids.shape[-1], dim=0)
    y = experts.body.run(rows, _gathered_gemm(experts, ids.reshape(-1))).view(*ids.shape, -1)
    return ((y - y.mean(1, keepdim=True)) * weights.unsqueeze(-1)).sum(1)


def rows_and_width_mixed(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """A view that takes numbers of several rows for one row."""
    rows = x.repeat_interleave(ids.shape[-1], dim=0)
    y = experts.body.run(rows, _gathered_gemm(experts, ids.reshape(-1))) * weights.reshape(-1, 1)
    k = ids.shape[-1]
    return y.view(x.shape[0], x.shape[1], k).sum(-1)


def transposed_rows(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    rows = x.repeat_interleave(ids.shape[-1], dim=0)
    y = (experts.body.run(rows, _gathered_gemm(experts, ids.reshape(-1))) * weights.reshape(-1, 1)).view(
        x.shape[0], ids.shape[-1], x.shape[1]
    )
    return y.transpose(0, 1).reshape(x.shape[0], ids.shape[-1], x.shape[1]).sum(1)


def dropped_last_slot(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    rows = x.repeat_interleave(ids.shape[-1], dim=0)
    y = experts.body.run(rows, _gathered_gemm(experts, ids.reshape(-1))).view(*ids.shape, -1)
    return (y[:, :-1] * weights[:, :-1].unsqueeze(-1)).sum(1)


def shifted_rows(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    rows = x.repeat_interleave(ids.shape[-1], dim=0)
    y = experts.body.run(rows, _gathered_gemm(experts, ids.reshape(-1)))
    return _combined(torch.cat([y[1:], y[:1]]), weights)


# -- dense -----------------------------------------------------------------------------------------


def _dense(experts: Experts, x: Tensor) -> Tensor:
    def gemm(name: str, rows: Tensor) -> Tensor:
        return torch.matmul(rows, experts.in_out(name))

    return experts.body.run(x.unsqueeze(0).expand(experts.count, -1, -1), gemm)


def dense_on_ones(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Weights written onto ones: every other expert weighs 1."""
    dense = torch.ones(x.shape[0], experts.count).scatter(1, ids, weights)
    return (_dense(experts, x) * dense.t().unsqueeze(-1)).sum(0)


def dense_plus_one(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    return (_dense(experts, x) * (scattered(experts, ids, weights).t().unsqueeze(-1) + 1)).sum(0)


def dense_biased_after(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """A constant is added after the weight: every expert adds it to every token."""
    return (_dense(experts, x) * scattered(experts, ids, weights).t().unsqueeze(-1) + 0.1).sum(0)


def dense_exp(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """exp of the weights: 1 where the weights are 0."""
    return (_dense(experts, x) * scattered(experts, ids, weights).t().exp().unsqueeze(-1)).sum(0)


def dense_ratio(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """w / (w + 1): still zero off the ids, by a longer way."""
    dense = scattered(experts, ids, weights).t().unsqueeze(-1)
    return (_dense(experts, x) * (dense / (dense + 1))).sum(0)


def dense_multiplied(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """scatter with reduce="multiply": zero times the weight."""
    dense = torch.zeros(x.shape[0], experts.count).scatter(1, ids, weights, reduce="multiply")
    return (_dense(experts, x) * dense.t().unsqueeze(-1)).sum(0)


def dense_mask(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """A mask of ones at the ids times scores over all experts."""
    scores = torch.sigmoid(x[:, : experts.count])
    mask = torch.zeros(x.shape[0], experts.count).scatter(1, ids, 1.0)
    return (_dense(experts, x) * (mask * scores).t().unsqueeze(-1)).sum(0)


def dense_normalised(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    dense = one_hot(experts, ids, weights)
    dense = dense / (dense.sum(-1, keepdim=True) + 1e-9)
    return (_dense(experts, x) * dense.t().unsqueeze(-1)).sum(0)


def dense_squared(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    dense = scattered(experts, ids, weights).t().unsqueeze(-1)
    return (_dense(experts, x) * dense * dense).sum(0)


def dense_untransposed(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """(T, E) read as (E, T) without transposing it."""
    dense = scattered(experts, ids, weights).reshape(experts.count, -1)
    return (_dense(experts, x) * dense.unsqueeze(-1)).sum(0)


def dense_repeated_ids(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Every slot names the first expert: a scatter keeps one of the weights."""
    same = ids[:, :1].expand(-1, ids.shape[-1])
    return (_dense(experts, x) * scattered(experts, same, weights).t().unsqueeze(-1)).sum(0)


def dense_top_over_tokens(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Experts choose tokens: the ids of one row may repeat."""
    chosen = (x[:, : experts.count] * 100).topk(2, dim=0)[1].t() % experts.count
    values = torch.sigmoid(x[: experts.count, :2])
    dense = torch.zeros(chosen.shape[0], experts.count).scatter(1, chosen, values[: chosen.shape[0]])
    return (_dense(experts, x)[:, : chosen.shape[0]] * dense.t().unsqueeze(-1)).sum(0).mean(0) + 0 * x


def all_experts_unweighted(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    return _dense(experts, x).sum(0) * weights.sum(-1, keepdim=True)


# -- memory ----------------------------------------------------------------------------------------


def input_overwritten(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """x changes after the experts read it and before their rows are combined."""
    rows = x.repeat_interleave(ids.shape[-1], dim=0)
    y = experts.body.run(rows, _gathered_gemm(experts, ids.reshape(-1)))
    view = x[:, :3]
    x.mul_(0.5)
    return _combined(y, weights) + 0 * view.sum()


def weights_overwritten(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    view = weights[:, :1]
    weights.mul_(2)
    rows = x.repeat_interleave(ids.shape[-1], dim=0)
    return _combined(experts.body.run(rows, _gathered_gemm(experts, ids.reshape(-1))), weights) + view


def ids_overwritten(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The ids change between the two products, seen through an older view."""
    gemm, view = _gathered_gemm(experts, ids.reshape(-1)), ids[:, :1]
    gate, up = gemm("gate_up", x.repeat_interleave(ids.shape[-1], dim=0)).chunk(2, dim=-1)
    ids.add_(1).remainder_(experts.count)
    y = _gathered_gemm(experts, ids.reshape(-1))("down", F.silu(gate) * up)
    return _combined(y, weights) + 0 * view


def _sorted(experts: Experts, ids: Tensor, *, descending: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """(permutation, where each expert's rows end, the ids sorted)."""
    sorted_ids, perm = torch.sort(ids.reshape(-1), descending=descending)
    return perm, segments(experts, sorted_ids), sorted_ids


LOOKALIKES: tuple[Spelled, ...] = (
    wrong_divisor,
    divisor_from_another_place,
    rounded_division,
    never_brought_back,
    permuted_again,
    inverse_backwards,
    inverse_of_another,
    descending,
    counts_of_others,
    counts_shifted,
    counts_as_flags,
    choice_major,
    ids_choice_major,
    weights_choice_major,
    weights_reversed,
    weights_unpermuted,
    summed_over_tokens,
    added_to_other_tokens,
    added_onto_the_input,
    other_ids_down,
    next_expert,
    counted_from_the_end,
    searched_below_zero,
    swapped_gate_and_up,
    gate_of_another_expert,
    two_inputs,
    rows_of_other_tokens,
    more_rows_than_tokens,
    one_row_for_all,
    crossed_rows,
    crossed_sum,
    expanded_single_row,
    bias_on_the_sum,
    clamped_rows,
    normalised_over_slots,
    rows_and_width_mixed,
    transposed_rows,
    dropped_last_slot,
    shifted_rows,
    dense_on_ones,
    dense_plus_one,
    dense_biased_after,
    dense_exp,
    dense_ratio,
    dense_multiplied,
    dense_mask,
    dense_normalised,
    dense_squared,
    dense_untransposed,
    dense_repeated_ids,
    dense_top_over_tokens,
    all_experts_unweighted,
    input_overwritten,
    weights_overwritten,
    ids_overwritten,
)


# -- routers ------------------------------------------------------------------------------------------


def _per_group_softmax(router: Router, x: Tensor) -> tuple[Tensor, Tensor]:
    """Each half of the experts has a softmax of its own."""
    scores = router.logits(x).view(x.shape[0], 2, -1).softmax(-1).view(x.shape[0], -1)
    return top(scores, router.top_k)


def _top_of_each_half(router: Router, x: Tensor) -> tuple[Tensor, Tensor]:
    """One expert out of each half, both numbered within their half."""
    scores = router.logits(x).softmax(-1).view(2 * x.shape[0], -1)
    weights, ids = scores.topk(router.top_k // 2, dim=-1)
    return weights.view(x.shape[0], -1), ids.view(x.shape[0], -1)


def _softmax_over_tokens(router: Router, x: Tensor) -> tuple[Tensor, Tensor]:
    return top(router.logits(x).softmax(0), router.top_k)


def _normalised_over_tokens(router: Router, x: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = top(router.logits(x).softmax(-1), router.top_k)
    return weights / weights.sum(0, keepdim=True), ids


def _normalised_by_all(router: Router, x: Tensor) -> tuple[Tensor, Tensor]:
    """Divided by the sum of other scores than those selected."""
    scores = router.logits(x).sigmoid()
    weights, ids = top(scores, router.top_k)
    return weights / scores.sum(-1, keepdim=True), ids


def _smallest(router: Router, x: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = router.logits(x).softmax(-1).topk(router.top_k, dim=-1, largest=False)
    return weights, ids


def _twice_the_bias(router: Router, x: Tensor) -> tuple[Tensor, Tensor]:
    scores = router.logits(x).sigmoid()
    ids = torch.add(scores, router.selection_bias, alpha=3).topk(router.top_k, dim=-1)[1]
    return scores.gather(1, ids), ids


def _biased_weights(router: Router, x: Tensor) -> tuple[Tensor, Tensor]:
    """The bias selects and weighs."""
    return top(router.logits(x).sigmoid() + router.selection_bias, router.top_k)


def _scores_of_other_experts(router: Router, x: Tensor) -> tuple[Tensor, Tensor]:
    scores = router.logits(x).softmax(-1)
    ids = scores.topk(router.top_k, dim=-1)[1]
    return scores.gather(1, (ids + 1) % router.count), ids


def _two_top_ks(router: Router, x: Tensor) -> tuple[Tensor, Tensor]:
    """The best K of the scores weigh the best K of the logits' negatives."""
    scores = router.logits(x).softmax(-1)
    return scores.topk(router.top_k, dim=-1)[0], (-scores).topk(router.top_k, dim=-1)[1]


def _other_input(router: Router, x: Tensor) -> tuple[Tensor, Tensor]:
    return top(router.logits(x.roll(1, 0)).softmax(-1), router.top_k)


def _bias_updated(router: Router, x: Tensor) -> tuple[Tensor, Tensor]:
    """The selection bias moves after each selection, in forward."""
    scores = router.logits(x).sigmoid()
    ids = (scores + router.selection_bias).topk(router.top_k, dim=-1)[1]
    router.selection_bias.add_(0.5 * torch.linspace(-1, 1, router.count))
    return scores.gather(1, ids), ids


def _weights_overwritten(router: Router, x: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = top(router.logits(x).softmax(-1), router.top_k)
    view = weights[:, :1]
    weights.add_(1)
    return weights * (1 + 0 * view), ids


def _masked(
    router: Router, x: Tensor, best: Callable[[Tensor], Tensor], widen: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    scores = router.logits(x).sigmoid()
    kept = best(scores).topk(1, dim=-1)[1]
    mask = widen(torch.zeros(x.shape[0], 2).scatter(1, kept, 1))
    ids = scores.masked_fill(~mask.bool(), 0.0).topk(router.top_k, dim=-1)[1]
    return scores.gather(1, ids), ids


def _interleaved_groups(router: Router, x: Tensor) -> tuple[Tensor, Tensor]:
    """Expert e belongs to group e mod 2."""
    half = router.count // 2
    return _masked(
        router,
        x,
        lambda s: s.view(-1, half, 2).amax(1),
        lambda m: m.unsqueeze(1).expand(-1, half, 2).reshape(-1, router.count),
    )


def _groups_scored_otherwise(router: Router, x: Tensor) -> tuple[Tensor, Tensor]:
    """Contiguous groups are masked, interleaved ones scored."""
    half = router.count // 2
    return _masked(
        router,
        x,
        lambda s: s.view(-1, half, 2).amax(1),
        lambda m: m.unsqueeze(-1).expand(-1, 2, half).reshape(-1, router.count),
    )


def _groups_by_minimum(router: Router, x: Tensor) -> tuple[Tensor, Tensor]:
    half = router.count // 2
    return _masked(
        router,
        x,
        lambda s: s.view(-1, 2, half).amin(-1),
        lambda m: m.unsqueeze(-1).expand(-1, 2, half).reshape(-1, router.count),
    )


def _groups_by_three(router: Router, x: Tensor) -> tuple[Tensor, Tensor]:
    """The three best of a group, not two."""
    half = router.count // 2
    return _masked(
        router,
        x,
        lambda s: s.view(-1, 2, half).topk(3, dim=-1)[0].sum(-1),
        lambda m: m.unsqueeze(-1).expand(-1, 2, half).reshape(-1, router.count),
    )


def _groups_rejected(router: Router, x: Tensor) -> tuple[Tensor, Tensor]:
    """The best group is the one masked out."""
    half = router.count // 2
    return _masked(
        router,
        x,
        lambda s: s.view(-1, 2, half).amax(-1),
        lambda m: 1 - m.unsqueeze(-1).expand(-1, 2, half).reshape(-1, router.count),
    )


def _groups_swapped(router: Router, x: Tensor) -> tuple[Tensor, Tensor]:
    """The mask covers the other group's experts."""
    half = router.count // 2
    return _masked(
        router,
        x,
        lambda s: s.view(-1, 2, half).amax(-1),
        lambda m: m.flip(-1).unsqueeze(-1).expand(-1, 2, half).reshape(-1, router.count),
    )


def top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(values, ids) of the k largest."""
    weights, ids = scores.topk(k, dim=-1)
    return weights, ids


ROUTER_LOOKALIKES: tuple[Route, ...] = tuple(
    Route(run.__name__.strip("_").replace("_", " "), run, fused=False)
    for run in (
        _per_group_softmax,
        _top_of_each_half,
        _softmax_over_tokens,
        _normalised_over_tokens,
        _normalised_by_all,
        _smallest,
        _twice_the_bias,
        _biased_weights,
        _scores_of_other_experts,
        _two_top_ks,
        _other_input,
        _bias_updated,
        _weights_overwritten,
        _interleaved_groups,
        _groups_scored_otherwise,
        _groups_by_minimum,
        _groups_by_three,
        _groups_rejected,
        _groups_swapped,
    )
)


# -- shared experts -----------------------------------------------------------------------------------


class Beside(nn.Module):
    """A layer whose routed sum `join` puts together with its shared expert."""

    def __init__(self, join: Join) -> None:
        super().__init__()
        self.routed, self.join = layer(Spec(gathered)), join
        shared = layer(Spec(gathered, shared="plain")).shared
        assert shared is not None
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self.shared, x, self.routed(x))


Join = Callable[[SharedExpert, Tensor, Tensor], Tensor]


def shared_of_other_tokens(shared: SharedExpert, x: Tensor, y: Tensor) -> Tensor:
    return y + shared.forward(x.roll(1, 1))


def shared_of_swapped_dimensions(shared: SharedExpert, x: Tensor, y: Tensor) -> Tensor:
    """(S, B) read as (B, S): rows in another order."""
    return y + shared.forward(x.transpose(0, 1)).reshape(y.shape)


def shared_of_the_result(shared: SharedExpert, x: Tensor, y: Tensor) -> Tensor:
    return y + shared.forward(y)


def shared_subtracted(shared: SharedExpert, x: Tensor, y: Tensor) -> Tensor:
    return y - shared.forward(x)


def shared_doubled(shared: SharedExpert, x: Tensor, y: Tensor) -> Tensor:
    return torch.add(y, shared.forward(x), alpha=2)


def shared_multiplied(shared: SharedExpert, x: Tensor, y: Tensor) -> Tensor:
    return y * shared.forward(x)


def shared_of_the_first_sequence(shared: SharedExpert, x: Tensor, y: Tensor) -> Tensor:
    """One sequence's result broadcast to all."""
    return y + shared.forward(x[:1])


def shared_summed_over_tokens(shared: SharedExpert, x: Tensor, y: Tensor) -> Tensor:
    return y + shared.forward(x).sum(1, keepdim=True)


def shared_crossed(shared: SharedExpert, x: Tensor, y: Tensor) -> Tensor:
    """Gate and up of rows that a broadcast brings together."""
    if x.shape[0] != 1:
        return y + shared.forward(x)
    gate = F.silu(shared.gate.forward(x.view(1, x.shape[1], x.shape[2])))
    up = shared.up.forward(x.view(x.shape[1], 1, x.shape[2]))
    return y + shared.down.forward(gate * up).sum(0)


def shared_weight_overwritten(shared: SharedExpert, x: Tensor, y: Tensor) -> Tensor:
    """A weight changes after it was read."""
    gate = shared.gate.forward(x)
    shared.gate.weight.mul_(0.5)
    return y + shared.down.forward(F.silu(gate) * shared.up.forward(x))


def shared_of_one_product(shared: SharedExpert, x: Tensor, y: Tensor) -> Tensor:
    """A projection beside the routed sum: it has no hidden width."""
    return y + shared.gate.forward(x)


def shared_without_a_down(shared: SharedExpert, x: Tensor, y: Tensor) -> Tensor:
    return y + F.silu(shared.gate.forward(x)) * shared.up.forward(x)


def shared_twice(shared: SharedExpert, x: Tensor, y: Tensor) -> Tensor:
    return shared.forward(x) + y + shared.forward(2 * x)


SHARED_LOOKALIKES: tuple[Join, ...] = (
    shared_of_other_tokens,
    shared_of_swapped_dimensions,
    shared_of_the_result,
    shared_subtracted,
    shared_doubled,
    shared_multiplied,
    shared_of_the_first_sequence,
    shared_summed_over_tokens,
    shared_crossed,
    shared_weight_overwritten,
    shared_of_one_product,
    shared_without_a_down,
    shared_twice,
)
