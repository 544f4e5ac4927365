"""How long a plan should take, from the GPU's facts alone: what ranks tiles where no measurement exists.

A figure of this model is for comparing plans of one problem on one GPU; it is not a measurement.

Letters: T tokens, D model width, F expert hidden width, E experts, K experts per token, P = T·K pairs; S
processors (SMs), c blocks resident on each, b bytes of an element. Times in seconds, sizes in bytes.

**A grouped product** [rows, R] · [R, N] with `taps` accumulators (up: R = D, N = F; down: R = F, N = D):

- tiles: W = M · ⌈N/columns⌉, where M = E·E[⌈n/rows⌉], n ~ Binomial(T, K/E): padding of the last tile of an
  expert and of the last column tile are whole tiles.
- a tile's loads, through L2: ⌈R/depth⌉·depth · (rows + taps·columns) · b, its store rows·columns·b.
- through memory: each active expert's weights, E·(1 − (1 − K/E)^T) · taps·N·R·b, once, as its tiles run one
  after another and re-read them in L2; where one expert's outgrow L2, once for each GROUP of its row
  tiles. Activations where they outgrow half of L2.
- tensor time of a step on one processor: the longer of flops / (i · rate/S) and the bytes that the
  instructions read from shared memory at 128 a cycle. i = 1 for products of four warps (wgmma: at least 64
  product rows), 0.62 for products of one warp on a GPU that has those, 1 on others, 0.5 for float32's
  multiply-adds. A 64×16 product reads 2.5 cycles' worth for each cycle of tensor work, which is what small
  row blocks cost.
- a tile alone: fill + ⌈R/depth⌉ · (tensor time and latency / (stages − 1) together + 30 ns) + epilogue. A
  step's loads are asked for stages − 1 steps ahead; fill is two latencies (tile table and offsets, then the
  first operands), epilogue ten instructions for each element of an accumulator.
- a wave of x ≤ S·c tiles takes together: the longer of a tile alone and ⌈x/S⌉ tiles' tensor time; x tiles'
  loads at L2's rate; their share of the weights and activations at memory's rate.
- the launch: ⌊W/(S·c)⌋ whole waves, one of the rest, the launch itself.

Times "together" are the longest and a sixteenth of the others, which are never overlapped wholly.

c follows from the registers a thread, which a accumulators and their addresses take, and the shared memory of
all stages. Fitted to compiled kernels: 45 + 1.25·a for products of four warps, 64 + 2.1·a where the operands
pass through registers too, 60 + 3.5·a for multiply-adds, 32 + 1.6·a for matrix-vector products (2.7·a in
float32). The persistent grid has S·c programs, c the same for up and down.

**Grouped** = two launches that permute + up + down + combine (P·D·b in, T·D·b out) + the shared experts' up
and down. **Decode** = two matrix-vector launches in the same terms: a wave's tensor time becomes that of its
multiply-adds, a step waits for its own loads. Up reads each active expert once from memory and for each pair
from L2; down reads it for each pair from memory. Where pairs share experts (T·K above about E/2) that is more
than the grouped products read, and where they do not it saves the launches that permute: the crossover is not
written anywhere, it follows.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor

from dsmoe_compiler.codegen.gpu import Gpu
from dsmoe_compiler.codegen.tiles import GROUP, GemmTiles, GemvTiles, Problem
from dsmoe_compiler.codegen.uniform import active_experts, row_tiles

# Not overlapped: this part of every resource's time but the longest.
RESIDUE = 1 / 16
# Seconds of a step's own: waiting for its copies and for the product before.
STEP = 30e-9
# One warp's products (mma.sync) on a GPU whose tensor cores are made for four (wgmma).
ONE_WARP = 0.62
MULTIPLY_ADD = 0.5
# Instructions for each element of an accumulator in the epilogue: activation, casts, store.
EPILOGUE = 10
# Of a block's shared memory, the part for pipelined operands; the rest is for layout conversions.
OPERANDS = 7 / 8
# Of a thread's registers, the part that an estimate may take without a risk of spills.
SPILLING = 0.85


@dataclass(frozen=True)
class Product:
    """One grouped product of a layer: `columns` N, `depth` R, `taps` accumulators over the same rows;
    `transposed`: the weights lie [R, N].
    """

    problem: Problem
    columns: int
    depth: int
    taps: int
    transposed: bool

    @property
    def active(self) -> float:
        """How many experts have rows."""
        return active_experts(self.problem.tokens, self.problem.experts, self.problem.top_k)

    @property
    def expert_bytes(self) -> int:
        """Of one expert's weights."""
        return self.taps * self.columns * self.depth * self.problem.item


def up(problem: Problem) -> Product:
    """x [P, D] to h [P, F]."""
    return Product(problem, problem.width, problem.hidden, problem.taps, problem.up_transposed)


def down(problem: Problem) -> Product:
    """h [P, F] to y [P, D]."""
    return Product(problem, problem.hidden, problem.width, 1, problem.down_transposed)


