"""Facts of GPUs, as the plan needs them: a catalogue, and the device at hand.

Ceilings are what kernels reach, not what data sheets promise: of an H200's 989 TFLOP/s a large matmul was
measured to reach 790, of its 4.8 TB/s a copy 4.3. The other entries of the catalogue, which nobody measured
here, are their data sheets' figures times the same two fractions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from dsmoe_compiler.codegen.architecture import Architecture, architecture

MATMUL_REACHED = 0.8
MEMORY_REACHED = 0.9

_TERA = 1e12
_MB = 1 << 20


@dataclass(frozen=True)
class Gpu:
    """One product. `processors`: SMs or CUs; `clock` in Hz; `l2` in bytes; `memory_rate` and `l2_rate` in
    bytes/s; `matmul_rate` (16-bit operands) and `float32_rate` in FLOP/s. `latency`: seconds until a first
    load from memory arrives. `launch`: seconds between one kernel's last block and the next one's first,
    inside a captured graph.

    Latency, launch and L2 rate are estimates of their order: they rank candidates.
    """

    name: str
    architecture: Architecture
    processors: int
    clock: float
    l2: int
    memory_rate: float
    l2_rate: float
    matmul_rate: float
    float32_rate: float
    latency: float = 0.6e-6
    launch: float = 1.5e-6

    @property
    def target(self) -> str:
        """What the compiler is asked for: "sm_90", "gfx942"."""
        return self.architecture.target

    def rate(self, dtype: str) -> float:
        """FLOP/s of products of `dtype` operands with float32 sums. No tf32."""
        return self.float32_rate if dtype == "float32" else self.matmul_rate


def _sheet(
    name: str,
    target: str,
    *,
    processors: int,
    clock_ghz: float,
    l2_mb: int,
    memory_tb: float,
    l2_tb: float,
    matmul_tflop: float,
    float32_tflop: float,
) -> Gpu:
    """From a data sheet's (dense) figures."""
    return Gpu(
        name=name,
        architecture=architecture(target),
        processors=processors,
        clock=clock_ghz * 1e9,
        l2=l2_mb * _MB,
        memory_rate=memory_tb * _TERA * MEMORY_REACHED,
        l2_rate=l2_tb * _TERA,
        matmul_rate=matmul_tflop * _TERA * MATMUL_REACHED,
        float32_rate=float32_tflop * _TERA * MATMUL_REACHED,
    )


H200 = _sheet(
    "NVIDIA H200",
    "sm_90",
    processors=132,
    clock_ghz=1.83,
    l2_mb=50,
    memory_tb=4.8,
    l2_tb=9.0,
    matmul_tflop=989,
    float32_tflop=67,
)
H100 = replace(H200, name="NVIDIA H100", memory_rate=3.35 * _TERA * MEMORY_REACHED)
A100 = _sheet(
    "NVIDIA A100",
    "sm_80",
    processors=108,
    clock_ghz=1.41,
    l2_mb=40,
    memory_tb=2.04,
    l2_tb=7.2,
    matmul_tflop=312,
    float32_tflop=19.5,
)
RTX_4090 = _sheet(
    "NVIDIA GeForce RTX 4090",
    "sm_89",
    processors=128,
    clock_ghz=2.52,
    l2_mb=72,
    memory_tb=1.01,
    l2_tb=5.0,
    matmul_tflop=165,
    float32_tflop=82.6,
)
# Its "L2" here is the Infinity Cache, which all dies share.
MI300X = _sheet(
    "AMD Instinct MI300X",
    "gfx942",
    processors=304,
    clock_ghz=2.1,
    l2_mb=256,
    memory_tb=5.3,
    l2_tb=17.2,
    matmul_tflop=1307,
    float32_tflop=163.4,
)
GPUS = (H100, H200, A100, RTX_4090, MI300X)


def for_target(target: str) -> Gpu:
    """The catalogue's GPU to plan for when only a target is named ("sm_90" → H200). For a target without one,
    the figures of a full-size GPU of its architecture. Raises ValueError for an unknown target.
    """
    for gpu in (H200, *GPUS):
        if gpu.target == target:
            return gpu
    return _estimated(
        target, architecture(target), processors=128, clock=1.7e9, l2=50 * _MB, memory=2 * _TERA
    )


def of_device(device: int | None = None) -> Gpu:
    """The GPU at hand (torch's current one, or by number). Needs torch with a CUDA or ROCm device."""
    import torch

    return from_properties(torch.cuda.get_device_properties(device))


def from_properties(properties: Any) -> Gpu:
    """The facts behind `torch.cuda.get_device_properties()`.

    A product of the catalogue is known by its name and number of processors ("NVIDIA H100 80GB HBM3" with 132
    SMs; not the PCIe board's 114); of any other, the rates follow from clocks, bus width and architecture.
    """
    processors = properties.multi_processor_count
    for gpu in GPUS:
        if properties.name.startswith(gpu.name) and processors == gpu.processors:
            return gpu
    arch = _architecture_of(properties)
    clock = _hertz(properties, "clock_rate") or 1.7e9
    bus_bytes = getattr(properties, "memory_bus_width", 0) / 8
    # Two transfers a clock of the memory; where torch is too old to say, a plausible card's.
    memory = 2 * _hertz(properties, "memory_clock_rate") * bus_bytes or 1 * _TERA
    l2 = getattr(properties, "L2_cache_size", 0) or 32 * _MB
    return _estimated(properties.name, arch, processors, clock, l2, memory)


def _estimated(name: str, arch: Architecture, processors: int, clock: float, l2: int, memory: float) -> Gpu:
    cycles = processors * clock
    return Gpu(
        name=name,
        architecture=arch,
        processors=processors,
        clock=clock,
        l2=l2,
        memory_rate=memory * MEMORY_REACHED,
        # What the catalogue's GPUs offer a processor and clock.
        l2_rate=32 * cycles,
        matmul_rate=arch.matmul_per_clock * cycles * MATMUL_REACHED,
        float32_rate=arch.float32_per_clock * cycles * MATMUL_REACHED,
    )


def _architecture_of(properties: Any) -> Architecture:
    amd = getattr(properties, "gcnArchName", "")
    # NVIDIA's torch repeats the device's name here; AMD's says "gfx942:sramecc+:xnack-".
    target = amd.split(":")[0] if amd.startswith("gfx") else f"sm_{properties.major}{properties.minor}"
    arch = architecture(target)
    warps = getattr(properties, "max_threads_per_multi_processor", arch.warps * arch.warp) // arch.warp
    shared = getattr(properties, "shared_memory_per_multiprocessor", arch.shared)
    block = getattr(properties, "shared_memory_per_block_optin", arch.block_shared)
    return replace(arch, warps=warps, shared=shared, block_shared=block)


def _hertz(properties: Any, name: str) -> float:
    return float(getattr(properties, name, 0)) * 1e3
