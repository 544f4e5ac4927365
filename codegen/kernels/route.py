"""Routing: from tokens to the ids and weights of their K experts, in one launch.

The reference is `dsmoe_compiler.ir.reference.route_tokens`; its roundings are done here where it does them.

A token, E = 4, K = 2, softmax, renormalised, with a bias that selects:

    logits          [  0,   1,   2,    1]
    scores          [.07, .20, .53,  .20]
    selection_bias  [  1,   0,   0,    0]
    ranked          [1.07, .20, .53, .20]         ids      [0, 2]
    selected        [.07, .53]                    weights  [.12, .88]

A program holds the logits of BLOCK_T tokens. Of many tokens, each block is multiplied with all experts by one
program. Of few, a block's experts are split over several, and the last one to have multiplied selects.

Constants say what the router does (RouterSpec), then where it rounds to less than fp32, then how it is done.

Experts lie in columns, group by group, both padded to powers of two; so columns are in the order of experts,
and whichever comes first wins a tie. Three groups of three experts:

    column  0 1 2 3  4 5 6 7  8 9 10 11  12 13 14 15
    expert  0 1 2 -  3 4 5 -  6 7  8  -   -  -  -  -
"""

import triton
import triton.language as tl

from dsmoe_compiler.codegen.kernels.arrive import last_to_arrive


@triton.jit(do_not_specialize=["T"])
def route(
    x,  # [T, D]
    weight,  # [E, D]
    bias,  # [E]
    selection_bias,  # [E]
    ids,  # int32 [T, K]
    weights,  # [T, K]
    logits,  # float32 [T, E], a workspace
    arrivals,  # int32, one for each block of tokens, zeros before and after
    T,
    E: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    LOGITS_BIAS: tl.constexpr,
    SELECTION_BIAS: tl.constexpr,
    SOFTMAX: tl.constexpr,  # else sigmoid
    SCORE_SELECTED: tl.constexpr,  # scores of the K selected logits, not of all
    GROUPS: tl.constexpr,
    GROUP_EXPERTS: tl.constexpr,  # of a group
    TOP_GROUPS: tl.constexpr,
    GROUP_TOP2: tl.constexpr,  # a group's score is the sum of its two best, else its best
    GROUP_FILL: tl.constexpr,
    WEIGH_SCORES: tl.constexpr,  # not what is ranked, where the two differ
    RENORMALIZE: tl.constexpr,
    EPSILON: tl.constexpr,
    SCALE: tl.constexpr,
    PRODUCT_DTYPE: tl.constexpr,
    ROUND_OPERANDS: tl.constexpr,
    LOGITS_DTYPE: tl.constexpr,
    ROUND_LOGITS: tl.constexpr,
    SCORE_DTYPE: tl.constexpr,
    ROUND_SCORES: tl.constexpr,
    RANK_DTYPE: tl.constexpr,
    ROUND_RANKED: tl.constexpr,
    SPLIT: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,  # experts that a program multiplies with
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    COLUMNS: tl.constexpr,  # GROUPS_PAD · GROUP_COLUMNS
    GROUPS_PAD: tl.constexpr,
    GROUP_COLUMNS: tl.constexpr,
    K_PAD: tl.constexpr,
):
    """ids and weights (T, K), best first. Grid: blocks of tokens, programs that share a block's experts."""
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    if SPLIT:
        expert = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
        real = expert < E
    else:
        column = tl.arange(0, COLUMNS)
        expert, real = in_columns(
            column=column,
            E=E,
            GROUPS=GROUPS,
            GROUP_EXPERTS=GROUP_EXPERTS,
            GROUP_COLUMNS=GROUP_COLUMNS,
        )

    if DOT:
        logit = multiply(
            x=x,
            weight=weight,
            token=token,
            expert=expert,
            real=real,
            T=T,
            D=D,
            PRODUCT_DTYPE=PRODUCT_DTYPE,
            BLOCK_T=BLOCK_T,
            BLOCK_E=BLOCK_E,
            BLOCK_D=BLOCK_D,
            STAGES=STAGES,
        )
    else:
        logit = multiply_few(
            x=x,
            weight=weight,
            token=token,
            expert=expert,
            real=real,
            T=T,
            D=D,
            PRODUCT_DTYPE=PRODUCT_DTYPE,
            ROUND_OPERANDS=ROUND_OPERANDS,
            BLOCK_T=BLOCK_T,
            BLOCK_E=BLOCK_E,
            BLOCK_D=BLOCK_D,
            STAGES=STAGES,
        )
    if LOGITS_BIAS:
        logit += tl.load(bias + expert, mask=real, other=0.0).to(tl.float32)[None, :]
    if ROUND_LOGITS:
        logit = logit.to(LOGITS_DTYPE).to(tl.float32)

    if SPLIT:
        inside = (token[:, None] < T) & real[None, :]
        tl.store(logits + token[:, None] * E + expert[None, :], logit, mask=inside)
        if not last_to_arrive(arrivals + tl.program_id(0), tl.num_programs(1)):
            return
        column = tl.arange(0, COLUMNS)
        expert, real = in_columns(
            column=column,
            E=E,
            GROUPS=GROUPS,
            GROUP_EXPERTS=GROUP_EXPERTS,
            GROUP_COLUMNS=GROUP_COLUMNS,
        )
        inside = (token[:, None] < T) & real[None, :]
        there = logits + token[:, None] * E + expert[None, :]
        logit = tl.load(there, mask=inside, other=0.0, cache_modifier=".cg")

    select(
        logit=logit,
        column=column,
        expert=expert,
        real=real,
        selection_bias=selection_bias,
        ids=ids,
        weights=weights,
        token=token,
        T=T,
        K=K,
        SELECTION_BIAS=SELECTION_BIAS,
        SOFTMAX=SOFTMAX,
        SCORE_SELECTED=SCORE_SELECTED,
        GROUPS=GROUPS,
        GROUP_EXPERTS=GROUP_EXPERTS,
        TOP_GROUPS=TOP_GROUPS,
        GROUP_TOP2=GROUP_TOP2,
        GROUP_FILL=GROUP_FILL,
        WEIGH_SCORES=WEIGH_SCORES,
        RENORMALIZE=RENORMALIZE,
        EPSILON=EPSILON,
        SCALE=SCALE,
        SCORE_DTYPE=SCORE_DTYPE,
        ROUND_SCORES=ROUND_SCORES,
        RANK_DTYPE=RANK_DTYPE,
        ROUND_RANKED=ROUND_RANKED,
        BLOCK_T=BLOCK_T,
        COLUMNS=COLUMNS,
        GROUPS_PAD=GROUPS_PAD,
        GROUP_COLUMNS=GROUP_COLUMNS,
        K_PAD=K_PAD,
    )


