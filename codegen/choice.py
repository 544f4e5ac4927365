"""What was chosen for a layer: the plan for a bucket of tokens on a GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dsmoe_compiler.codegen.gpu import Gpu, for_target
from dsmoe_compiler.codegen.layer import Layer
from dsmoe_compiler.codegen.plan import choose, choose_shared
from dsmoe_compiler.codegen.tiles import Decode, GemmTiles, GemvTiles, Grouped, Plan


@dataclass(frozen=True)
class Choice:
    """What was chosen for a layer and a bucket of tokens on a GPU; `shared` is the plan of the shared experts
    where they run beside a grouped one.
    """

    tokens: int
    gpu: Gpu
    plan: Plan
    shared: Grouped | None = None


def choice_of(layer: Layer, tokens: int, gpu: Gpu, triton: str) -> Choice:
    """The plan for a bucket of tokens; `triton` is Triton's version. Raises Unsupported."""
    problem = layer.problem(tokens)
    plan = choose(problem, gpu, triton)
    beside = isinstance(plan, Grouped) and layer.shared_ffn is not None
    return Choice(tokens, gpu, plan, choose_shared(problem, gpu, triton) if beside else None)


def interpreted(layer: Layer, tokens: int) -> Choice:
    """The plan for Triton's interpreter, which takes as long for a program and a step whatever their size:
    few large ones. Raises Unsupported.
    """
    gpu = replace(for_target("sm_90"), name="Triton's interpreter", processors=1)
    if tokens * layer.top_k <= 8:
        return Choice(tokens, gpu, Decode(GemvTiles(128, 256, 4, 1), GemvTiles(128, 256, 4, 1)))
    tiles = GemmTiles(32, 128, 128, 4, 1, tma=layer.problem(tokens).tma)
    plan = Grouped(tiles, tiles, programs=1)
    return Choice(tokens, gpu, plan, plan if layer.shared_ffn else None)
