"""The layers that plans are compared on: six models' shapes, and the least time the GPU's facts allow."""

from dsmoe_compiler.codegen.gpu import Gpu
from dsmoe_compiler.codegen.plan import Problem

# Model width, expert width, experts, experts per token, width of all shared experts.
SHAPES = {
    "deepseek-moe-16b": (2048, 1408, 64, 6, 2 * 1408),
    "mixtral-8x7b": (4096, 14336, 8, 2, 0),
    "qwen3-30b-a3b": (2048, 768, 128, 8, 0),
    "deepseek-v3": (7168, 2048, 256, 8, 2048),
    "olmoe": (2048, 1024, 64, 8, 0),
    "gpt-oss-120b": (2880, 2880, 128, 4, 0),
}
TOKENS = (1, 8, 64, 512, 4096, 16384)


def layer(shape: str, tokens: int, dtype: str = "bfloat16") -> Problem:
    hidden, width, experts, top_k, shared = SHAPES[shape]
    return Problem(tokens, hidden, width, experts, top_k, taps=2, dtype=dtype, shared_width=shared)


def floor(problem: Problem, gpu: Gpu) -> float:
    """Seconds: the weights of the experts that uniform routing selects, read once, or all products at the
    matmul's rate, whichever is longer.
    """
    p = problem
    selected = p.experts * (1 - (1 - p.top_k / p.experts) ** p.tokens)
    matrices = p.taps + 1
    weights = matrices * p.hidden * (selected * p.width + p.shared_width) * p.item
    flops = 2 * p.tokens * matrices * p.hidden * (p.top_k * p.width + p.shared_width)
    return max(weights / gpu.memory_rate, flops / gpu.rate(p.dtype))
