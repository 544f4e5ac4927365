"""Long lists of parameters in one short piece: `experts.{0..63}.w1.weight`, order kept."""

from __future__ import annotations

import re
from collections.abc import Sequence

_LEAST = 3  # fewer are as short written out
_NUMBER = re.compile(r"(\d+)")


def fold_names(names: Sequence[str]) -> list[str]:
    """The names in their order, runs of names that differ in one ascending number folded into one text."""
    folded, at = list[str](), 0
    while at < len(names):
        run = _run(names, at)
        folded += [_folded(names[at : at + run])] if run >= _LEAST else names[at : at + 1]
        at += run if run >= _LEAST else 1
    return folded


def _run(names: Sequence[str], at: int) -> int:
    """How many names from `at` on differ from the first in one and the same number, ascending."""
    first, place, last, length = _NUMBER.split(names[at]), None, -1, 1
    for name in names[at + 1 :]:
        parts = _NUMBER.split(name)
        places = [i for i, (a, b) in enumerate(zip(first, parts, strict=False)) if a != b]
        if len(parts) != len(first) or len(places) != 1 or place not in (None, places[0]):
            break
        place = places[0]
        if not (_is_plain(first[place]) and _is_plain(parts[place])):
            break
        if int(parts[place]) <= max(last, int(first[place])):
            break
        last, length = int(parts[place]), length + 1
    return length


def _is_plain(part: str) -> bool:
    """Whether a part is a number that is spelled as one spells it."""
    return part.isdecimal() and str(int(part)) == part


def _folded(names: Sequence[str]) -> str:
    split = [_NUMBER.split(name) for name in names]
    place = next(i for i, parts in enumerate(zip(*split, strict=True)) if len(set(parts)) > 1)
    runs = list[list[int]]()
    for number in (int(parts[place]) for parts in split):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    spelled = ",".join(str(a) if a == b else f"{a}..{b}" for a, b in runs)
    return "".join([*split[0][:place], f"{{{spelled}}}", *split[0][place + 1 :]])
