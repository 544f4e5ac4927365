"""One layer as plain data: its inputs, its operators with their roles, what it becomes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from dsmoe_compiler.ir.spec import MoESpec
from dsmoe_compiler.report.report import LayerReport

Role: TypeAlias = Literal["router", "permutation", "experts", "combine", "shared"]
ROLES: tuple[Role, ...] = ("router", "permutation", "experts", "combine", "shared")
MEANING: Mapping[Role, str] = {
    "router": "chooses experts and weighs them",
    "permutation": "brings each token to its experts",
    "experts": "the routed experts' maths",
    "combine": "weighs and sums per token",
    "shared": "what every token visits",
}


@dataclass(frozen=True)
class Parameter:
    """A tensor of the model: its name, relative to the layer's when it begins with a dot, and its type."""

    name: str
    type: str


@dataclass(frozen=True)
class Given:
    """A value that the layer reads from outside."""

    name: str
    type: str


@dataclass(frozen=True)
class Operator:
    """One value of the layer.

    `name` is what the layer's text calls it, `reads` the names of values it reads, in order, with repeats;
    `line` its line of text; `lost` whether understanding ended here. A fused op has its `spec`, and its lists
    of parameters under their names.
    """

    name: str
    operator: str
    type: str
    role: Role
    reads: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    line: str
    lost: bool = False
    spec: MoESpec | None = None
    lists: tuple[tuple[str, tuple[Parameter, ...]], ...] = ()


@dataclass(frozen=True)
class LayerGraph:
    """A layer's values in execution order; `results` are the names of those that are read outside.

    `sizes` and `assertions` count what is no operator on data.
    """

    inputs: tuple[Given, ...]
    operators: tuple[Operator, ...]
    results: tuple[str, ...]
    sizes: int
    assertions: int
    text: str


@dataclass(frozen=True)
class LayerAnatomy:
    """A layer of `model` before the passes and after them; `after` is None where nothing was fused."""

    model: str
    report: LayerReport
    before: LayerGraph
    after: LayerGraph | None

    @property
    def text(self) -> str:
        """The layer's text before and after, one under the other."""
        before = f"# before: {len(self.before.operators)} operators on data\n{self.before.text}"
        if self.after is None:
            refusal = self.report.refusal
            return f"{before}\n# not fused{f': {refusal}' if refusal else ''}\n"
        return f"{before}\n# after: {len(self.after.operators)} operators on data\n{self.after.text}"
