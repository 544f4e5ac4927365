"""Facts of GPU architectures: what one processor (SM, CU) offers, and how many blocks of a kernel it holds.

The figures are the vendors' own (CUDA programming guide, "compute capabilities"; AMD CDNA instruction set
guides). Rates are dense operations a clock and processor, a multiply-add counted as two.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

_KB = 1024


@dataclass(frozen=True)
class Architecture:
    """One compile target: "sm_90", "gfx942".

    `warp` is in threads; `registers` in 32-bit registers a processor, of which a warp is given multiples of
    `register_granule`; a thread can name `thread_registers`. `shared` and `block_shared` are bytes of shared
    memory (LDS) a processor and a block can use, `reserved_shared` what the system takes of each block's.
    `warps` and `blocks` bound what a processor holds at once. `matmul_per_clock` (16-bit operands, float32
    sums) and `float32_per_clock` are operations, `shared_per_clock` bytes. `descriptors`: a copy engine
    that reads tiles by tensor descriptor (TMA). `warp_groups`: products by four warps at once, of at least
    64 rows, whose operands stay in shared memory (wgmma, tcgen05). `multistage`: copies to shared memory
    that run ahead of the product by more than one step (cp.async and TMA). `barrier_orders_stores`: after a
    block's barrier, what one thread releases takes the stores of all threads with it (kernels/arrive.py).
    """

    target: str
    warp: int
    registers: int
    register_granule: int
    thread_registers: int
    shared: int
    block_shared: int
    reserved_shared: int
    warps: int
    blocks: int
    matmul_per_clock: int
    float32_per_clock: int
    shared_per_clock: int = 128
    descriptors: bool = False
    warp_groups: bool = False
    multistage: bool = True
    barrier_orders_stores: bool = True

    def resident_blocks(self, registers: int, shared: int, warps: int) -> int:
        """How many blocks a processor holds at once; 0 where not even one fits.

        `registers` a thread, `shared` bytes and `warps` a block.
        """
        if shared > self.block_shared or registers > self.thread_registers:
            return 0
        granule = self.register_granule
        a_warp = -(-max(registers, 1) * self.warp // granule) * granule
        return min(
            self.registers // (a_warp * warps),
            self.shared // (shared + self.reserved_shared) if shared + self.reserved_shared else self.blocks,
            self.warps // warps,
            self.blocks,
        )


def _nvidia(target: str, shared_kb: int, warps: int, blocks: int, matmul: int, fp32: int) -> Architecture:
    return Architecture(
        target=target,
        warp=32,
        registers=65536,
        register_granule=256,
        thread_registers=255,
        shared=shared_kb * _KB,
        block_shared=(shared_kb - 1) * _KB,
        reserved_shared=_KB,
        warps=warps,
        blocks=blocks,
        matmul_per_clock=matmul,
        float32_per_clock=fp32,
        descriptors=target in ("sm_90", "sm_100", "sm_120"),
        warp_groups=target in ("sm_90", "sm_100"),
    )


def _amd(target: str, lds_kb: int, matmul: int) -> Architecture:
    # A CU is four SIMDs of 512 registers a lane, eight resident waves each.
    return Architecture(
        target=target,
        warp=64,
        registers=4 * 512 * 64,
        register_granule=8 * 64,
        thread_registers=512,
        shared=lds_kb * _KB,
        block_shared=lds_kb * _KB,
        reserved_shared=0,
        warps=32,
        blocks=32,
        matmul_per_clock=matmul,
        float32_per_clock=256,
        multistage=False,
        barrier_orders_stores=False,
    )


_ALL = (
    _nvidia("sm_80", shared_kb=164, warps=64, blocks=32, matmul=2048, fp32=128),
    _nvidia("sm_86", shared_kb=100, warps=48, blocks=16, matmul=512, fp32=256),
    _nvidia("sm_89", shared_kb=100, warps=48, blocks=24, matmul=512, fp32=256),
    _nvidia("sm_90", shared_kb=228, warps=64, blocks=32, matmul=4096, fp32=256),
    _nvidia("sm_100", shared_kb=228, warps=64, blocks=32, matmul=8192, fp32=256),
    _nvidia("sm_120", shared_kb=100, warps=48, blocks=24, matmul=512, fp32=256),
    _amd("gfx90a", lds_kb=64, matmul=1024),
    _amd("gfx942", lds_kb=64, matmul=2048),
    _amd("gfx950", lds_kb=160, matmul=4096),
)
ARCHITECTURES = {each.target: each for each in _ALL}


def architecture(target: str) -> Architecture:
    """The facts of "sm_90" or "gfx942"; for one not listed, those of the newest listed before it, under its
    own name. Raises ValueError for what names no GPU or one older than all listed.
    """
    known = ARCHITECTURES.get(target)
    if known is not None:
        return known
    older = [
        each for each in _ALL if _family(each.target) == _family(target) and _age(each.target) < _age(target)
    ]
    if not older:
        raise ValueError(f"{target!r} is no known GPU target; known: {', '.join(ARCHITECTURES)}")
    return replace(max(older, key=lambda each: _age(each.target)), target=target)


def _family(target: str) -> str:
    return target.rstrip("0123456789abcdef") or target


def _age(target: str) -> int:
    digits = target[len(_family(target)) :]
    return int(digits, 16) if digits else -1
