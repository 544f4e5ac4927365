"""What to say of a name nobody knows: the names that look like it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_ALIKE = 0.45  # `lift` is to find `lift_experts`


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """One line: "unknown pass 'fuse_ruoter'; the nearest names are: fuse_router"; all if none is near."""
    names = list(dict.fromkeys(known))
    near = difflib.get_close_matches(name, names, n=3, cutoff=_ALIKE)
    if near:
        return f"unknown {kind} {name!r}; the nearest names are: {', '.join(near)}"
    return f"unknown {kind} {name!r}; " + (f"the names are: {', '.join(names)}" if names else "there is none")
