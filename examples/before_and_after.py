"""One DeepSeekMoE layer before and after the passes, as textual IR.

python examples/before_and_after.py
"""

import torch

from dsmoe_compiler import pipeline
from dsmoe_compiler.capture import capture
from dsmoe_compiler.ir.graph import ProgramGraph
from dsmoe_compiler.ir.printer import print_graph
from dsmoe_compiler.models import zoo
from dsmoe_compiler.passes.normalize import Normalize


def main() -> None:
    """Print the layer as captured and normalized, then after all passes."""
    layer = zoo.build("deepseek-moe-tiny").model.layers[1].mlp
    captured = capture(layer, (torch.randn(2, 7, 96),))
    graph = ProgramGraph(captured.exported)
    pipeline.run(graph, (Normalize(),), "off")
    print("# before")
    print(print_graph(graph))
    pipeline.run(graph, pipeline.DEFAULT, "numeric")
    print("# after")
    print(print_graph(graph), end="")


if __name__ == "__main__":
    main()
