"""What differs between two graphs, as plain data.

Where one is ATen and the other ONNX, their operators have no names in common: then only tensors, layers,
inputs, outputs and sizes are compared, and the answer says what is not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, TypeVar

from dsmoe_compiler.graph_diff.content import Content, digest, same_content
from dsmoe_compiler.graph_diff.facts import GraphFacts, Layer, Tensor, TensorType, Value
from dsmoe_compiler.graph_diff.layers import natural

USUAL_BYTES = 1 << 30  # of tensors' numbers, read of each side: a second or two
TOO_MANY = "they are too many"


class _Named(Protocol):
    @property
    def name(self) -> str: ...


T = TypeVar("T")
Item = TypeVar("Item", bound=_Named)


@dataclass(frozen=True)
class Change(Generic[T]):
    """What goes by one name: `before` is None where it came, `after` where it went; they differ."""

    name: str
    before: T | None
    after: T | None


@dataclass(frozen=True)
class Rewired:
    """The first line that differs between two graphs that apply the same operators as often."""

    line: int
    before: str
    after: str


@dataclass(frozen=True)
class Unread:
    """Tensors of one name and type whose numbers were not compared: how many, their bytes, and why."""

    count: int
    bytes: int
    why: str


@dataclass(frozen=True)
class Tensors:
    """`changed` are those of other types, `rewritten` those of the same type with other numbers.

    `renamed` are pairs of a removed and an added tensor that alone have the same type and numbers.
    """

    added: tuple[Tensor, ...]
    removed: tuple[Tensor, ...]
    renamed: tuple[tuple[Tensor, Tensor], ...]
    changed: tuple[Change[Tensor], ...]
    rewritten: tuple[Tensor, ...]
    same: int
    unread: tuple[Unread, ...]


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
        changed = (tensors.added, tensors.removed, tensors.renamed, tensors.changed, tensors.rewritten)
        return not any((*parts, *changed, self.rewired))


def compare(a: GraphFacts, b: GraphFacts, most_bytes: int | None) -> GraphDiff:
    """Compare two graphs. Of tensors' numbers at most `most_bytes` a side are read, the smallest first; None:
    all there are.
    """
    mixed = a.vocabulary != b.vocabulary
    operators = None if mixed else _changes(a.operators, b.operators)
    return GraphDiff(
        a,
        b,
        operators,
        None if operators or mixed else _rewired(a.wiring, b.wiring),
        _layers(a, b),
        _tensors(a.tensors, b.tensors, most_bytes),
        _values(a.inputs, b.inputs, mixed),
        _values(_outputs(a, mixed), _outputs(b, mixed), mixed),
        () if mixed else _changes(a.properties, b.properties),
        tuple(_left_out(a, b, mixed)),
    )


def _changes(a: Mapping[str, T], b: Mapping[str, T]) -> tuple[Change[T], ...]:
    names = sorted({*a, *b}, key=natural)
    return tuple(Change(name, a.get(name), b.get(name)) for name in names if a.get(name) != b.get(name))


def _rewired(a: Sequence[str], b: Sequence[str]) -> Rewired | None:
    for i in range(max(len(a), len(b))):
        before, after = (lines[i] if i < len(lines) else "" for lines in (a, b))
        if before != after:
            return Rewired(i + 1, before.strip(), after.strip())
    return None


def _layers(a: GraphFacts, b: GraphFacts) -> tuple[Change[Layer], ...] | None:
    if a.layers is None or b.layers is None:
        return None
    return _changes(_by_name(a.layers), _by_name(b.layers))


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
    before, after = _by_name(a), _by_name(b)
    if mixed:  # say of each what the other says of it, where that comes to the same
        after = {name: _as_said(before.get(name), value) for name, value in after.items()}
    changed = _changes(before, after)
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


def _by_name(items: Iterable[Item]) -> dict[str, Item]:
    """Each by its name; the second of a name by "name (2)", as nothing valid has."""
    named = dict[str, Item]()
    for item in items:
        name, count = item.name, 1
        while name in named:
            count += 1
            name = f"{item.name} ({count})"
        named[name] = item
    return named


def _tensors(a: Iterable[Tensor], b: Iterable[Tensor], most_bytes: int | None) -> Tensors:
    before, after = _by_name(a), _by_name(b)
    both = sorted((name for name in before if name in after), key=natural)
    alike = [name for name in both if before[name] == after[name]]
    reading = _Reading(most_bytes)
    rewritten = reading.rewritten((before[name], after[name]) for name in alike)
    removed = [t for name, t in before.items() if name not in after]
    added = [t for name, t in after.items() if name not in before]
    renamed = reading.renamed(removed, added)
    known = {id(t) for pair in renamed for t in pair}
    return Tensors(
        _ordered(t for t in added if id(t) not in known),
        _ordered(t for t in removed if id(t) not in known),
        tuple(sorted(renamed, key=lambda pair: natural(pair[0].name))),
        tuple(Change(name, before[name], after[name]) for name in both if before[name] != after[name]),
        _ordered(rewritten),
        len(alike) - len(rewritten),
        tuple(reading.unread.values()),
    )


def _ordered(tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    return tuple(sorted(tensors, key=lambda t: natural(t.name)))


@dataclass
class _Reading:
    """Reads tensors' numbers while `left` bytes a side are not used up; None: no matter how many."""

    left: int | None
    unread: dict[str, Unread] = field(default_factory=dict)

    def rewritten(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Of pairs of one type, those with other numbers; what is not read is noted."""
        found = list[Tensor]()
        for x, y in sorted(pairs, key=lambda pair: (pair[0].bytes, natural(pair[0].name))):
            if x.content is not None and x.content == y.content:
                continue
            if not _available(x.content) or not _available(y.content):
                sides = [side for side, t in (("A", x), ("B", y)) if not _available(t.content)]
                self._leave(x, f"{sides[0]} has none" if len(sides) == 1 else "neither has any")
            elif not self._take(x.bytes):
                self._leave(x, TOO_MANY)
            elif not same_content(_there(x), _there(y)):
                found.append(y)
        return found

    def renamed(self, removed: Sequence[Tensor], added: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Pairs that are alike, and like no third."""
        types = [{(t.type, t.bytes) for t in side if _available(t.content)} for side in (removed, added)]
        pairs = list[tuple[Tensor, Tensor]]()
        for kind in sorted(types[0] & types[1], key=lambda kind: (kind[1], str(kind[0]))):
            before, after = (
                [t for t in side if (t.type, t.bytes) == kind and _available(t.content)]
                for side in (removed, added)
            )
            if self._take(kind[1] * max(len(before), len(after))):
                olds, news = _by_digest(before), _by_digest(after)
                pairs += [
                    (olds[key][0], news[key][0])
                    for key in olds
                    if len(olds[key]) == 1 and len(news.get(key, ())) == 1
                ]
        return pairs

    def _take(self, size: int) -> bool:
        """Whether as many bytes may be read; they are then used up."""
        if self.left is None:
            return True
        enough = size <= self.left
        self.left -= size if enough else 0
        return enough

    def _leave(self, tensor: Tensor, why: str) -> None:
        known = self.unread.get(why, Unread(0, 0, why))
        self.unread[why] = replace(known, count=known.count + 1, bytes=known.bytes + tensor.bytes)


def _by_digest(tensors: Iterable[Tensor]) -> dict[str, list[Tensor]]:
    found = dict[str, list[Tensor]]()
    for t in tensors:
        found.setdefault(digest(_there(t)), []).append(t)
    return found


def _available(content: Content | None) -> bool:
    return content is not None and content.available


def _there(tensor: Tensor) -> Content:
    assert tensor.content is not None
    return tensor.content
