"""One step of T tokens: what it reads and computes, and the least time that takes on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dsmoe_compiler.cost_model.held import Held, Routing
from dsmoe_compiler.cost_model.sizes import Sizes
from dsmoe_compiler.cost_model.work import Worked
from dsmoe_compiler.runtime.gpu_catalogue import Ceilings


@dataclass(frozen=True)
class ExpertsHit:
    """Of E experts of a layer, how many a step is expected to choose."""

    experts: int
    expected: float


@dataclass(frozen=True)
class Step:
    """A forward of `batch` sequences of `length` tokens.

    `weight_bytes`: of the model's tensors, as far as they are expected to be read, each number once. Times in
    seconds: `compute_seconds` for all products at the GPU's rate for their dtype, `memory_seconds` for the
    weights' bytes at its memory's.
    """

    batch: int
    length: int
    flops: int
    weight_bytes: float
    hit: tuple[ExpertsHit, ...]
    compute_seconds: float
    memory_seconds: float

    @property
    def tokens(self) -> int:
        """T."""
        return self.batch * self.length

    @property
    def bytes_per_token(self) -> float:
        """The weights' bytes, shared by all tokens; 0 of no tokens."""
        return self.weight_bytes / self.tokens if self.tokens else 0.0

    @property
    def intensity(self) -> float | None:
        """FLOPs for each byte of weights; None where none is read."""
        return self.flops / self.weight_bytes if self.weight_bytes else None

    @property
    def seconds(self) -> float:
        """The floor: whichever takes longer."""
        return max(self.compute_seconds, self.memory_seconds)

    @property
    def bound(self) -> Literal["compute", "memory"]:
        """What holds it up."""
        return "compute" if self.compute_seconds > self.memory_seconds else "memory"


def step(
    worked: Worked, sizes: Sizes, tensors: Sequence[Held], routings: Sequence[Routing], gpu: Ceilings
) -> Step:
    """The step that was counted, its weights read as a uniform router would have it."""
    weight_bytes = sum(tensor.bytes_read(sizes.tokens) for tensor in tensors)
    return Step(
        batch=sizes.batch,
        length=sizes.length,
        flops=worked.flops,
        weight_bytes=weight_bytes,
        hit=tuple(ExpertsHit(each.experts, each.hit(sizes.tokens)) for each in dict.fromkeys(routings)),
        compute_seconds=sum(work.flops / gpu.rate(work.dtype) for work in worked.works),
        memory_seconds=weight_bytes / gpu.memory_rate,
    )
