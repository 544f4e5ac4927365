"""What became of tensors, as a table: those that changed alike together, their names folded."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator

from dsmoe_compiler.cli.diff_cells import fitted, printable
from dsmoe_compiler.cli.memory import readable
from dsmoe_compiler.graph_diff.change import Change
from dsmoe_compiler.graph_diff.compare import GraphDiff
from dsmoe_compiler.graph_diff.facts import Tensor
from dsmoe_compiler.graph_diff.families import families, pattern
from dsmoe_compiler.report.grid import Column, Grid, Row
from dsmoe_compiler.report.story import INDENT


def tensors_grid(diff: GraphDiff, width: int) -> Grid:
    """A row for the tensors of one type that changed alike, below it their names."""
    tensors = diff.tensors
    told = (
        *(("removed", _type(t), t.bytes, t.name) for t in tensors.removed),
        *(("added", _type(t), t.bytes, t.name) for t in tensors.added),
        *(("changed", _types(c), _bytes(c), c.name) for c in tensors.changed),
        *(("transposed", _types(c), _bytes(c), c.name) for c in tensors.turned),
        *(("other numbers", _type(t), t.bytes, t.name) for t in tensors.rewritten),
    )
    groups = dict[tuple[str, str, int], list[str]]()
    for word, kind, size, name in told:
        groups.setdefault((word, kind, size), []).append(name)
    rows = [
        _tensor_row(word, kind, size * len(names), len(names), [f.text for f in families(names)], width)
        for (word, kind, size), names in groups.items()
    ]
    rows += _renamed(tensors.renamed, width)
    titles = ("tensors", "count", "type", "bytes")
    columns = [Column(title, number=title in ("count", "bytes")) for title in titles]
    return fitted(columns, rows, titles.index("type"), width)


def _tensor_row(word: str, kind: str, size: int, count: int, names: Iterable[str], width: int) -> Row:
    below = (line for name in names for line in _wrapped_name(printable(name), width))
    return Row((word, str(count), kind, readable(size)), tuple(below))


def _wrapped_name(name: str, width: int) -> list[str]:
    return textwrap.wrap(
        name, width, initial_indent=INDENT, subsequent_indent=2 * INDENT, break_on_hyphens=False
    ) or [f"{INDENT}(no name)"]


def _renamed(pairs: Iterable[tuple[Tensor, Tensor]], width: int) -> Iterator[Row]:
    """Pairs whose names differ in numbers alone by the first of them."""
    groups = dict[tuple[str, ...], list[tuple[Tensor, Tensor]]]()
    for before, after in pairs:
        groups.setdefault((_type(before), pattern(before.name), pattern(after.name)), []).append(
            (before, after)
        )
    for (kind, _, _), alike in groups.items():
        before, after = alike[0]
        others = f", and {len(alike) - 1} more" if len(alike) > 1 else ""
        names = [f"{before.name} → {after.name}{others}"]
        yield _tensor_row("renamed", kind, sum(t.bytes for t, _ in alike), len(alike), names, width)


def _type(tensor: Tensor) -> str:
    return str(tensor.type)


def _types(change: Change[Tensor]) -> str:
    assert change.before is not None and change.after is not None
    return f"{change.before.type} → {change.after.type}"


def _bytes(change: Change[Tensor]) -> int:
    assert change.after is not None
    return change.after.bytes
