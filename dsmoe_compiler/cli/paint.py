"""Reports and tables on a terminal, in colour; on anything else the plain text of the same."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.text import Text

from dsmoe_compiler.report.explained import Alike, Kind, page
from dsmoe_compiler.report.grid import GAP, Grid, Row
from dsmoe_compiler.report.report import Report
from dsmoe_compiler.report.story import tell
from dsmoe_compiler.report.text import WIDTH

WIDEST = 120  # a map wider than this is harder to read, not easier


def console(stderr: bool = False) -> Console:
    """Where a command's answer goes, or with `stderr` what it says beside it. Lines are never wrapped or cut
    when that is no terminal.
    """
    return _Console(stderr=stderr, highlight=False, emoji=False, markup=False, soft_wrap=True)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave a reader that went away to the command, which has an exit status for it."""
        raise BrokenPipeError


def print_report(to: Console, report: Report) -> None:
    """The MoE map, the passes and the remarks."""
    if not to.is_terminal:
        to.print(str(report))
        return
    story = tell(report, min(to.width, WIDEST))
    good = report.fused == len(report.layers)
    print_lines(to, story.headline, style="bold green" if good else "bold yellow")
    for grid, lines in ((story.layers, story.legend), (story.passes, ()), (None, story.remarks)):
        if grid or lines:
            to.print()
        if grid:
            print_grid(to, grid)
        print_lines(to, lines, style="dim")


# Colours of an explanation's lines, by what they are.
_STYLES: dict[Kind, str] = {
    "title": "bold cyan",
    "refused": "bold yellow",
    "fused": "bold green",
    "heading": "bold",
    "code": "green",
    "aside": "dim",
}


def print_explanation(to: Console, report: Report, alike: Sequence[Alike]) -> None:
    """Why these layers of a report were refused, or how they were understood."""
    for line in page(report, alike, reading_width(to)):
        to.print(Text(line.text, style=_STYLES.get(line.kind, "") if to.is_terminal else ""))


def reading_width(to: Console) -> int:
    """How wide sentences are: the terminal's width up to what is good to read, elsewhere a fixed one."""
    return min(to.width, WIDEST) if to.is_terminal else WIDTH


def print_code(to: Console, text: str, language: str) -> None:
    """A program's text in the colours of its language, its lines whole."""
    from rich.syntax import Syntax

    to.print(Syntax("", language, theme="ansi_dark", background_color="default").highlight(text), end="")


def print_grid(to: Console, grid: Grid) -> None:
    """A table: titles in bold, first column in cyan, rows that want the eye in yellow."""
    to.print(Text(GAP.join(grid.titles).rstrip(), style="bold underline" if to.is_terminal else ""))
    for row in grid.rows:
        to.print(_painted(grid, row))
        print_lines(to, row.below, style="yellow")


def print_lines(to: Console, lines: Iterable[str], style: str = "") -> None:
    """Each line on its own, in one style."""
    for line in lines:
        to.print(Text(line, style=style))


def _painted(grid: Grid, row: Row) -> Text:
    first, *others = grid.padded(row)
    painted = Text(first, style="yellow" if row.alert else "cyan")
    for cell in others:
        painted.append(GAP + cell)
    painted.rstrip()
    return painted
