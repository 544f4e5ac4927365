"""The least time that a layer can take on a CPU, from rates that torch reaches in the same rounds.

Bandwidth is a large matrix times a vector: blocks of the layers' own weights, so that what a cache holds of
those helps it as much as the ways it is compared with. The peak is a large product. Each is tried in the ways
that torch has, and the fastest counts.

T tokens, D model width, F expert hidden width, E routed experts, K experts per token, S shared experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cpu_shapes import Shape, expert_weights
from benchmarks.measure import Rounds

_BLOCK = 64 * 2**20  # bytes of the matrix that meets a vector
_COLUMNS = 4096
_ROWS, _INNER = 1024, 2048  # of the large product
_APART, _AHEAD = 3, 7  # rounds between uses of a block


@dataclass(frozen=True)
class Rates:
    """Bytes/s and FLOP/s, and how torch reached them."""

    memory: float
    memory_by: str
    matmul: float
    matmul_by: str


@dataclass(frozen=True)
class Probes:
    """Calls by name, to take turns with what is measured; they read `block` bytes, or do `flops`."""

    memory: Mapping[str, Callable[[int], Tensor]]
    matmul: Mapping[str, Callable[[int], Tensor]]
    block: int
    flops: int

    @property
    def calls(self) -> dict[str, Callable[[int], Tensor]]:
        """By round. No two read the same block in the same round, or a few rounds apart."""
        return self._at(0)

    @property
    def ahead(self) -> dict[str, Callable[[int], Tensor]]:
        """The same on other blocks, to wake the threads."""
        return self._at(_AHEAD)

    def _at(self, ahead: int) -> dict[str, Callable[[int], Tensor]]:
        def at(call: Callable[[int], Tensor], offset: int) -> Callable[[int], Tensor]:
            return lambda i: call(i + offset)

        every = {**self.memory, **self.matmul}
        return {name: at(call, ahead + _APART * n) for n, (name, call) in enumerate(every.items())}

    def rates(self, found: Rounds) -> Rates:
        """The fastest way's median, of each kind."""
        seconds, by = min((found.median(name), name) for name in self.memory)
        matmul_seconds, matmul_by = min((found.median(name), name) for name in self.matmul)
        return Rates(self.block / seconds, by, self.flops / matmul_seconds, matmul_by)


def probes(layers: Sequence[nn.Module], dtype: torch.dtype) -> Probes:
    """Ways to read the layers' weights, a block a call, and ways to multiply two matrices of this dtype."""
    flat = [expert_weights(layer)[0].view(-1) for layer in layers]
    block = min(_BLOCK, flat[0].nbytes)
    blocks = flat[0].nbytes // block

    def matvec(seen_as: torch.dtype) -> Callable[[int], Tensor]:
        rows = block // dtype.itemsize
        vector = torch.ones(_COLUMNS, dtype=seen_as)

        def run(i: int) -> Tensor:
            start = i // len(flat) % blocks * rows
            numbers = flat[i % len(flat)][start : start + rows].view(seen_as)
            return torch.mv(numbers.view(-1, _COLUMNS), vector)

        return run

    a, b = torch.randn(_ROWS, _INNER).to(dtype), torch.randn(_INNER, _INNER).to(dtype)
    # Two bfloat16 read as one float32 are a number, too: one half is its sign, exponent and first bits.
    memory = {f"matvec as {_name(d)}": matvec(d) for d in dict.fromkeys((dtype, torch.float32))}
    matmul: dict[str, Callable[[int], Tensor]] = {
        "mm": lambda i: torch.mm(a, b),
        "linear": lambda i: F.linear(a, b),
    }
    return Probes(memory, matmul, block, 2 * _ROWS * _INNER * _INNER)


def routed_floor(shape: Shape, dtype: torch.dtype, tokens: int, touched: float, rates: Rates) -> float:
    """Seconds for the routed experts: the matrices of the `touched` ones read once, or all products at the
    peak, whichever takes longer.
    """
    moved = touched * shape.expert_numbers * dtype.itemsize
    flops = 2 * tokens * shape.top_k * shape.expert_numbers
    return max(moved / rates.memory, flops / rates.matmul)


def layer_floor(shape: Shape, dtype: torch.dtype, tokens: int, touched: float, rates: Rates) -> float:
    """Seconds for the whole layer: with the shared experts and the router's matrix."""
    router = shape.experts * shape.width
    moved = ((touched + shape.shared) * shape.expert_numbers + router) * dtype.itemsize
    flops = 2 * tokens * ((shape.top_k + shape.shared) * shape.expert_numbers + router)
    return max(moved / rates.memory, flops / rates.matmul)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
