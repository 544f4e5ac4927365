"""The protocol of a pass, and the log through which it answers.

A pass is a frozen dataclass: its options are its fields, its docstring shows `before:` and `after:`. It
changes the graph only by proposing: `log.replace(old, new, …)` makes the new value stand for the old one and
remembers how to take that back, so that whoever runs the pass can check the two against each other before the
old one is gone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from torch.fx import Node

from dsmoe_compiler.ir.errors import Refusal
from dsmoe_compiler.ir.explanation import Explanation
from dsmoe_compiler.ir.graph import ProgramGraph
from dsmoe_compiler.ir.spec import MoESpec


@dataclass(frozen=True)
class Replacement:
    """`new` stands where `old` stood in `layer`; both compute from `inputs`, the values their checking starts
    at.

    `refused` is the code the layer's refusal carries when the two turn out to differ; they are equal where
    the inputs in `nonnegative` hold no number below 0. Ids among the inputs are below `choices`; 0: as many
    as the fused op has experts.
    """

    layer: str
    old: Node
    new: Node
    inputs: tuple[Node, ...]
    refused: str
    nonnegative: tuple[Node, ...] = ()
    choices: int = 0


@dataclass(frozen=True)
class LayerFacts:
    """What is known of one layer after some pass; passes replace the whole record.

    `node` is the value the layer was recognised (or lost) at, `op` the op that stands for it now, `order` its
    place, `explanation` how far its values were understood.
    """

    name: str
    idiom: str
    spec: MoESpec | None
    refusal: Refusal | None
    source: str
    node: str = ""
    op: str = ""
    order: int = 0
    remarks: tuple[str, ...] = ()
    explanation: Explanation | None = None

    @property
    def fused(self) -> bool:
        return self.spec is not None


@dataclass(frozen=True)
class Remark:
    """One sentence for the report about a layer; with a refusal, it names what was left as it was, and the
    refusal says why.
    """

    layer: str
    text: str
    refusal: Refusal | None = None

    def __str__(self) -> str:
        told = f"{self.layer}: {self.text}"
        if self.refusal is None:
            return told
        return f"{told} ({self.refusal.code}: {self.refusal.because}; {self.refusal.source})"


@dataclass
class PassLog:
    """What a pass says while it runs: replacements, layers, remarks."""

    layers: dict[str, LayerFacts] = field(default_factory=dict)
    replacements: list[Replacement] = field(default_factory=list)
    remarks: list[Remark] = field(default_factory=list)

    def replace(self, change: Replacement) -> None:
        """Let `change.new` stand for `change.old` wherever that is read."""
        change.old.replace_all_uses_with(change.new, delete_user_cb=lambda user: user is not change.new)
        self.replacements.append(change)

    def layer(self, facts: LayerFacts) -> None:
        """Record or update a layer."""
        self.layers[facts.name] = facts

    def remark(self, layer: str, text: str, refusal: Refusal | None = None) -> None:
        """Something the user may want to know of a layer that was not refused as a whole."""
        self.remarks.append(Remark(layer, text, refusal))


class Pass(Protocol):
    """Anything that turns a graph into a graph."""

    name: ClassVar[str]

    def run(self, graph: ProgramGraph, log: PassLog) -> bool:
        """Change the graph; returns whether it did."""
        ...
