"""What goes by one name in two graphs, before and after."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from dsmoe_compiler.graph_diff.layers import natural


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


def changes(a: Mapping[str, T], b: Mapping[str, T]) -> tuple[Change[T], ...]:
    names = sorted({*a, *b}, key=natural)
    return tuple(Change(name, a.get(name), b.get(name)) for name in names if a.get(name) != b.get(name))


def by_name(items: Iterable[Item]) -> dict[str, Item]:
    """Each by its name; the second of a name by "name (2)", as nothing valid has."""
    named = dict[str, Item]()
    for item in items:
        name, count = item.name, 1
        while name in named:
            count += 1
            name = f"{item.name} ({count})"
        named[name] = item
    return named
