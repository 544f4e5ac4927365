"""The user's lines behind a value of the graph, from what capture recorded of the stack."""

from __future__ import annotations

import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from torch.fx import Node

_FRAME = re.compile(r'\s*File "(?P<file>.+)", line (?P<line>\d+)(?:, in (?P<function>.+))?')
_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib")})


@dataclass(frozen=True)
class SourceLine:
    """A line of code, the function it is in, and its text ("" where capture did not keep it)."""

    path: str
    line: int
    function: str = ""
    text: str = ""

    @property
    def in_library(self) -> bool:
        """Whether the file was installed: it is not the user's to change."""
        return self.path.startswith(_LIBRARIES)

    def __str__(self) -> str:
        return f"{Path(self.path).name}:{self.line}"


def stack_of(node: Node) -> tuple[SourceLine, ...]:
    """The calls that made the value, outermost first; torch's own left out unless there are no others."""
    lines, found = (node.meta.get("stack_trace") or "").splitlines(), list[SourceLine]()
    for line, below in zip(lines, [*lines[1:], ""], strict=True):
        if (frame := _FRAME.fullmatch(line)) is not None:
            text = "" if _FRAME.fullmatch(below) else below.strip()
            function = frame["function"] or ""
            found.append(SourceLine(frame["file"], int(frame["line"]), function, text))
    return tuple(f for f in found if "/torch/" not in f.path and not f.path.startswith("torch/")) or tuple(
        found
    )


def own_line(node: Node, owner: str = "") -> SourceLine | None:
    """The innermost line that is the user's own; None where the graph has none.

    That is one outside installed libraries. A layer whose class an installed file `owner` defines is a
    library's: then the innermost line of that file.
    """
    stack = stack_of(node)
    of_user = [] if SourceLine(owner, 0).in_library else [f for f in stack if not f.in_library]
    chosen = of_user or [f for f in stack if f.path == owner] or list(stack)
    return chosen[-1] if chosen else None


def last_calls(node: Node) -> tuple[SourceLine, ...]:
    """The innermost forward behind a value and the functions that it called, outermost first."""
    stack = stack_of(node)
    forwards = [i for i, frame in enumerate(stack) if frame.function == "forward"]
    return stack[forwards[-1] if forwards else 0 :]
