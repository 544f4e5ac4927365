"""Many module paths as one: `model.layers.1.mlp`, …, `model.layers.27.mlp` are `model.layers.{1-27}.mlp`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


def collapse(names: Iterable[str]) -> str:
    """The names as one text: paths that differ in one and the same number become one path."""
    families: list[_Family] = []
    for name in dict.fromkeys(names):
        parts = name.split(".")
        if not any(family.admit(parts) for family in families):
            families.append(_Family(parts))
    return ", ".join(str(family) for family in families)


@dataclass
class _Family:
    """Paths that equal `first` but for the number at `place`; None while there is only the first."""

    first: list[str]
    place: int | None = None
    numbers: list[int] = field(default_factory=list)

    def admit(self, parts: list[str]) -> bool:
        """Take a path in, if it belongs here."""
        if len(parts) != len(self.first):
            return False
        places = [i for i, (mine, other) in enumerate(zip(self.first, parts, strict=True)) if mine != other]
        if len(places) != 1 or self.place not in (None, places[0]):
            return False
        mine, other = self.first[places[0]], parts[places[0]]
        if not (mine.isdecimal() and other.isdecimal()):
            return False
        self.place = places[0]
        self.numbers = sorted({int(mine), int(other), *self.numbers})
        return True

    def __str__(self) -> str:
        if self.place is None:
            return ".".join(self.first)
        numbers = "{" + ranges(self.numbers) + "}"
        return ".".join([*self.first[: self.place], numbers, *self.first[self.place + 1 :]])


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers with their runs joined: 1, 2, 3, 7 are 1-3,7."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
