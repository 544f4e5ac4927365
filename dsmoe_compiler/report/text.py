"""A report as plain text: what `str(report)` and a piped command print."""

from __future__ import annotations

from dsmoe_compiler.report.report import Report
from dsmoe_compiler.report.story import tell

WIDTH = 80


def render(report: Report) -> str:
    """The MoE map, the passes and the remarks, at most 80 characters wide unless a name is longer.

    DeepSeekMoEForCausalLM: 2 of 2 MoE layers fused; plain export, backend cpu

    layer                E  router         experts                       shared
    model.layers.0.mlp  64  softmax→top-6  SwiGLU [gate;up] D=768 F=256  512
    model.layers.1.mlp  64  softmax→top-6  SwiGLU [gate;up] D=768 F=256  512
    every layer: idiom gathered weights, batched GEMM; source experts.py:78

    pass            ms      nodes  max error
    lift_experts  31.4  412 → 347    2.4e-07
    """
    story = tell(report, WIDTH)
    blocks = [
        [*story.headline],
        [*(story.layers.lines() if story.layers else ()), *story.legend],
        [*(story.passes.lines() if story.passes else ())],
        [*story.remarks],
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block)
