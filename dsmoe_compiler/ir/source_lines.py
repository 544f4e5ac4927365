"""The user's lines behind a value of the graph, from what capture recorded of the stack."""

from __future__ import annotations

import re
import sysconfig
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from torch.fx import Node

from dsmoe_compiler.ir.explanation import SourceLine

_FRAME = re.compile(r'\s*File "(?P<file>.+)", line (?P<line>\d+)(?:, in (?P<function>.+))?')
_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib")})


@dataclass(frozen=True)
class Frame:
    """A line as capture recorded it: with the whole path of its file."""

    path: str
    line: int
    function: str
    text: str

    @property
    def installed(self) -> bool:
        """Whether the file lies where libraries are installed."""
        return _is_installed(self.path)

    @property
    def shown(self) -> SourceLine:
        """What a reader sees of it."""
        return SourceLine(Path(self.path).name, self.line, self.function, self.text, self.installed)


def _is_installed(path: str) -> bool:
    return path.startswith(_LIBRARIES)


def stack_of(node: Node) -> tuple[Frame, ...]:
    """The calls that made the value, outermost first; torch's own left out unless there are no others."""
    lines, found = [*(node.meta.get("stack_trace") or "").splitlines(), ""], list[Frame]()
    for line, below in pairwise(lines):
        if (frame := _FRAME.fullmatch(line)) is not None:
            text = "" if _FRAME.fullmatch(below) else below.strip()
            found.append(Frame(frame["file"], int(frame["line"]), frame["function"] or "", text))
    return tuple(f for f in found if "/torch/" not in f.path and not f.path.startswith("torch/")) or tuple(
        found
    )


def own_line(node: Node, owner: str = "") -> SourceLine | None:
    """The innermost line that is the user's own; None where the graph has none.

    That is one outside installed libraries. A layer whose class an installed file `owner` defines is a
    library's: then the innermost line of that file.
    """
    stack = stack_of(node)
    of_user = [] if _is_installed(owner) else [f for f in stack if not f.installed]
    chosen = of_user or [f for f in stack if f.path == owner] or list(stack)
    return chosen[-1].shown if chosen else None


def last_calls(node: Node) -> tuple[SourceLine, ...]:
    """The innermost forward behind a value and the functions that it called, outermost first."""
    stack = stack_of(node)
    forwards = [i for i, frame in enumerate(stack) if frame.function == "forward"]
    return tuple(frame.shown for frame in stack[forwards[-1] if forwards else 0 :])
