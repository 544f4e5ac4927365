"""What a fused op says of itself: router, experts, combine, shared experts, each with its parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping

from dsmoe_compiler.ir.body import Body
from dsmoe_compiler.ir.spec import MoESpec
from dsmoe_compiler.report.drawing.layer_graph import Parameter
from dsmoe_compiler.report.drawing.sketch import Section

_WEIGHING = {
    "output": "out[t] = Σₖ w[t,k] · f(x[t])",
    "inside": "out[t] = Σₖ f(x[t], w[t,k])",
    "none": "out[t] = Σₖ f(x[t])",
}


def sections_of(spec: MoESpec, lists: Mapping[str, tuple[Parameter, ...]]) -> tuple[Section, ...]:
    """The parts of a layer in the order a token meets them; a router that stayed as written has none."""
    experts, sections = spec.experts, list[Section]()
    if spec.router is not None:
        sections.append(
            Section("router", "Router", (str(spec.router), *_parameters(lists.get("router", ()))), ())
        )
    sections.append(
        Section(
            "experts",
            f"{experts.count} experts",
            (str(experts), *_parameters(lists.get("params", ()))),
            _code(experts.body),
        )
    )
    sections.append(Section("combine", "Combine", (_WEIGHING[experts.weighting],), ()))
    if spec.shared is not None:
        sections.append(
            Section(
                "shared",
                "Shared experts",
                (str(spec.shared), *_parameters(lists.get("shared", ()))),
                _code(spec.shared.body),
            )
        )
    return tuple(sections)


def _parameters(parameters: tuple[Parameter, ...]) -> list[str]:
    return [f"p{i} {p.name} {_sizes(p.type)}" for i, p in enumerate(parameters)]


def _code(body: Body) -> tuple[str, ...]:
    return tuple(piece.strip() for piece in str(body).split("; "))


def _sizes(type_text: str) -> str:
    return re.sub(r"^\w+", "", type_text)
