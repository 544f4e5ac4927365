"""The GPUs one can name, and what their data sheets promise. Needs no GPU and no Triton."""

from __future__ import annotations

from dataclasses import dataclass

from dsmoe_compiler.codegen.gpu import GPUS, MATMUL_REACHED, MEMORY_REACHED, Gpu
from dsmoe_compiler.ir.errors import InputError
from dsmoe_compiler.nearest import unknown


@dataclass(frozen=True)
class Ceilings:
    """What no kernel exceeds, by its data sheet: dense FLOP/s of products of 16-bit and of float32 operands,
    bytes/s of memory.
    """

    name: str
    matmul_rate: float
    float32_rate: float
    memory_rate: float

    def rate(self, dtype: str) -> float:
        """FLOP/s of products of `dtype` operands ("bfloat16"); of float64 as of float32."""
        return self.float32_rate if dtype in ("float32", "float64") else self.matmul_rate


def ceilings(gpu: Gpu) -> Ceilings:
    """The catalogue plans with what kernels reach; this is what that is a part of."""
    return Ceilings(
        gpu.name,
        gpu.matmul_rate / MATMUL_REACHED,
        gpu.float32_rate / MATMUL_REACHED,
        gpu.memory_rate / MEMORY_REACHED,
    )


def named(name: str) -> Gpu:
    """A GPU of the catalogue by the end of its name, spaces and case aside: "h200", "MI300X", "rtx4090".

    Raises InputError for a name of none.
    """
    short = {_plain(gpu.name.split(" ", 1)[1]): gpu for gpu in GPUS}
    found = [gpu for key, gpu in short.items() if _plain(name) and key.endswith(_plain(name))]
    if len(found) != 1:
        raise InputError(unknown("GPU", name, [gpu.name.split()[-1] for gpu in GPUS]))
    return found[0]


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())
