"""The least time that a layer can take on a device, and the small layers of a run without one.

T tokens, D model width, F expert width, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.moe_shapes import Shape
from dsmoe_compiler.ir.spec import RouterSpec

# Bytes of a number: everything is bfloat16.
ITEM = 2
_ROUTER = RouterSpec(2, "softmax", renormalize=True, score_dtype="float32")
_GPT_OSS_ROUTER = RouterSpec(2, "softmax", select="logits", logits_bias=True)
# For --dry: sizes that Triton's interpreter gets through.
DRY_SHAPES = {
    shape.name: shape
    for shape in (
        Shape("S1", "tiny", 48, 32, 8, _ROUTER, shared=64),
        Shape("S6", "tiny", 40, 24, 6, _GPT_OSS_ROUTER, gpt_oss=True),
    )
}
DRY_TOKENS = (1, 20)


def expert_bytes(shape: Shape) -> int:
    """Of one expert's three matrices."""
    return 3 * shape.hidden * shape.width * ITEM


def weight_bytes(shape: Shape) -> int:
    """Of all routed experts."""
    return shape.experts * expert_bytes(shape)


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches: bytes/s of a large copy, read and written, and FLOP/s of a large product."""

    memory: float
    matmul: float

    def experts(self, shape: Shape, tokens: int, selected: float) -> float:
        """The floor of the routed experts, in seconds: the matrices of the `selected` ones, x and the output
        moved once, or all products at the matmul's rate, whichever takes longer.
        """
        moved = selected * expert_bytes(shape) + 2 * tokens * shape.hidden * ITEM
        flops = tokens * shape.router.top_k * self._flops(shape, shape.width)
        return max(moved / self.memory, flops / self.matmul)

    def layer(self, shape: Shape, tokens: int, selected: float) -> float:
        """The floor of the whole layer: with the shared experts and the router's matrix."""
        shared = 3 * shape.hidden * shape.shared * ITEM
        rows = (2 * tokens + shape.experts) * shape.hidden * ITEM
        moved = selected * expert_bytes(shape) + shared + rows
        routed = self._flops(shape, shape.router.top_k * shape.width + shape.shared)
        flops = tokens * (routed + 2 * shape.experts * shape.hidden)
        return max(moved / self.memory, flops / self.matmul)

    @staticmethod
    def _flops(shape: Shape, width: int) -> int:
        """Of a token's three products with experts of this width."""
        return 2 * 3 * shape.hidden * width
