"""The answer to "what happened to my model": one record a layer, one a pass.

A report is plain data: it survives JSON, so a loaded program tells the same story as the compile that made
it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from dsmoe_compiler.ir.errors import Refusal
from dsmoe_compiler.ir.explanation import Explanation, Moment, SourceLine, Spelling
from dsmoe_compiler.ir.spec import MoESpec, parse


@dataclass(frozen=True)
class Left:
    """Something of a fused layer that stayed as it was written: "router as written", and why."""

    what: str
    refusal: Refusal | None = None


@dataclass(frozen=True)
class LayerReport:
    """One Mixture-of-Experts layer, in execution order.

    `name` is the module path, `idiom` the spelling it was found in, `source` the model's own "file.py:123".
    `fused` is true when the experts became one op; `spec` then says what it is, with `spec.router` None where
    the router stayed as written (`left` says why), and `op` names the op in the program's graph. Otherwise
    `refusal` says why not. `explanation` is how far its values were understood, None where they were not
    looked at.
    """

    name: str
    idiom: str
    fused: bool
    spec: MoESpec | None
    refusal: Refusal | None
    source: str
    remarks: tuple[str, ...] = ()
    explanation: Explanation | None = None
    left: tuple[Left, ...] = ()
    op: str = ""


@dataclass(frozen=True)
class PassReport:
    """One pass: seconds it took, nodes before and after, whether it changed anything.

    `max_error` is the largest relative error its replacements showed in validation, None if nothing was
    validated.
    """

    name: str
    seconds: float
    nodes_before: int
    nodes_after: int
    changed: bool
    max_error: float | None


@dataclass(frozen=True)
class Report:
    """The whole story of one compile or inspection.

    `model` is the class or function name, `capture` how the graph was obtained, `backend` what runs the
    layers (None for an inspection), `program_error` the largest relative error of the whole program against
    the model on the example inputs (None if not checked), `kernels` what a CPU runs them by ("native kernels,
    amx"; "" where no CPU does).
    """

    model: str
    capture: str
    layers: tuple[LayerReport, ...]
    passes: tuple[PassReport, ...]
    backend: str | None = None
    program_error: float | None = None
    remarks: tuple[str, ...] = ()
    kernels: str = ""

    @property
    def fused(self) -> int:
        """How many layers were fused."""
        return sum(layer.fused for layer in self.layers)

    def __str__(self) -> str:
        from dsmoe_compiler.report.text import render

        return render(self)

    def to_json(self) -> str:
        """The report as JSON; specs by their canonical line."""
        record = asdict(self)
        for layer, entry in zip(self.layers, record["layers"], strict=True):
            entry["spec"] = layer.spec.text if layer.spec else None
        return json.dumps(record, indent=2)

    @staticmethod
    def from_json(text: str) -> Report:
        """The inverse of `to_json`. Raises ValueError, KeyError or TypeError on anything else."""
        record: dict[str, Any] = json.loads(text)
        layers = tuple(_layer(entry) for entry in record["layers"])
        passes = tuple(PassReport(**entry) for entry in record["passes"])
        return Report(**{**record, "layers": layers, "passes": passes, "remarks": tuple(record["remarks"])})


def _layer(entry: dict[str, Any]) -> LayerReport:
    """Of an entry of an older version, what it has."""
    read = {
        "spec": parse(entry["spec"], MoESpec) if entry["spec"] else None,
        "refusal": _refusal(entry["refusal"]),
        "remarks": tuple(entry["remarks"]),
        "explanation": _explanation(entry.get("explanation")),
        "left": tuple(Left(e["what"], _refusal(e["refusal"])) for e in entry.get("left", ())),
    }
    return LayerReport(**{**entry, **read})


def _refusal(entry: dict[str, Any] | None) -> Refusal | None:
    return Refusal(**entry) if entry else None


def _explanation(entry: dict[str, Any] | None) -> Explanation | None:
    if entry is None:
        return None
    moments = tuple(
        Moment(**{**m, "lines": tuple(SourceLine(**line) for line in m["lines"])}) for m in entry["moments"]
    )
    return Explanation(moments, tuple(Spelling(**s) for s in entry["nearest"]), entry["remedy"])
