"""What differs between the tensors of two graphs: by name, by type, and as far as it is cheap by number."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from dsmoe_compiler.graph_diff.change import Change, by_name
from dsmoe_compiler.graph_diff.content import Content, digest, same_content, same_turned
from dsmoe_compiler.graph_diff.facts import Tensor, TensorType
from dsmoe_compiler.graph_diff.layers import natural

USUAL_BYTES = 1 << 30  # of tensors' numbers, read of each side: a second or two
TOO_MANY = "they are too many"


@dataclass(frozen=True)
class Unread:
    """Tensors of one name and type whose numbers were not compared: how many, their bytes, and why."""

    count: int
    bytes: int
    why: str


@dataclass(frozen=True)
class Tensors:
    """`changed` are those of other types, `rewritten` those of the same type with other numbers; `turned` are
    matrices that are each other's transposes.

    `renamed` are pairs of a removed and an added tensor that alone have the same type and numbers.
    """

    added: tuple[Tensor, ...]
    removed: tuple[Tensor, ...]
    renamed: tuple[tuple[Tensor, Tensor], ...]
    changed: tuple[Change[Tensor], ...]
    turned: tuple[Change[Tensor], ...]
    rewritten: tuple[Tensor, ...]
    same: int
    unread: tuple[Unread, ...]

    @property
    def differences(self) -> dict[str, tuple[object, ...]]:
        """All there are, by what the parts are called."""
        kinds = ("added", "removed", "renamed", "changed", "turned", "rewritten")
        return {kind: getattr(self, kind) for kind in kinds}


def tensor_changes(a: Iterable[Tensor], b: Iterable[Tensor], most_bytes: int | None) -> Tensors:
    """What became of the tensors of `a`; see `compare.compare` for `most_bytes`."""
    before, after = by_name(a), by_name(b)
    both = sorted((name for name in before if name in after), key=natural)
    alike = [name for name in both if before[name] == after[name]]
    reading = _Reading(most_bytes)
    rewritten = reading.rewritten((name, before[name], after[name]) for name in alike)
    others = [name for name in both if before[name] != after[name]]
    turned = reading.turned((name, before[name], after[name]) for name in (*others, *rewritten))
    removed = [t for name, t in before.items() if name not in after]
    added = [t for name, t in after.items() if name not in before]
    renamed = reading.renamed(removed, added)
    known = {id(t) for pair in renamed for t in pair}
    return Tensors(
        _ordered(t for t in added if id(t) not in known),
        _ordered(t for t in removed if id(t) not in known),
        tuple(sorted(renamed, key=lambda pair: natural(pair[0].name))),
        tuple(Change(name, before[name], after[name]) for name in others if name not in turned),
        tuple(Change(name, before[name], after[name]) for name in both if name in turned),
        _ordered(after[name] for name in rewritten if name not in turned),
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

    def rewritten(self, pairs: Iterable[tuple[str, Tensor, Tensor]]) -> list[str]:
        """Of pairs of one type, the names of those with other numbers; what is not read is noted."""
        found = list[str]()
        for name, x, y in sorted(pairs, key=lambda pair: (pair[1].bytes, natural(pair[0]))):
            if x.content is not None and x.content == y.content:
                continue
            if not _available(x.content) or not _available(y.content):
                sides = [side for side, t in (("A", x), ("B", y)) if not _available(t.content)]
                self._leave(x, f"{sides[0]} has none" if len(sides) == 1 else "neither has any")
            elif not self._take(x.bytes):
                self._leave(x, TOO_MANY)
            elif not same_content(_there(x), _there(y)):
                found.append(name)
        return found

    def turned(self, pairs: Iterable[tuple[str, Tensor, Tensor]]) -> set[str]:
        """The names of pairs of matrices that are each other's transposes, of those that can be read."""
        found = set[str]()
        for name, x, y in pairs:
            shape = x.type.shape
            if shape is None or y.type != TensorType(x.type.dtype, shape[::-1]) or len(shape) != 2:
                continue
            rows, columns = map(int, shape)
            read = _available(x.content) and _available(y.content) and self._take(x.bytes)
            if read and same_turned(_there(x), _there(y), rows, columns):
                found.add(name)
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