def warp_group(tiles: GemmTiles, problem: Problem, gpu: Gpu) -> bool:
    """Whether these tiles get products by four warps at once (wgmma)."""
    rows = tiles.columns if tiles.swap else tiles.rows
    return gpu.architecture.warp_groups and problem.item == 2 and rows >= 64 and tiles.warps % 4 == 0


def multiply_adds(problem: Problem, gpu: Gpu) -> bool:
    """Whether products are multiply-adds in registers: float32 where only tf32 has tensor cores."""
    return problem.item == 4 and gpu.architecture.warp == 32


def gemm_registers(tiles: GemmTiles, product: Product, gpu: Gpu) -> int:
    """Registers a thread, estimated."""
    threads = tiles.warps * gpu.architecture.warp
    sums = product.taps * tiles.rows * tiles.columns / threads
    if multiply_adds(product.problem, gpu):
        return ceil(60 + 3.5 * sums)
    if not warp_group(tiles, product.problem, gpu):
        return ceil(64 + 2.1 * sums)
    return ceil(45 + 1.25 * sums)


def gemm_shared(tiles: GemmTiles, product: Product, gpu: Gpu) -> int:
    """Bytes of shared memory a block's operands take in all stages."""
    # Operands that pass through registers leave their buffer before the next is filled.
    buffers = tiles.stages if warp_group(tiles, product.problem, gpu) else tiles.stages - 1
    return buffers * tiles.depth * (tiles.rows + product.taps * tiles.columns) * product.problem.item


def gemm_resident(tiles: GemmTiles, product: Product, gpu: Gpu) -> int:
    """Blocks a processor holds; 0 where the tiles do not fit or would spill."""
    shared = gemm_shared(tiles, product, gpu)
    registers = gemm_registers(tiles, product, gpu)
    arch = gpu.architecture
    if shared > OPERANDS * arch.block_shared or registers > SPILLING * arch.thread_registers:
        return 0
    return arch.resident_blocks(registers, shared, tiles.warps)


def gemm_seconds(tiles: GemmTiles, product: Product, gpu: Gpu, resident: int) -> float:
    """One launch of a persistent grid of `resident` blocks a processor, the launch itself included."""
    p = product.problem
    tile_rows = row_tiles(p.tokens, p.experts, p.top_k, tiles.rows)
    count = tile_rows * ceil(product.columns / tiles.columns)
    steps = ceil(product.depth / tiles.depth)
    tensor = _tensor_seconds(tiles, product, gpu) * steps
    elements = product.taps * tiles.rows * tiles.columns
    epilogue = elements * EPILOGUE * 2 * gpu.processors / gpu.float32_rate
    step = _together(tensor / steps, gpu.latency / (tiles.stages - 1)) + STEP
    loads = steps * tiles.depth * (tiles.rows + product.taps * tiles.columns) + tiles.rows * tiles.columns
    activations = p.pairs * (product.depth + product.columns) * p.item
    reads = max(1.0, tile_rows / product.active / GROUP) if product.expert_bytes > gpu.l2 else 1.0
    memory = reads * product.active * product.expert_bytes + max(0.0, activations - gpu.l2 / 2)
    return gpu.launch + _waves(
        gpu,
        count=count,
        resident=resident,
        alone=2 * gpu.latency + steps * step + epilogue,
        compute=tensor,
        l2_bytes=loads * p.item,
        memory_bytes=memory / count,
    )


def grouped_rest_seconds(problem: Problem, gpu: Gpu) -> float:
    """What a grouped layer does beside its products: permute (two launches) and combine."""
    activations = (problem.pairs + problem.tokens) * problem.hidden * problem.item
    combine = max(activations / gpu.l2_rate, max(0.0, activations - gpu.l2 / 2) / gpu.memory_rate)
    sort = 4 * problem.pairs * 4 / gpu.memory_rate
    # Each of the three is a chain of about four loads that depend on one another.
    return 3 * (gpu.launch + 4 * gpu.latency) + sort + combine


def gemv_resident(tiles: GemvTiles, sums: int, item: int, gpu: Gpu) -> int:
    """Blocks a processor holds of a matrix-vector kernel with `sums` accumulators [columns, depth] and
    elements of `item` bytes; 0 where it would spill.
    """
    arch = gpu.architecture
    a_thread = sums * tiles.columns * tiles.depth / (tiles.warps * arch.warp)
    registers = ceil(32 + (1.6 if item == 2 else 2.7) * a_thread)
    if registers > SPILLING * arch.thread_registers:
        return 0
    return arch.resident_blocks(registers, 0, tiles.warps)


