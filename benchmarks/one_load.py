"""Load a saved program in this process, run it, and print what that cost and whether the output is the same.

    python -m benchmarks.one_load program.pt2 call.pt

`call.pt` holds the ids of one call and the output that the program gave before it was saved.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass

import torch

import dsmoe_compiler


@dataclass(frozen=True)
class Loaded:
    """Wall seconds of the load alone, and whether the output has the very bits it had before."""

    seconds: float
    identical: bool


def load(program_path: str, call_path: str) -> Loaded:
    """Load, run, compare."""
    call = torch.load(call_path)
    load_program = dsmoe_compiler.load
    start = time.perf_counter()
    program = load_program(program_path)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        output = program(input_ids=call["input_ids"])
    # Compared as bytes: equal numbers could still be −0 and 0.
    bits = [t.contiguous().view(torch.uint8) for t in (output, call["output"])]
    return Loaded(seconds, torch.equal(*bits))


if __name__ == "__main__":
    print(json.dumps(asdict(load(*sys.argv[1:]))))
