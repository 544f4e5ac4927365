"""One process of `benchmarks.memory`: resident memory while a model of separate experts is compiled.

    python -m benchmarks.one_pack SPELLING LAYERS WIDTH HIDDEN EXPERTS

Prints JSON: bytes of weights, and resident bytes after capture alone, at the peak of compile, and after it.
"""

from __future__ import annotations

import gc
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import dsmoe_compiler
from benchmarks.module_lists import SPELLINGS, Network
from dsmoe_compiler.capture import capture

_STATUS, _RESET_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Packed:
    """Bytes: of the weights, and resident at three times; `fused` of the model's layers."""

    weights: int
    captured: int
    peak: int
    after: int
    fused: int


def resident(field: str = "VmRSS") -> int:
    """Bytes of this process in memory now, or at its peak ("VmHWM")."""
    (line,) = [line for line in _STATUS.read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) * 1024


def measured(spelling: str, layers: int, width: int, hidden: int, experts: int) -> Packed:
    """Capture, then compile, in this process."""
    model = Network(SPELLINGS[spelling], layers, width, hidden, experts).eval()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    x = torch.randn(10, width)
    capture(model, (x,))
    gc.collect()
    captured = resident()
    _RESET_PEAK.write_text("5")
    program = dsmoe_compiler.compile(model, (x,), require_fused=True)
    peak = resident("VmHWM")
    gc.collect()
    return Packed(weights, captured, peak, resident(), program.report.fused)


if __name__ == "__main__":
    print(json.dumps(asdict(measured(sys.argv[1], *map(int, sys.argv[2:])))))
