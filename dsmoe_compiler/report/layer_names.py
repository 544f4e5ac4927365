"""Many module paths as one: `model.layers.1.mlp`, …, `model.layers.27.mlp` are `model.layers.{1-27}.mlp`."""

from __future__ import annotations

from collections.abc import Sequence


def collapse(names: Sequence[str]) -> str:
    """The names as one text: paths that differ in a single number share a pattern, others are listed."""
    patterns: dict[tuple[str, str], list[int]] = {}
    for name in names:
        head, number, tail = _around_first_number(name)
        patterns.setdefault((head, tail), []).extend([number] if number is not None else [])
    return ", ".join(head + _ranges(numbers) + tail for (head, tail), numbers in patterns.items())


def _around_first_number(name: str) -> tuple[str, int | None, str]:
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdecimal():
            head, tail = ".".join([*parts[:i], ""]), ".".join(["", *parts[i + 1 :]])
            return head, int(part), tail
    return name, None, ""


def _ranges(numbers: list[int]) -> str:
    """Ascending runs joined: [1, 2, 3, 7] is {1-3,7}, [4] is 4, [] is nothing."""
    runs: list[tuple[int, int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    text = ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return text if len(set(numbers)) < 2 else "{" + text + "}"