def gemv_up_seconds(tiles: GemvTiles, problem: Problem, gpu: Gpu) -> float:
    """Gate and up of every pair and of the shared experts: programs of (pair, columns, part of D). Programs
    of the same columns run side by side, so that what pairs share comes from L2.
    """
    p = problem
    blocks = p.pairs * ceil(p.width / tiles.columns) + p.tokens * ceil(p.shared_width / tiles.columns)
    distinct = active_experts(p.tokens, p.experts, p.top_k) * p.width + p.shared_width
    # The shared experts' reduction is not shared out.
    steps = ceil(p.hidden / (tiles.depth * (1 if p.shared_width else tiles.split)))
    # Programs that share a reduction leave their parts, count their arrival, and the last adds them up.
    arrival = 3 * gpu.latency if tiles.split > 1 else 0.0
    return _gemv_seconds(
        gpu,
        count=blocks * tiles.split,
        resident=gemv_resident(tiles, p.taps, p.item, gpu),
        steps=steps,
        extra=arrival,
        elements=p.taps * tiles.columns * p.hidden / tiles.split,
        item=p.item,
        memory_bytes=p.taps * distinct * p.hidden * p.item,
    )


def gemv_down_seconds(tiles: GemvTiles, problem: Problem, gpu: Gpu) -> float:
    """Programs of (token, columns), each over the token's K slots and the shared experts. Tokens reach an
    expert that they share at different times: each reads it from memory.
    """
    p = problem
    return _gemv_seconds(
        gpu,
        count=p.tokens * ceil(p.hidden / tiles.columns),
        resident=gemv_resident(tiles, 2, p.item, gpu),
        steps=p.top_k * ceil(p.width / tiles.depth) + ceil(p.shared_width / tiles.depth),
        extra=0.0,
        elements=tiles.columns * (p.top_k * p.width + p.shared_width),
        item=p.item,
        memory_bytes=(p.pairs * p.width + p.shared_width) * p.hidden * p.item,
    )


def _gemv_seconds(
    gpu: Gpu,
    *,
    count: int,
    resident: int,
    steps: int,
    extra: float,
    elements: float,
    item: int,
    memory_bytes: float,
) -> float:
    """`count` programs of `steps` and `elements` each, and `extra` seconds of their own."""
    # Widening and multiply-add: three instructions an element.
    compute = elements * 3 * 2 * gpu.processors / gpu.float32_rate
    return gpu.launch + _waves(
        gpu,
        count=count,
        resident=resident,
        # Nothing is asked for ahead: a step's loads wait for the step before.
        alone=2 * gpu.latency + steps * gpu.latency + compute + extra,
        compute=compute,
        l2_bytes=elements * item,
        memory_bytes=memory_bytes / count,
    )


def _waves(
    gpu: Gpu,
    *,
    count: float,
    resident: int,
    alone: float,
    compute: float,
    l2_bytes: float,
    memory_bytes: float,
) -> float:
    """Seconds of `count` tiles on S·c programs; `alone`, `compute` and bytes are a tile's."""

    def wave(tiles: float) -> float:
        return _together(
            max(alone, ceil(tiles / gpu.processors) * compute),
            tiles * l2_bytes / gpu.l2_rate,
            tiles * memory_bytes / gpu.memory_rate,
        )

    programs = gpu.processors * resident
    whole = floor(count / programs)
    rest = count - whole * programs
    return whole * wave(programs) + (wave(rest) if rest else 0.0)


def _together(*seconds: float) -> float:
    """What resources used at the same time take: the longest, and what is not overlapped of the others."""
    longest = max(seconds)
    return longest + RESIDUE * (sum(seconds) - longest)


def _tensor_seconds(tiles: GemmTiles, product: Product, gpu: Gpu) -> float:
    """One step of one tile, on a processor of its own."""
    groups = warp_group(tiles, product.problem, gpu)
    item, arch = product.problem.item, gpu.architecture
    rows, columns = (tiles.columns, tiles.rows) if tiles.swap else (tiles.rows, tiles.columns)
    flops = 2 * product.taps * rows * columns * tiles.depth
    seconds = flops * gpu.processors / gpu.rate(product.problem.dtype)
    if multiply_adds(product.problem, gpu):
        return seconds / MULTIPLY_ADD
    read = _group_reads(rows, columns, tiles.warps) if groups else _warp_reads(rows, columns, tiles.warps)
    shared = product.taps * read * tiles.depth * item / (arch.shared_per_clock * gpu.clock)
    instruction = 1.0 if groups or not arch.warp_groups else ONE_WARP
    return max(seconds / instruction, shared)


def _group_reads(rows: int, columns: int, warps: int) -> int:
    """Elements that wgmma reads from shared memory for one step of depth 1: each instruction 64 rows, each
    group of warps its own rows, or its own columns where there are no rows left.
    """
    beside = max(1, warps // 4 * 64 // rows)
    return ceil(rows / 64) * (beside * 64 + columns)


def _warp_reads(rows: int, columns: int, warps: int) -> int:
    """The same for mma.sync, each warp loading its operands: in the best arrangement of the warps."""
    arranged = [
        rows * beside + columns * (warps // beside)
        for beside in (1, 2, 4, 8)
        if beside <= warps and rows >= 16 * (warps // beside)
    ]
    return min(arranged, default=rows * warps + columns)
