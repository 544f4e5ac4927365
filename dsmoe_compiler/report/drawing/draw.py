"""Drawing a layer in the form that a file's name asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from dsmoe_compiler.report.drawing.compose import compose
from dsmoe_compiler.report.drawing.dot import dot
from dsmoe_compiler.report.drawing.layer_graph import LayerAnatomy
from dsmoe_compiler.report.drawing.page import page
from dsmoe_compiler.report.drawing.svg import svg


def _alone(anatomy: LayerAnatomy) -> str:
    return svg(compose(anatomy))


# By the end of the file's name.
DRAWINGS: Mapping[str, Callable[[LayerAnatomy], str]] = {".svg": _alone, ".dot": dot, ".html": page}
