"""How evenly a model's experts are used: count what tokens choose, and look at it.

python examples/expert_load.py [FILE.json]
"""

import sys

import torch

import dsmoe_compiler as dsmoe
from dsmoe_compiler.models import zoo

MODEL = "deepseek-moe-tiny"


def main() -> None:
    """Compile a model with random weights, count the load of sixteen sequences, print it, and save it to the
    file that the command line names.
    """
    model = zoo.build(MODEL)
    program = dsmoe.compile(model, (), zoo.example_inputs(MODEL))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), program.count_load() as load:
        for _ in range(16):
            program(input_ids=torch.randint(512, (1, 64), generator=generator))
    print(load)
    if len(sys.argv) > 1:
        load.save(sys.argv[1])


if __name__ == "__main__":
    main()
