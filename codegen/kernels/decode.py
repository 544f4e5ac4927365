"""The FFN of a few tokens: every pair reads its expert's matrices as a matrix times a vector, nothing is
sorted.

With T·K pairs well under E hardly two pairs share an expert, and the time is that of reading their matrices
once. `decode_up` has a program for each pair and COLUMNS hidden columns; `decode_down` one for each token and
COLUMNS output columns, which adds the token's K slots and its shared experts in registers: no order among
programs, no buffer of outputs, the same sum every time.

    T = 1, K = 2, ids = [[5, 3]]: pair 0 multiplies x[0] with expert 5's matrices, pair 1 with expert 3's;
    out[0] = w[0,0] · h[0] · W_down[5]ᵀ + w[0,1] · h[1] · W_down[3]ᵀ

Where the grid would leave processors idle, SPLIT programs share a pair's sums over D: each writes its part,
and the last to arrive adds the parts in their order.
"""

import triton
import triton.language as tl

from dsmoe_compiler.codegen.kernels.activation import activate, activate_shared, finish, finish_shared, weigh
from dsmoe_compiler.codegen.kernels.arrive import last_to_arrive


@triton.jit
def add_products(
    sums,
    row,
    matrix,
    n,
    k,
    STEP: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """sums (COLUMNS, DEPTH) + the products of inputs k, k+1, … of a row with outputs n, n+STEP, … of a
    matrix.
    """
    output = n + STEP * tl.arange(0, COLUMNS)[:, None]
    input = k + tl.arange(0, DEPTH)[None, :]
    if TRANSPOSED:
        place = input * ROW_STRIDE + output
    else:
        place = output * ROW_STRIDE + input
    numbers = tl.load(row + input, mask=input < IN, other=0.0).to(tl.float32)
    tile = tl.load(matrix + place, mask=(output < OUT) & (input < IN), other=0.0).to(tl.float32)
    return sums + tile * numbers


@triton.jit
def gate_and_up(
    row,
    gate_matrix,
    up_matrix,
    n,
    begin,
    end,
    GATE: tl.constexpr,
    UP: tl.constexpr,
    STEP: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    OUT: tl.constexpr,
    D: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    GATED: tl.constexpr,
):
    """A row's gate and up products, (COLUMNS,) each, summed over inputs begin … end."""
    up_sums = tl.zeros((COLUMNS, DEPTH), tl.float32)
    if GATED:
        gate_sums = tl.zeros((COLUMNS, DEPTH), tl.float32)
    for k in range(begin, end, DEPTH):
        if GATED:
            gate_sums = add_products(
                gate_sums,
                row,
                gate_matrix,
                GATE + STEP * n,
                k,
                STEP,
                COLUMNS,
                DEPTH,
                OUT,
                D,
                ROW_STRIDE,
                TRANSPOSED,
            )
        up_sums = add_products(
            up_sums, row, up_matrix, UP + STEP * n, k, STEP, COLUMNS, DEPTH, OUT, D, ROW_STRIDE, TRANSPOSED
        )
    up = tl.sum(up_sums, 1)
    if GATED:
        gate = tl.sum(gate_sums, 1)
    else:
        gate = up  # that nobody reads
    return gate, up


@triton.jit(do_not_specialize=["pairs"])
def decode_up(
    x,  # [T, D]
    ids,  # [T, K]
    weights,  # [T, K]
    gate_weight,  # every expert's matrix; gate's outputs begin at GATE
    up_weight,  # every expert's matrix; up's outputs begin at UP
    vectors,
    h,  # [T·K, F]; a dropped pair's row is left as it is
    shared_gate_weight,  # the shared experts', whose outputs begin at SHARED_GATE
    shared_up_weight,
    shared_vectors,
    shared_h,  # [T, SHARED_F]
    parts,  # float32, a workspace: of each pair and block of columns, gate's parts, then up's
    arrived,  # int32, one for each pair and block of columns, zeros before and after
    pairs,
    K: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    E: tl.constexpr,
    GATE: tl.constexpr,
    UP: tl.constexpr,
    STEP: tl.constexpr,
    OUT: tl.constexpr,
    EXPERT_STRIDE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    SHARED_F: tl.constexpr,
    SHARED_GATE: tl.constexpr,
    SHARED_UP: tl.constexpr,
    SHARED_STEP: tl.constexpr,
    SHARED_OUT: tl.constexpr,
    SHARED_ROW_STRIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SPLIT: tl.constexpr,
    GATED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SHARED_GATED: tl.constexpr,
    SHARED_TRANSPOSED: tl.constexpr,
    SHARED: tl.constexpr,
    WEIGHED_INPUT: tl.constexpr,
    WEIGHED: tl.constexpr,
):
    """h[p] = what `activate` makes of the products of pair p's token with its expert's matrices.

    Grid: pairs, blocks of COLUMNS columns, parts of D.
    """
    pair = tl.program_id(0)
    n = tl.program_id(1) * COLUMNS
    column = n + tl.arange(0, COLUMNS)
    if SHARED:
        # The grid's pairs go on with the tokens, for the shared experts' hidden rows.
        if pair >= pairs:
            token = (pair - pairs).to(tl.int64)
            if (n < SHARED_F) & (tl.program_id(2) == 0):
                gate, up = gate_and_up(
                    x + token * D,
                    shared_gate_weight,
                    shared_up_weight,
                    n,
                    0,
                    D,
                    SHARED_GATE,
                    SHARED_UP,
                    SHARED_STEP,
                    COLUMNS,
                    DEPTH,
                    SHARED_OUT,
                    D,
                    SHARED_ROW_STRIDE,
                    SHARED_TRANSPOSED,
                    SHARED_GATED,
                )
                inside = column < SHARED_F
                hidden = activate_shared(gate, up, column, inside, shared_vectors)
                tl.store(
                    shared_h + token * SHARED_F + column, hidden.to(shared_h.dtype.element_ty), mask=inside
                )
            return
    expert = tl.load(ids + pair)
    if (expert >= 0) & (expert < E) & (n < F):
        matrix = expert.to(tl.int64) * EXPERT_STRIDE
        if WEIGHED_INPUT or WEIGHED:
            weight = tl.load(weights + pair).to(tl.float32)
        if SPLIT > 1:
            begin = tl.program_id(2) * tl.cdiv(D, SPLIT * DEPTH) * DEPTH
            end = tl.minimum(begin + tl.cdiv(D, SPLIT * DEPTH) * DEPTH, D)
        else:
            begin = 0
            end = D
        gate, up = gate_and_up(
            x + (pair // K).to(tl.int64) * D,
            gate_weight + matrix,
            up_weight + matrix,
            n,
            begin,
            end,
            GATE,
            UP,
            STEP,
            COLUMNS,
            DEPTH,
            OUT,
            D,
            ROW_STRIDE,
            TRANSPOSED,
            GATED,
        )
        if WEIGHED_INPUT:
            factor = weigh(weight)
            gate, up = gate * factor, up * factor
        inside = column < F
        if SPLIT > 1:
            block = pair * tl.num_programs(1) + tl.program_id(1)
            part = parts + block.to(tl.int64) * (2 * SPLIT * COLUMNS) + tl.arange(0, COLUMNS)
            tl.store(part + tl.program_id(2) * COLUMNS, gate)
            tl.store(part + (SPLIT + tl.program_id(2)) * COLUMNS, up)
            if last_to_arrive(arrived + block, SPLIT):
                gate = tl.zeros((COLUMNS,), tl.float32)
                up = tl.zeros((COLUMNS,), tl.float32)
                for i in range(SPLIT):
                    gate += tl.load(part + i * COLUMNS, cache_modifier=".cg")
                    up += tl.load(part + (SPLIT + i) * COLUMNS, cache_modifier=".cg")
                hidden = activate(gate, up, weight, expert, column, inside, vectors)
                tl.store(h + pair.to(tl.int64) * F + column, hidden.to(h.dtype.element_ty), mask=inside)
        else:
            hidden = activate(gate, up, weight, expert, column, inside, vectors)
            tl.store(h + pair.to(tl.int64) * F + column, hidden.to(h.dtype.element_ty), mask=inside)


@triton.jit
def decode_down(
    h,  # [T·K, F]
    ids,  # [T, K]
    weights,  # [T, K]
    down_weight,  # every expert's matrix
    vectors,
    shared_h,  # [T, SHARED_F]
    shared_weight,  # the shared experts' matrix
    shared_vectors,
    shared_out,  # [T, D], what the shared experts give
    out,  # [T, D]
    K: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    E: tl.constexpr,
    EXPERT_STRIDE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    SHARED_F: tl.constexpr,
    SHARED_ROW_STRIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SHARED_TRANSPOSED: tl.constexpr,
    WEIGHED: tl.constexpr,
    WEIGHTED_SUM: tl.constexpr,
    SHARED: tl.constexpr,
    ADDED: tl.constexpr,
):
    """out[t] = what token t's experts give by their routing weights, and what shared experts give, added up.

    Grid: tokens, blocks of COLUMNS columns.
    """
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * COLUMNS
    column = n + tl.arange(0, COLUMNS)
    inside = column < D
    if WEIGHTED_SUM:
        sums = tl.zeros((COLUMNS, DEPTH), tl.float32)
    else:
        total = tl.zeros((COLUMNS,), tl.float32)
    for slot in range(K):
        pair = token * K + slot
        expert = tl.load(ids + pair)
        if (expert >= 0) & (expert < E):
            if WEIGHED:
                weight = tl.load(weights + pair).to(tl.float32)
            matrix = down_weight + expert.to(tl.int64) * EXPERT_STRIDE
            slot_sums = tl.zeros((COLUMNS, DEPTH), tl.float32)
            for k in range(0, F, DEPTH):
                slot_sums = add_products(
                    slot_sums, h + pair * F, matrix, n, k, 1, COLUMNS, DEPTH, D, F, ROW_STRIDE, TRANSPOSED
                )
            if WEIGHTED_SUM:  # weighed before the sum across a row's threads, which is then taken once
                sums += slot_sums * weight
            else:
                down = tl.sum(slot_sums, 1)
                total += finish(down, weight, expert, column, inside, vectors)
    if WEIGHTED_SUM:
        total = tl.sum(sums, 1)
    if SHARED:
        shared_sums = tl.zeros((COLUMNS, DEPTH), tl.float32)
        for k in range(0, SHARED_F, DEPTH):
            shared_sums = add_products(
                shared_sums,
                shared_h + token * SHARED_F,
                shared_weight,
                n,
                k,
                1,
                COLUMNS,
                DEPTH,
                D,
                SHARED_F,
                SHARED_ROW_STRIDE,
                SHARED_TRANSPOSED,
            )
        shared = tl.sum(shared_sums, 1)
        total += finish_shared(shared, column, inside, shared_vectors)
    if ADDED:
        total += tl.load(shared_out + token * D + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * D + column, total.to(out.dtype.element_ty), mask=inside)
