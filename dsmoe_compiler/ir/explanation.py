"""How far a layer was understood, as plain data: what the values on the way mean, and what would fuse."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SourceLine:
    """A line of code, the function it is in, and its text ("" where capture did not keep it).

    `file` is the file's name without its folder; an `installed` one is a library's, not the user's to change.
    """

    file: str
    line: int
    function: str = ""
    text: str = ""
    installed: bool = False

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Moment:
    """One value on the way.

    `what` says which: "ids chosen", "ids first used", "rows begin", "last understood", "beside it", "lost",
    "combined". `means` is the value in words ("" where it has no meaning), `operator` and `node` what made
    it, `lines` the user's code there: the innermost forward, then the functions it called.
    """

    what: str
    operator: str
    node: str
    means: str = ""
    lines: tuple[SourceLine, ...] = ()


@dataclass(frozen=True)
class Spelling:
    """A way to write a layer that is understood: its name, how it is written (a few lines of code, without
    what is obvious), and what it needs to fuse.
    """

    name: str
    written: str
    needs: str


@dataclass(frozen=True)
class Explanation:
    """`moments` in execution order. For a refused layer, `nearest` are the known spellings that begin as this
    one does (none where nothing was understood), and `remedy` is what it would take.
    """

    moments: tuple[Moment, ...]
    nearest: tuple[Spelling, ...] = ()
    remedy: str = ""
