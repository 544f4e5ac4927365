"""Each expert's FFN on the rows routed to it: one kernel up to the hidden rows, one down to the outputs.

Rows are pairs (token t, slot k), numbered t·K + k and sorted by expert; `offsets` (E+1) says where each
expert's rows begin. A tile is ROWS rows of one expert; `tiles` lists (expert, first row) in the experts'
order, so that programs that run at the same time share an expert's weights in L2. The grid is persistent:
every program takes a block (a tile by COLUMNS columns) and then the one a grid further.

    pairs   = [2, 0, 3, 1]      rows 0, 1, 2 are expert 0's: pairs 2, 0 and 3 (K = 2: tokens 1, 0, 1)
    offsets = [0, 3, 4]         row 3 is expert 1's: pair 1
    tiles   = [(0, 0), (0, 2), (1, 3)]    with ROWS = 2: rows 0…1 and 2…2 of expert 0, row 3…3 of expert 1

Shared experts run here as one expert that all tokens choose: row r is token r, and nothing is SORTED.

Matrices are read where the model holds them: (out, in), or (in, out) when TRANSPOSED; gate and up in one
matrix, one after the other or in alternate columns (INTERLEAVED), or in two. D model width, F hidden width.
"""

import triton
import triton.language as tl

from dsmoe_compiler.codegen.kernels.activation import activate, finish, weigh


@triton.jit
def weight_tile(
    weight,
    expert,
    n,
    k,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    EXPERT_STRIDE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TMA: tl.constexpr,
):
    """Outputs n … n+TILE of an expert's matrix by inputs k … k+DEPTH, (TILE, DEPTH); zeros beyond."""
    if TMA:
        if TRANSPOSED:
            tile = weight.load([expert, k, n]).reshape(DEPTH, TILE).T
        else:
            tile = weight.load([expert, n, k]).reshape(TILE, DEPTH)
    else:
        matrix = weight + expert.to(tl.int64) * EXPERT_STRIDE
        output = n + tl.arange(0, TILE)
        input = k + tl.arange(0, DEPTH)
        if TRANSPOSED:  # read as it lies and turned after: else it is not copied ahead of the product
            output, input = output[None, :], input[:, None]
            place = input * ROW_STRIDE + output
            tile = tl.load(matrix + place, mask=(output < OUT) & (input < IN), other=0.0).T
        else:
            output, input = output[:, None], input[None, :]
            place = output * ROW_STRIDE + input
            tile = tl.load(matrix + place, mask=(output < OUT) & (input < IN), other=0.0)
    return tile


@triton.jit
def accumulate(rows, tile, sums, SWAP: tl.constexpr):
    """sums + the product of rows (ROWS, DEPTH) and a matrix's tile (TILE, DEPTH)."""
    rows = rows.to(tile.dtype)
    if SWAP:  # sums (TILE, ROWS): the weights are the product's rows
        sums = tl.dot(tile, rows.T, sums, input_precision="ieee")
    else:
        sums = tl.dot(rows, tile.T, sums, input_precision="ieee")
    return sums