@triton.jit
def in_columns(
    column,
    E: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_EXPERTS: tl.constexpr,
    GROUP_COLUMNS: tl.constexpr,
):
    """The expert in each column, and whether there is one."""
    if GROUPS > 1:
        group = column // GROUP_COLUMNS
        member = column % GROUP_COLUMNS
        return group * GROUP_EXPERTS + member, (group < GROUPS) & (member < GROUP_EXPERTS)
    else:
        return column, column < E


@triton.jit
def multiply(
    x,
    weight,
    token,
    expert,
    real,
    T,
    D: tl.constexpr,
    PRODUCT_DTYPE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """x[token] · weight[expert]ᵀ in fp32, (BLOCK_T, BLOCK_E), by matrix products."""
    total = tl.zeros([BLOCK_T, BLOCK_E], dtype=tl.float32)
    for first in tl.range(0, D, BLOCK_D, num_stages=STAGES):
        d = first + tl.arange(0, BLOCK_D)
        x_block = tl.load(
            x + token[:, None] * D + d[None, :],
            mask=(token[:, None] < T) & (d[None, :] < D),
            other=0.0,
        )
        weight_block = tl.load(
            weight + expert[None, :] * D + d[:, None],
            mask=real[None, :] & (d[:, None] < D),
            other=0.0,
        )
        total = tl.dot(
            x_block.to(PRODUCT_DTYPE),
            weight_block.to(PRODUCT_DTYPE),
            total,
            input_precision="ieee",
        )
    return total


@triton.jit
def multiply_few(
    x,
    weight,
    token,
    expert,
    real,
    T,
    D: tl.constexpr,
    PRODUCT_DTYPE: tl.constexpr,
    ROUND_OPERANDS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """x[token] · weight[expert]ᵀ in fp32, (BLOCK_T, BLOCK_E), for fewer tokens than a matrix product takes.

    Every column of D has a sum of its own until the end: one reduction over threads, not one a step.
    """
    total = tl.zeros([BLOCK_T, BLOCK_E, BLOCK_D], dtype=tl.float32)
    for first in tl.range(0, D, BLOCK_D, num_stages=STAGES):
        d = first + tl.arange(0, BLOCK_D)
        x_block = tl.load(
            x + token[:, None] * D + d[None, :],
            mask=(token[:, None] < T) & (d[None, :] < D),
            other=0.0,
        )
        weight_block = tl.load(
            weight + expert[:, None] * D + d[None, :],
            mask=real[:, None] & (d[None, :] < D),
            other=0.0,
        )
        if ROUND_OPERANDS:
            x_block = x_block.to(PRODUCT_DTYPE)
            weight_block = weight_block.to(PRODUCT_DTYPE)
        total += x_block.to(tl.float32)[:, None, :] * weight_block.to(tl.float32)[None, :, :]
    return tl.sum(total, axis=2)


@triton.jit
def select(
    logit,  # [BLOCK_T, COLUMNS], fp32
    column,  # [COLUMNS], their numbers
    expert,  # [COLUMNS], the expert in each
    real,  # [COLUMNS], whether there is one
    selection_bias,
    ids,
    weights,
    token,  # [BLOCK_T], int64
    T,
    K: tl.constexpr,
    SELECTION_BIAS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    SCORE_SELECTED: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_EXPERTS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    GROUP_TOP2: tl.constexpr,
    GROUP_FILL: tl.constexpr,
    WEIGH_SCORES: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    EPSILON: tl.constexpr,
    SCALE: tl.constexpr,
    SCORE_DTYPE: tl.constexpr,
    ROUND_SCORES: tl.constexpr,
    RANK_DTYPE: tl.constexpr,
    ROUND_RANKED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUPS_PAD: tl.constexpr,
    GROUP_COLUMNS: tl.constexpr,
    K_PAD: tl.constexpr,
):
    """Scores, the K best experts and their weights, stored at ids and weights."""
    if SCORE_SELECTED:
        ranked = logit
    else:
        if ROUND_SCORES:
            logit = logit.to(SCORE_DTYPE).to(tl.float32)
        score = score_of(logit, real, SOFTMAX)
        if ROUND_SCORES:
            score = score.to(SCORE_DTYPE).to(tl.float32)
        ranked = score
    if SELECTION_BIAS:
        ranked += tl.load(selection_bias + expert, mask=real, other=0.0).to(tl.float32)[None, :]
        if ROUND_RANKED:
            ranked = ranked.to(RANK_DTYPE).to(tl.float32)
    rank = tl.where(real[None, :], rank_of(ranked), -0x80000000)
    if GROUPS > 1:
        rank = keep_best_groups(
            rank=rank,
            GROUPS=GROUPS,
            TOP_GROUPS=TOP_GROUPS,
            GROUP_TOP2=GROUP_TOP2,
            GROUP_FILL=GROUP_FILL,
            RANK_DTYPE=RANK_DTYPE,
            ROUND_RANKED=ROUND_RANKED,
            BLOCK_T=BLOCK_T,
            COLUMNS=COLUMNS,
            GROUPS_PAD=GROUPS_PAD,
            GROUP_COLUMNS=GROUP_COLUMNS,
        )

    slot = tl.arange(0, K_PAD)
    selected = tl.zeros([BLOCK_T, K_PAD], dtype=tl.float32)
    selected_in = tl.zeros([BLOCK_T, K_PAD], dtype=tl.int32)
    for k in range(K):
        best, best_in = tl.max(rank, axis=1, return_indices=True)
        chosen = column[None, :] == best_in[:, None]
        if WEIGH_SCORES:
            weight = tl.sum(tl.where(chosen, score, 0.0), axis=1)
        else:
            weight = value_of(best)
        selected = tl.where(slot[None, :] == k, weight[:, None], selected)
        selected_in = tl.where(slot[None, :] == k, best_in[:, None], selected_in)
        rank = tl.where(chosen, -0x80000000, rank)

    if SCORE_SELECTED:
        if ROUND_SCORES:
            selected = selected.to(SCORE_DTYPE).to(tl.float32)
        selected = score_of(selected, slot < K, SOFTMAX)
        if ROUND_SCORES:
            selected = selected.to(SCORE_DTYPE).to(tl.float32)
    if RENORMALIZE:
        total = tl.sum(tl.where(slot[None, :] < K, selected, 0.0), axis=1)
        if ROUND_SCORES:
            total = total.to(SCORE_DTYPE).to(tl.float32)
        if EPSILON != 0.0:
            total += EPSILON
            if ROUND_SCORES:
                total = total.to(SCORE_DTYPE).to(tl.float32)
        selected = selected / total[:, None]
        if ROUND_SCORES:
            selected = selected.to(SCORE_DTYPE).to(tl.float32)
    if SCALE != 1.0:
        selected = selected * SCALE
        if ROUND_SCORES:
            selected = selected.to(SCORE_DTYPE).to(tl.float32)

    place = token[:, None] * K + slot[None, :]
    inside = (token[:, None] < T) & (slot[None, :] < K)
    if GROUPS > 1:
        selected_in = selected_in // GROUP_COLUMNS * GROUP_EXPERTS + selected_in % GROUP_COLUMNS
    tl.store(ids + place, selected_in, mask=inside)
    tl.store(weights + place, selected, mask=inside)


@triton.jit
def score_of(logit, real, SOFTMAX: tl.constexpr):
    """Scores of rows of logits; those that are not real take no part."""
    if SOFTMAX:
        logit = tl.where(real[None, :], logit, float("-inf"))
        part = tl.exp(logit - tl.max(logit, axis=1)[:, None])
        return part / tl.sum(part, axis=1)[:, None]
    else:
        return 1.0 / (1.0 + tl.exp(-logit))


@triton.jit
def rank_of(value):
    """An int32 that sorts as the fp32 value does, NaN above all and −0 as 0.

    The lowest int32 is no value's rank: it stands for what cannot be chosen, so that every choice is of an
    expert that exists, be its score −∞ or NaN.
    """
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    # Of negative numbers the larger bits are the lower ones.
    rank = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(value != value, 0x7FFFFFFF, rank)


@triton.jit
def value_of(rank):
    """The fp32 value of that rank."""
    return (rank ^ ((rank >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def keep_best_groups(
    rank,  # [BLOCK_T, COLUMNS]
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    GROUP_TOP2: tl.constexpr,
    GROUP_FILL: tl.constexpr,
    RANK_DTYPE: tl.constexpr,
    ROUND_RANKED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUPS_PAD: tl.constexpr,
    GROUP_COLUMNS: tl.constexpr,
):
    """Ranks with those of experts outside the best groups replaced by that of GROUP_FILL."""
    grouped = tl.reshape(rank, [BLOCK_T, GROUPS_PAD, GROUP_COLUMNS])
    group_rank, best_in = tl.max(grouped, axis=2, return_indices=True)
    if GROUP_TOP2:
        member = tl.arange(0, GROUP_COLUMNS)
        others = tl.where(member[None, None, :] == best_in[:, :, None], -0x80000000, grouped)
        group_score = value_of(group_rank) + value_of(tl.max(others, axis=2))
        if ROUND_RANKED:
            group_score = group_score.to(RANK_DTYPE).to(tl.float32)
        group_rank = rank_of(group_score)
    group = tl.arange(0, GROUPS_PAD)
    group_rank = tl.where(group[None, :] < GROUPS, group_rank, -0x80000000)
    for _ in range(TOP_GROUPS):
        chosen = group[None, :] == tl.argmax(group_rank, axis=1)[:, None]
        group_rank = tl.where(chosen, -0x80000000, group_rank)
    # The chosen ones can no more be chosen: that is how they are told.
    rejected = (group_rank != -0x80000000)[:, :, None] & (grouped != -0x80000000)
    fill = rank_of(tl.full([BLOCK_T, GROUPS_PAD, GROUP_COLUMNS], GROUP_FILL, dtype=tl.float32))
    return tl.reshape(tl.where(rejected, fill, grouped), [BLOCK_T, COLUMNS])
