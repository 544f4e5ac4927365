"""`dsmoe inspect --layer --graph`: which layer is meant, and where its drawing goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dsmoe_compiler.atomic import written_whole
from dsmoe_compiler.cli.output_file import require_text_place
from dsmoe_compiler.ir.errors import InputError
from dsmoe_compiler.nearest import unknown
from dsmoe_compiler.report.drawing.draw import DRAWINGS
from dsmoe_compiler.report.drawing.layer_graph import LayerAnatomy
from dsmoe_compiler.report.report import LayerReport, Report
from dsmoe_compiler.report.story import WHOLE_MODEL


def require_drawing_place(path: Path) -> None:
    """Raise InputError unless a drawing can be written at `path`. Leaves nothing there."""
    if path.suffix.lower() not in DRAWINGS:
        *others, last = DRAWINGS
        raise InputError(f"cannot draw {path}: a drawing's name ends in {', '.join(others)} or {last}")
    require_text_place(path)


def chosen_layer(report: Report, wanted: str | None) -> str:
    """The name of the layer that `wanted` names or counts from 0; the first fused one, or else the first,
    for None.

    Raises InputError when there is no such layer.
    """
    layers = report.layers
    if not layers:
        raise InputError(f"{report.model} has no Mixture-of-Experts layers: there is none to show")
    if wanted is None:
        return next((layer.name for layer in layers if layer.fused), layers[0].name)
    names = {_said(layer): layer.name for layer in layers}
    if wanted in names:
        return names[wanted]
    if wanted.isdecimal():
        return _counted(layers, int(wanted))
    raise InputError(unknown("layer", wanted, names))


def write_drawing(anatomy: LayerAnatomy, path: Path) -> None:
    """Draw a layer into a file. Raises InputError when it cannot be written."""
    drawn = DRAWINGS[path.suffix.lower()](anatomy)
    with written_whole(path) as file:
        file.write(drawn.encode())


def _said(layer: LayerReport) -> str:
    return layer.name or WHOLE_MODEL


def _counted(layers: Sequence[LayerReport], number: int) -> str:
    if number < len(layers):
        return layers[number].name
    many = f"the {len(layers)} layers are counted from 0" if len(layers) > 1 else "the one layer is layer 0"
    raise InputError(f"there is no layer {number}: {many}")
