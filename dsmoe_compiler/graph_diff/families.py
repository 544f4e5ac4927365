"""Many names that differ in their numbers as one: `layers.{1-27}.mlp.experts.{0-63}.w1`, 1728 of them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from dsmoe_compiler.graph_diff.layers import natural
from dsmoe_compiler.report.layer_names import ranges

_NUMBER = re.compile(r"(?<![^\W_])(0|[1-9][0-9]*)(?![^\W_])")  # not the 1 of w1


@dataclass(frozen=True)
class Family:
    """Names as one text that says each of them, and how many there are."""

    text: str
    count: int


def families(names: Iterable[str]) -> list[Family]:
    """The names folded, in order; those that stand for every combination of some numbers become one."""
    shapes = dict[tuple[str, ...], set[tuple[int, ...]]]()
    for name in names:
        parts = _NUMBER.split(name)
        shapes.setdefault(tuple(parts[::2]), set()).add(tuple(map(int, parts[1::2])))
    folded = [_written(shape, box) for shape, found in shapes.items() for box in _boxes(found)]
    return sorted(folded, key=lambda family: natural(family.text))


def pattern(name: str) -> str:
    """The name without its numbers: equal for names of one family."""
    return _NUMBER.sub("#", name)


def _boxes(found: set[tuple[int, ...]]) -> list[tuple[frozenset[int], ...]]:
    """Tuples of numbers as products of sets: places are joined one after the other, the last one first."""
    boxes = {tuple(frozenset({number}) for number in numbers) for numbers in found}
    for place in reversed(range(len(next(iter(found))))):
        joined = dict[tuple[frozenset[int], ...], frozenset[int]]()
        for box in boxes:
            others = (*box[:place], *box[place + 1 :])
            joined[others] = joined.get(others, frozenset()) | box[place]
        boxes = {(*others[:place], numbers, *others[place:]) for others, numbers in joined.items()}
    return list(boxes)


def _written(shape: tuple[str, ...], box: tuple[frozenset[int], ...]) -> Family:
    text, count = shape[0], 1
    for numbers, after in zip(box, shape[1:], strict=True):
        told = ranges(sorted(numbers))
        text += (told if len(numbers) == 1 else f"{{{told}}}") + after
        count *= len(numbers)
    return Family(text, count)
