"""A comparison of two graphs on a page."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby

from rich.console import Console

from dsmoe_compiler.cli.memory import readable
from dsmoe_compiler.cli.paint import console, print_grid, print_lines, reading_width
from dsmoe_compiler.graph_diff.compare import TOO_MANY, Change, GraphDiff, Tensors
from dsmoe_compiler.graph_diff.facts import GraphFacts, Layer, Tensor, Value
from dsmoe_compiler.graph_diff.families import families, pattern
from dsmoe_compiler.report.grid import GAP, Column, Grid, Row
from dsmoe_compiler.report.layer_names import collapse
from dsmoe_compiler.report.story import INDENT, WHOLE_MODEL

_LEAST = 16  # characters of a name: fewer say nothing


def print_diff(diff: GraphDiff) -> None:
    """Sides, verdict, and a table for each part that differs."""
    to = console()
    width = reading_width(to)
    print_lines(to, _sides(diff), style="bold")
    print_lines(to, textwrap.wrap(_verdict(diff), width), style="bold green" if diff.same else "bold yellow")
    parts = (_sizes(diff), _operators(diff, width), _layers(diff, width), _tensors(diff.tensors, width))
    for grid in (*parts, _values(diff, width), _properties(diff, width)):
        if grid.rows:
            to.print()
            print_grid(to, grid)
    remarks = list(_remarks(diff, width))
    if remarks:
        to.print()
    _print_wrapped(to, remarks, width)


def _print_wrapped(to: Console, sentences: Iterable[str], width: int) -> None:
    for sentence in sentences:
        print_lines(to, textwrap.wrap(sentence, width, subsequent_indent=INDENT), style="dim")


def _sides(diff: GraphDiff) -> Iterator[str]:
    for letter, facts in (("A", diff.a), ("B", diff.b)):
        yield f"{letter}: {printable(facts.source)} ({facts.form})"


def _verdict(diff: GraphDiff) -> str:
    if not diff.same:
        return f"they differ in {_listed(_differing(diff))}"
    compared = ["operators", "wiring", "properties"] if diff.operators is not None else []
    compared += ["MoE layers"] if diff.layers is not None else []
    tensors = "tensors' names and types" if diff.tensors.unread else "tensors"
    return f"they are the same in {_listed([*compared, tensors, 'inputs', 'outputs'])}"


def _differing(diff: GraphDiff) -> list[str]:
    tensors = diff.tensors
    parts: dict[str, object] = {
        "operators": diff.operators,
        "wiring": diff.rewired,
        "MoE layers": diff.layers,
        "tensors": tensors.added
        or tensors.removed
        or tensors.renamed
        or tensors.changed
        or tensors.rewritten,
        "inputs": diff.inputs,
        "outputs": diff.outputs,
        "properties": diff.properties,
    }
    return [name for name, changes in parts.items() if changes]


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _sizes(diff: GraphDiff) -> Grid:
    a, b = diff.a, diff.b
    rows: list[tuple[str, int | None, int | None, Callable[[int], str]]] = [
        ("nodes", a.size.nodes, b.size.nodes, str),
        (INDENT[2:] + "in subgraphs", a.size.in_subgraphs, b.size.in_subgraphs, str),
        (INDENT[2:] + "in functions", a.size.in_functions, b.size.in_functions, str),
        ("kinds of operators", len(a.operators), len(b.operators), str),
        ("graph", a.size.graph_bytes, b.size.graph_bytes, readable),
        ("MoE layers", *(None if x.layers is None else len(x.layers) for x in (a, b)), str),
        ("MoE layers fused", _fused(a), _fused(b), str),
        ("tensors", len(a.tensors), len(b.tensors), str),
        ("data", a.size.data_bytes, b.size.data_bytes, readable),
    ]
    shown = (row for row in rows if row[1] or row[2])
    return Grid(_counted("size"), tuple(Row((name, *_counts(x, y, say))) for name, x, y, say in shown))


def _fused(facts: GraphFacts) -> int | None:
    return None if facts.layers is None else sum(layer.fused for layer in facts.layers)


def _counted(title: str) -> tuple[Column, ...]:
    return (Column(title), *(Column(each, number=True) for each in ("A", "B", "change")))


def _counts(a: int | None, b: int | None, say: Callable[[int], str]) -> tuple[str, str, str]:
    """Two amounts and their difference."""
    change = "" if a is None or b is None or a == b else f"{'+' if b > a else '-'}{say(abs(b - a))}"
    return "?" if a is None else say(a), "?" if b is None else say(b), change


def _operators(diff: GraphDiff, width: int) -> Grid:
    """Those that are applied more or less often, the largest change first."""
    changes = sorted(diff.operators or (), key=lambda c: -abs((c.after or 0) - (c.before or 0)))
    rows = [(c.name, *_counts(c.before or 0, c.after or 0, str)) for c in changes]
    return _fitted(_counted("operator"), rows, 0, width)


def _layers(diff: GraphDiff, width: int) -> Grid:
    """A row for the layers that changed alike, below it what they were and what they are."""
    rows = list[Row]()
    told = [(printable(c.name), *_what_changed(c)) for c in diff.layers or ()]
    for (before, after), alike in groupby(sorted(told, key=lambda t: t[1:]), key=lambda t: t[1:]):
        names = [name or WHOLE_MODEL for name, _, _ in alike]
        below = [
            line
            for side, facts in (("A", before), ("B", after))
            for line in textwrap.wrap(
                f"{INDENT}{side}  {facts}", width, subsequent_indent=INDENT + " " * 3, break_on_hyphens=False
            )
        ]
        rows.append(Row((shortened(collapse(names), width - 8), str(len(names))), tuple(below)))
    return Grid((Column("MoE layers"), Column("count", number=True)), tuple(rows))


def _what_changed(change: Change[Layer]) -> tuple[str, str]:
    """A layer before and after; by the whole specs where they read alike."""
    before, after = _layer(change.before), _layer(change.after)
    if before == after and change.before is not None and change.after is not None:
        return printable(change.before.text), printable(change.after.text)
    return before, after


def _layer(layer: Layer | None) -> str:
    if layer is None:
        return "none"
    if not layer.fused:
        return "as written"
    parts = (layer.router, layer.experts, layer.shared)
    return printable("fused: " + " | ".join(part for part in parts if part))


def _tensors(tensors: Tensors, width: int) -> Grid:
    """A row for the tensors that changed alike and whose names differ in numbers alone."""
    rows = [
        *_families("removed", ((t, _type(t), t.bytes) for t in tensors.removed)),
        *_families("added", ((t, _type(t), t.bytes) for t in tensors.added)),
        *_renamed(tensors.renamed),
        *_families("changed", map(_changed, tensors.changed)),
        *_families("other numbers", ((t, _type(t), t.bytes) for t in tensors.rewritten)),
    ]
    titles = ("tensors", "name", "count", "type", "bytes")
    columns = tuple(Column(title, number=title in ("count", "bytes")) for title in titles)
    return _fitted(columns, rows, 1, width)


def _renamed(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[str, ...]]:
    """Pairs whose names differ in numbers alone by the first of them."""
    groups = dict[tuple[str, ...], list[tuple[Tensor, Tensor]]]()
    for before, after in pairs:
        spelled = (pattern(before.name), pattern(after.name), str(before.type))
        groups.setdefault(spelled, []).append((before, after))
    for (_, _, kind), alike in groups.items():
        before, after = alike[0]
        size = readable(sum(t.bytes for t, _ in alike))
        more = ", …" if len(alike) > 1 else ""
        yield "renamed", f"{before.name} → {after.name}{more}", str(len(alike)), kind, size


def _type(tensor: Tensor) -> str:
    return str(tensor.type)


def _changed(change: Change[Tensor]) -> tuple[Tensor, str, int]:
    assert change.before is not None and change.after is not None
    return change.after, f"{change.before.type} → {change.after.type}", change.after.bytes


def _families(word: str, told: Iterable[tuple[Tensor, str, int]]) -> Iterator[tuple[str, ...]]:
    groups = dict[tuple[str, int], list[str]]()
    for tensor, kind, size in told:
        groups.setdefault((kind, size), []).append(tensor.name)
    found = [(family, kind, size) for (kind, size), names in groups.items() for family in families(names)]
    for family, kind, size in sorted(found, key=lambda each: each[0].text):
        yield word, family.text, str(family.count), kind, readable(size * family.count)


def _values(diff: GraphDiff, width: int) -> Grid:
    rows = [
        (word, change.name, _value(change.before), _value(change.after))
        for word, changes in (("input", diff.inputs), ("output", diff.outputs))
        for change in changes
    ]
    return _fitted((Column("interface"), Column("name"), Column("A"), Column("B")), rows, 1, width)


def _value(value: Value | None) -> str:
    return "none" if value is None else str(value.type)


def _properties(diff: GraphDiff, width: int) -> Grid:
    rows = [(c.name, c.before or "none", c.after or "none") for c in diff.properties]
    return _fitted((Column("property"), Column("A"), Column("B")), rows, 2, width)


def _fitted(columns: Sequence[Column], rows: Iterable[Sequence[str]], wide: int, width: int) -> Grid:
    """A table in which the longest cells are cut in their middle until it fits, those of column `wide`
    first."""
    cells = [tuple(map(printable, row)) for row in rows]
    for place in (wide, *(i for i in reversed(range(len(columns))) if i != wide)):
        over = Grid(tuple(columns), tuple(map(Row, cells))).width - width
        if over > 0:
            longest = max(len(row[place]) for row in cells)
            most = max(_LEAST, longest - over)
            cells = [(*row[:place], shortened(row[place], most), *row[place + 1 :]) for row in cells]
    return Grid(tuple(columns), tuple(map(Row, cells)))


def _remarks(diff: GraphDiff, width: int) -> Iterator[str]:
    if diff.rewired is not None:
        room = width - len(INDENT) - 3
        yield (
            "the operators are the same, but their order, operands or attributes are not: "
            f"line {diff.rewired.line} of the graph's text is the first that differs"
        )
        yield f"{INDENT}A{GAP}{shortened(printable(diff.rewired.before), room)}"
        yield f"{INDENT}B{GAP}{shortened(printable(diff.rewired.after), room)}"
    for unread in diff.tensors.unread:
        many = "1 tensor" if unread.count == 1 else f"{unread.count} tensors"
        what_to_do = "; --contents compares them" if unread.why == TOO_MANY else ""
        yield f"the numbers of {many} ({readable(unread.bytes)}) were not compared: {unread.why}{what_to_do}"
    yield from map(printable, diff.left_out)
    if diff.same and _other_text(diff.a, diff.b):
        yield "the files differ in what the graph does not mean: names of values, comments, places of data"


def _other_text(a: GraphFacts, b: GraphFacts) -> bool:
    return a.form == b.form and a.size.graph_bytes != b.size.graph_bytes


def shortened(text: str, most: int) -> str:
    """A text of at most `most` characters: the middle of a longer one is left out."""
    if len(text) <= most:
        return text
    end = (most - 1) // 2
    return f"{text[: most - 1 - end]}…{text[len(text) - end :]}"


def printable(text: str) -> str:
    """A name as one line that does nothing to a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
