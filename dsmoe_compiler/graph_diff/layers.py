"""MoE layers as a comparison tells them, from their specs."""

from __future__ import annotations

import re
from collections.abc import Iterable

from dsmoe_compiler.graph_diff.facts import Layer
from dsmoe_compiler.ir.spec import MoESpec


def fused_layer(name: str, spec: MoESpec) -> Layer:
    """A layer that is one op, or was exported from one."""
    return Layer(
        name,
        True,
        spec.text,
        str(spec.router) if spec.router else f"top-{spec.top_k}, as written",
        f"{spec.experts.count} × {spec.experts}",
        str(spec.shared) if spec.shared else "",
    )


def in_order(layers: Iterable[Layer]) -> tuple[Layer, ...]:
    """By name, layer 2 before layer 10."""
    return tuple(sorted(layers, key=lambda layer: natural(layer.name)))


def natural(name: str) -> tuple[tuple[bool, int, str], ...]:
    """A key that sorts numbers in names by what they are worth, before words."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    return tuple((False, int(part), "") if part[0] in "0123456789" else (True, 0, part) for part in parts)
