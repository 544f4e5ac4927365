"""One DeepSeekMoE layer before and after the passes, as textual IR.

python examples/before_and_after.py
"""

import torch

import dsmoe_compiler as dsmoe
from dsmoe_compiler.anatomy.watch import Anatomist
from dsmoe_compiler.models import zoo


def main() -> None:
    """Print the layer as captured and normalized, then after all passes."""
    layer = zoo.build("deepseek-moe-tiny").model.layers[1].mlp
    anatomist = Anatomist()
    report = dsmoe.inspect(layer, (torch.randn(2, 7, 96),), instruments=(anatomist,))
    anatomy = anatomist.layer(report, report.layers[0].name)
    assert anatomy.after is not None
    print("# before")
    print(anatomy.before.text)
    print("# after")
    print(anatomy.after.text, end="")


if __name__ == "__main__":
    main()
