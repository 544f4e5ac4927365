"""What differs between two graphs, as plain data.

Where one is ATen and the other ONNX, their operators have no names in common: then only tensors, layers,
inputs, outputs and sizes are compared, and the answer says what is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from dsmoe_compiler.graph_diff.change import Change, by_name, changes
from dsmoe_compiler.graph_diff.facts import GraphFacts, Layer, TensorType, Value
from dsmoe_compiler.graph_diff.tensor_changes import Tensors, tensor_changes


@dataclass(frozen=True)
class Rewired:
    """The first line that differs between two graphs that apply the same operators as often."""

    line: int
    before: str
    after: str


@dataclass(frozen=True)
class GraphDiff:
    """The comparison of `a` with `b`. A part is None where it could not be compared; `left_out` says why."""

    a: GraphFacts
    b: GraphFacts
    operators: tuple[Change[int], ...] | None
    rewired: Rewired | None
    layers: tuple[Change[Layer], ...] | None
    tensors: Tensors
    inputs: tuple[Change[Value], ...]
    outputs: tuple[Change[Value], ...]
    properties: tuple[Change[str], ...]
    left_out: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Whether nothing differs of what was compared."""
        tensors = self.tensors
        parts = (self.operators, self.layers, self.inputs, self.outputs, self.properties)
        return not any((*parts, *tensors.differences.values(), self.rewired))


def compare(a: GraphFacts, b: GraphFacts, most_bytes: int | None) -> GraphDiff:
    """Compare two graphs. Of tensors' numbers at most `most_bytes` a side are read, the smallest first; None:
    all there are.
    """
    mixed = a.vocabulary != b.vocabulary
    operators = None if mixed else changes(a.operators, b.operators)
    return GraphDiff(
        a,
        b,
        operators,
        None if operators or mixed else _rewired(a.wiring, b.wiring),
        _layers(a, b),
        tensor_changes(a.tensors, b.tensors, most_bytes),
        _values(a.inputs, b.inputs, mixed),
        _values(_outputs(a, mixed), _outputs(b, mixed), mixed),
        () if mixed else changes(a.properties, b.properties),
        tuple(_left_out(a, b, mixed)),
    )


def _rewired(a: Sequence[str], b: Sequence[str]) -> Rewired | None:
    for i in range(max(len(a), len(b))):
        before, after = (lines[i] if i < len(lines) else "" for lines in (a, b))
        if before != after:
            return Rewired(i + 1, before.strip(), after.strip())
    return None


def _layers(a: GraphFacts, b: GraphFacts) -> tuple[Change[Layer], ...] | None:
    if a.layers is None or b.layers is None:
        return None
    return changes(by_name(a.layers), by_name(b.layers))


def _left_out(a: GraphFacts, b: GraphFacts, mixed: bool) -> Iterator[str]:
    if mixed:
        spoken = f"those of A are {a.vocabulary}'s, those of B {b.vocabulary}'s"
        yield f"operators, their wiring and properties are not compared: {spoken}"
        yield "sizes that vary count as equal whatever they are called, and outputs go by their places"
    silent = [side for side, facts in (("A", a), ("B", b)) if facts.layers is None]
    if silent:
        says = f"{silent[0]} does not say" if len(silent) == 1 else "neither says"
        yield f"MoE layers are not compared: {says} which it has"


def _values(a: Sequence[Value], b: Sequence[Value], mixed: bool) -> tuple[Change[Value], ...]:
    """Changes of inputs or outputs; of those that are the same, a change of order."""
    before, after = by_name(a), by_name(b)
    if mixed:  # say of each what the other says of it, where that comes to the same
        after = {name: _as_said(before.get(name), value) for name, value in after.items()}
    changed = changes(before, after)
    if changed or list(before) == list(after):
        return changed
    return tuple(
        Change(f"at place {i}", x, y) for i, (x, y) in enumerate(zip(a, b, strict=True)) if x.name != y.name
    )


def _as_said(said: Value | None, value: Value) -> Value:
    return said if said is not None and _alike(said.type, value.type) else value


def _alike(a: TensorType, b: TensorType) -> bool:
    """Whether two types may be one, where sizes that vary go by other names and some are not said."""
    if None not in (a.dtype, b.dtype) and a.dtype != b.dtype:
        return False
    if a.shape is None or b.shape is None:
        return True
    pairs = zip(a.shape, b.shape, strict=False)
    return len(a.shape) == len(b.shape) and all(
        x == y or (isinstance(x, str) and isinstance(y, str)) for x, y in pairs
    )


def _outputs(facts: GraphFacts, by_place: bool) -> list[Value]:
    if not by_place:
        return list(facts.outputs)
    return [replace(value, name=f"output {i}") for i, value in enumerate(facts.outputs)]
