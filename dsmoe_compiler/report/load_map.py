"""The heat map's cells: one character for an expert, or for a few neighbours, as high as their load."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from dsmoe_compiler.report.load import LayerLoad

RAMP = "·▁▂▃▄▅▆▇█"  # none, then eighths of twice an even share; it reads without colours
ASCII = ".:-=+*#%@"  # the same where those characters cannot be shown
EVEN = 4  # the place of an even share in it


def experts_a_cell(layers: Sequence[LayerLoad], width: int) -> int:
    """The least power of two of experts in a cell with which every layer's row is at most so wide."""
    most, together = max(len(layer.counts) for layer in layers), 1
    while -(-most // together) > width:
        together *= 2
    return together


def row(layer: LayerLoad, together: int) -> str:
    """A layer's cells, the experts in their order, so many in a cell."""
    shares = layer.shares or (0.0,) * len(layer.counts)
    return "".join(_cell(shares[i : i + together]) for i in range(0, len(shares), together))


def _cell(shares: Sequence[float]) -> str:
    """That of experts with these shares, 1 being an even one: any load at all is more than none."""
    mean = fmean(shares)
    return RAMP[min(len(RAMP) - 1, max(1, round(EVEN * mean)))] if mean else RAMP[0]