@triton.jit
def place_of(block, row_blocks, column_blocks: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """A block's tile and first column: GROUP tiles share a stripe of an expert's columns in L2.

    GROUP = 2, 3 tiles, 2 stripes: (tile, stripe) = (0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (2, 1).
    """
    first = block // (GROUP * column_blocks) * GROUP
    tiles = tl.minimum(row_blocks - first, GROUP)
    within = block % (GROUP * column_blocks)
    return first + within % tiles, within // tiles * COLUMNS


@triton.jit
def halves(sums, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of a block's columns."""
    return sums.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()


@triton.jit(do_not_specialize=["T"])
def grouped_up(
    x,  # [T, D]
    weights,  # [T, K]
    gate_weight,  # every expert's matrix; gate's outputs begin at GATE
    up_weight,  # every expert's matrix; up's outputs begin at UP
    vectors,
    h,  # [rows, F]
    pairs,  # int32 [rows]
    offsets,  # int32 [E + 1]
    tiles,  # int32 [tiles, 2]
    tile_counts,  # int32 [2]: of this launch, and of grouped_down's
    T,
    K: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    OUT: tl.constexpr,
    GATE: tl.constexpr,
    UP: tl.constexpr,
    EXPERT_STRIDE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    SORTED: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TMA: tl.constexpr,
    SWAP: tl.constexpr,
    EVEN: tl.constexpr,
    HALVES: tl.constexpr,
    WEIGHED_INPUT: tl.constexpr,
    WEIGHED: tl.constexpr,
):
    """h[r] = what `activate` makes of the products of row r's token with its expert's matrices.

    Grid: any number of programs, each of which takes every so many blocks of ROWS rows and COLUMNS columns.
    """
    column_blocks: tl.constexpr = (F + COLUMNS - 1) // COLUMNS
    if SORTED:
        row_blocks = tl.load(tile_counts)
    else:
        row_blocks = (T + ROWS - 1) // ROWS
    for block in range(tl.program_id(0), row_blocks * column_blocks, tl.num_programs(0)):
        row_block, n = place_of(block, row_blocks, column_blocks, COLUMNS, GROUP)
        if SORTED:
            expert = tl.load(tiles + 2 * row_block)
            row = tl.load(tiles + 2 * row_block + 1) + tl.arange(0, ROWS)
            chosen = row < tl.load(offsets + expert + 1)
            pair = tl.load(pairs + row, mask=chosen, other=0)
            token = pair // K
        else:
            expert = tl.full((), 0, tl.int32)
            row = row_block * ROWS + tl.arange(0, ROWS)
            chosen = row < T
            token = row
        if WEIGHED_INPUT or WEIGHED:
            weight = tl.load(weights + pair, mask=chosen, other=0.0).to(tl.float32)
        if WEIGHED_INPUT:
            factor = weigh(weight)

        x_rows = x + token.to(tl.int64)[:, None] * D + tl.arange(0, DEPTH)[None, :]
        if INTERLEAVED:
            if SWAP:
                both = tl.zeros((2 * COLUMNS, ROWS), tl.float32)
            else:
                both = tl.zeros((ROWS, 2 * COLUMNS), tl.float32)
        else:
            if SWAP:
                up = tl.zeros((COLUMNS, ROWS), tl.float32)
            else:
                up = tl.zeros((ROWS, COLUMNS), tl.float32)
            if GATED:
                gate = up
        for k in range(0, D, DEPTH):
            if EVEN:
                rows = tl.load(x_rows + k, mask=chosen[:, None], other=0.0)
            else:
                rows = tl.load(
                    x_rows + k, mask=chosen[:, None] & (k + tl.arange(0, DEPTH) < D)[None, :], other=0.0
                )
            if WEIGHED_INPUT:
                rows = rows.to(tl.float32) * factor[:, None]
            if INTERLEAVED:
                tile = weight_tile(
                    up_weight,
                    expert,
                    2 * n,
                    k,
                    2 * COLUMNS,
                    DEPTH,
                    OUT,
                    D,
                    EXPERT_STRIDE,
                    ROW_STRIDE,
                    TRANSPOSED,
                    TMA,
                )
                both = accumulate(rows, tile, both, SWAP)
            else:
                if GATED:
                    tile = weight_tile(
                        gate_weight,
                        expert,
                        GATE + n,
                        k,
                        COLUMNS,
                        DEPTH,
                        OUT,
                        D,
                        EXPERT_STRIDE,
                        ROW_STRIDE,
                        TRANSPOSED,
                        TMA,
                    )
                    gate = accumulate(rows, tile, gate, SWAP)
                tile = weight_tile(
                    up_weight,
                    expert,
                    UP + n,
                    k,
                    COLUMNS,
                    DEPTH,
                    OUT,
                    D,
                    EXPERT_STRIDE,
                    ROW_STRIDE,
                    TRANSPOSED,
                    TMA,
                )
                up = accumulate(rows, tile, up, SWAP)
        if INTERLEAVED:
            if SWAP:
                both = both.reshape(COLUMNS, 2, ROWS).permute(0, 2, 1)
            else:
                both = both.reshape(ROWS, COLUMNS, 2)
            if GATE_FIRST:
                gate, up = both.split()
            else:
                up, gate = both.split()

        if SWAP:
            row, chosen = row[None, :], chosen[None, :]
            if WEIGHED:
                weight = weight[None, :]
        else:
            row, chosen = row[:, None], chosen[:, None]
            if WEIGHED:
                weight = weight[:, None]
        h_rows = h + row.to(tl.int64) * F
        if HALVES:
            # Half the columns at a time: what all need at once does not fit into registers beside the sums.
            left_up, right_up = halves(up, ROWS, COLUMNS)
            if GATED:
                left_gate, right_gate = halves(gate, ROWS, COLUMNS)
            column = n + tl.arange(0, COLUMNS // 2)[None, :]
            inside = column < F
            hidden = activate(left_gate, left_up, weight, expert, column, inside, vectors)
            tl.store(h_rows + column, hidden.to(h.dtype.element_ty), mask=chosen & inside)
            column += COLUMNS // 2
            inside = column < F
            hidden = activate(right_gate, right_up, weight, expert, column, inside, vectors)
            tl.store(h_rows + column, hidden.to(h.dtype.element_ty), mask=chosen & inside)
        else:
            if SWAP:
                column = n + tl.arange(0, COLUMNS)[:, None]
            else:
                column = n + tl.arange(0, COLUMNS)[None, :]
            inside = column < F
            hidden = activate(gate, up, weight, expert, column, inside, vectors)
            tl.store(h_rows + column, hidden.to(h.dtype.element_ty), mask=chosen & inside)


@triton.jit(do_not_specialize=["T"])
def grouped_down(
    h,  # [rows, F]
    weights,  # [T, K]
    down_weight,  # every expert's matrix
    vectors,
    y,  # [rows, D], every row at its pair's number
    pairs,  # int32 [rows]
    offsets,  # int32 [E + 1]
    tiles,  # int32 [tiles, 2]
    tile_counts,  # int32 [2]: of grouped_up's launch, and of this
    T,
    D: tl.constexpr,
    F: tl.constexpr,
    EXPERT_STRIDE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    SORTED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TMA: tl.constexpr,
    SWAP: tl.constexpr,
    EVEN: tl.constexpr,
    HALVES: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    WEIGHED: tl.constexpr,
):
    """y[pair of row r] = what `finish` makes of the product of h[r] with its expert's matrix.

    Rows of h past a tile's last are other experts': they are multiplied, too, and not stored. Grid as for
    grouped_up.
    """
    column_blocks: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    if SORTED:
        row_blocks = tl.load(tile_counts + 1)
    else:
        row_blocks = (T + ROWS - 1) // ROWS
    for block in range(tl.program_id(0), row_blocks * column_blocks, tl.num_programs(0)):
        row_block, n = place_of(block, row_blocks, column_blocks, COLUMNS, GROUP)
        if SORTED:
            expert = tl.load(tiles + 2 * row_block)
            first = tl.load(tiles + 2 * row_block + 1)
            row = first + tl.arange(0, ROWS)
            chosen = row < tl.load(offsets + expert + 1)
            pair = tl.load(pairs + row, mask=chosen, other=0)
        else:
            expert = tl.full((), 0, tl.int32)
            first = row_block * ROWS
            row = first + tl.arange(0, ROWS)
            chosen = row < T
            pair = row

        if SWAP:
            down = tl.zeros((COLUMNS, ROWS), tl.float32)
        else:
            down = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, F, DEPTH):
            if TMA:
                rows = h.load([first, k])
            else:
                h_rows = h + row.to(tl.int64)[:, None] * F + k + tl.arange(0, DEPTH)[None, :]
                if EVEN:
                    rows = tl.load(h_rows, mask=chosen[:, None], other=0.0)
                else:
                    rows = tl.load(
                        h_rows, mask=chosen[:, None] & (k + tl.arange(0, DEPTH) < F)[None, :], other=0.0
                    )
            tile = weight_tile(
                down_weight, expert, n, k, COLUMNS, DEPTH, D, F, EXPERT_STRIDE, ROW_STRIDE, TRANSPOSED, TMA
            )
            down = accumulate(rows, tile, down, SWAP)

        if WEIGHED:
            weight = tl.load(weights + pair, mask=chosen, other=0.0).to(tl.float32)
        if SWAP:
            pair, chosen = pair[None, :], chosen[None, :]
            if WEIGHED:
                weight = weight[None, :]
        else:
            pair, chosen = pair[:, None], chosen[:, None]
            if WEIGHED:
                weight = weight[:, None]
        if BY_COLUMN or not HALVES:
            if SWAP:
                column = n + tl.arange(0, COLUMNS)[:, None]
            else:
                column = n + tl.arange(0, COLUMNS)[None, :]
            inside = column < D
        out = finish(down, weight, expert, column, inside, vectors)
        out = out.to(y.dtype.element_ty)
        if HALVES:
            left, right = halves(out, ROWS, COLUMNS)
            column = n + tl.arange(0, COLUMNS // 2)[None, :]
            tl.store(y + pair.to(tl.int64) * D + column, left, mask=chosen & (column < D))
            column += COLUMNS // 2
            tl.store(y + pair.to(tl.int64) * D + column, right, mask=chosen & (column < D))
        else:
            tl.store(y + pair.to(tl.int64) * D + column, out, mask=chosen & inside)
