"""Capture one model of the zoo in this process, once, and print what it cost as a line of JSON.

    python -m benchmarks.one_capture export deepseek-moe-16b
    python -m benchmarks.one_capture inspect deepseek-moe-16b

`export` is torch.export.export alone, `inspect` is dsmoe_compiler.inspect; both trace the same model on the
meta device, with the same inputs, batch and length dynamic.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Cost:
    """CPU seconds of the imports and of the call, peak resident memory, and the MoE layers seen and fused."""

    import_seconds: float
    call_seconds: float
    peak_megabytes: float
    layers: int
    fused: int


def export(name: str) -> Cost:
    """A bare torch.export.export."""
    start = time.process_time()
    import torch

    imported = time.process_time()
    from benchmarks.measure import peak_megabytes
    from dsmoe_compiler.models import zoo

    model, inputs = zoo.build(name, device="meta"), zoo.example_inputs(name, "meta")
    sizes = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    before = time.process_time()
    torch.export.export(model, (), inputs, dynamic_shapes={"input_ids": sizes})
    return Cost(imported - start, time.process_time() - before, peak_megabytes(), 0, 0)


def inspect(name: str) -> Cost:
    """The export, and the understanding of every layer."""
    start = time.process_time()
    import dsmoe_compiler

    call = dsmoe_compiler.inspect
    imported = time.process_time()
    from benchmarks.measure import peak_megabytes
    from dsmoe_compiler.models import zoo

    model, inputs = zoo.build(name, device="meta"), zoo.example_inputs(name, "meta")
    before = time.process_time()
    report = call(model, (), inputs)
    spent = time.process_time() - before
    return Cost(imported - start, spent, peak_megabytes(), len(report.layers), report.fused)


if __name__ == "__main__":
    what, model_name = sys.argv[1:]
    print(json.dumps(asdict({"export": export, "inspect": inspect}[what](model_name))))
