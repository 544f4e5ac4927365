"""A load arranged for reading: the heat map with a row a layer, and what its figures mean."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

from dsmoe_compiler.report.grid import GAP, Column, Grid, Row
from dsmoe_compiler.report.layer_names import collapse, ranges
from dsmoe_compiler.report.load import LayerLoad, Load
from dsmoe_compiler.report.load_map import EVEN, RAMP, experts_a_cell, row
from dsmoe_compiler.report.story import WHOLE_MODEL
from dsmoe_compiler.report.text import WIDTH

NARROWEST = 16  # a map of fewer cells shows nothing
MOST_LINES = 3  # for the experts that are never used, each by its number
INDENT = "    "


@dataclass(frozen=True)
class LoadStory:
    """`grid` is the heat map, None where no layer was counted."""

    headline: tuple[str, ...]
    grid: Grid | None
    legend: tuple[str, ...]


def render(load: Load) -> str:
    """The heat map as plain text, at most 80 characters wide unless a name is long.

    DeepSeekMoEForCausalLM: 33 tokens, top-4, 2 of 2 MoE layers counted
    model.layers.{1-2}.mlp

    layer  16 experts        MaxVio    entropy  unused
    1      ▃▅▅▁▂█▄▇·▃▆▂▃▅▄▃    1.42  3.71/4.00       1
    2      ▄▄▅▃▃▆▅▄▃▂▅▅▃▄▄▅    0.45  3.95/4.00       0
    """
    story = tell(load, WIDTH)
    blocks = [story.headline, tuple(story.grid.lines()) if story.grid else (), story.legend]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def tell(load: Load, width: int) -> LoadStory:
    """Arrange a load for a page `width` characters wide."""
    legend = [f"not counted, as written: {collapse(_said(load.not_counted))}"] if load.not_counted else []
    if not load.layers:
        return LoadStory(tuple(_folded(f"{load.model}: no layer was counted", width)), None, tuple(legend))
    labels = _labels([layer.name for layer in load.layers])
    columns, facts = _facts(load.layers)
    taken = max(len("layer"), *map(len, labels)) + len(GAP)
    taken += sum(max(len(c.title), *(len(f[i]) for f in facts)) + len(GAP) for i, c in enumerate(columns))
    together = experts_a_cell(load.layers, max(NARROWEST, width - taken))
    rows = (
        Row((label, row(layer, together), *cells))
        for label, layer, cells in zip(labels, load.layers, facts, strict=True)
    )
    grid = Grid((Column("layer"), Column(_experts(load.layers, together)), *columns), tuple(rows))
    legend = [*_meaning(together), *_unused(load.layers, labels, width), *legend]
    folded = tuple(line for each in legend for line in _folded(each, width))
    return LoadStory(tuple(_headline(load, labels, width)), grid, folded)


def _headline(load: Load, labels: Sequence[str], width: int) -> list[str]:
    layers, names = load.layers, [layer.name for layer in load.layers]
    facts = [f"{layers[0].tokens:,} tokens"] if _same(x.tokens for x in layers) else []
    facts += [f"top-{layers[0].top_k}"] if _same(x.top_k for x in layers) else []
    found = len(layers) + len(load.not_counted)
    facts.append(f"{len(layers)} of {found} MoE {'layer' if found == 1 else 'layers'} counted")
    whole = [] if list(labels) == _said(names) else _folded(collapse(names), width)
    return [*_folded(f"{load.model}: {', '.join(facts)}", width), *whole]


def _facts(layers: Sequence[LayerLoad]) -> tuple[list[Column], list[tuple[str, ...]]]:
    """The columns beside the map, and each layer's cells in them; a column of nothing is left out."""
    columns = {
        "MaxVio": ["-" if x.max_violation is None else f"{x.max_violation:.2f}" for x in layers],
        "entropy": ["-" if x.entropy is None else f"{x.entropy:.2f}/{x.even_entropy:.2f}" for x in layers],
        "unused": [str(len(x.unused)) for x in layers],
    }
    if any(x.dropped for x in layers):
        columns["dropped"] = [f"{x.dropped / x.pairs:.1%}" if x.pairs else "-" for x in layers]
    if not _same(x.tokens for x in layers):
        columns["tokens"] = [f"{x.tokens:,}" for x in layers]
    if not _same(x.top_k for x in layers):
        columns["K"] = [str(x.top_k) for x in layers]
    return [Column(title, number=True) for title in columns], list(zip(*columns.values(), strict=True))


def _experts(layers: Sequence[LayerLoad], together: int) -> str:
    """The map's title."""
    counts = {len(layer.counts) for layer in layers}
    many = "expert" if max(counts) == 1 else "experts"
    title = f"{min(counts)} to {max(counts)} {many}" if len(counts) > 1 else f"{max(counts)} {many}"
    return title if together == 1 else f"{title}, {together} a cell"


def _meaning(together: int) -> list[str]:
    cell = "a cell's mean load" if together > 1 else "an expert's load"
    return [
        f"{cell}: {RAMP[EVEN]} an even share, {RAMP[-1]} twice that or more, {RAMP[0]} none",
        "MaxVio: (max − mean) / mean load; entropy: of the load in bits / of an even one",
    ]


def _unused(layers: Sequence[LayerLoad], labels: Sequence[str], width: int) -> list[str]:
    """The experts that are never used, by their numbers where that takes a few lines only."""
    said = (f"layer {label}" if label.isdecimal() else label for label in labels)
    each = [
        f"{label}: {ranges(x.unused).replace(',', ', ')}"
        for label, x in zip(said, layers, strict=True)
        if x.unused
    ]
    if not each:
        return []
    line = f"never used: {'; '.join(each)}"
    if len(_folded(line, width)) <= MOST_LINES:
        return [line]
    count = sum(len(layer.unused) for layer in layers)
    places = "1 layer" if len(each) == 1 else f"{len(each)} layers"
    return [f"never used: {count:,} experts in {places}"]


def _labels(names: Sequence[str]) -> list[str]:
    """What tells the names apart: without the parts that all begin and end with."""
    paths = [name.split(".") for name in names]
    shortest = min(map(len, paths))
    first = _alike(paths, shortest - 1)
    last = _alike([path[::-1] for path in paths], shortest - 1 - first)
    if len(names) == 1:
        return _said(names)
    return _said(".".join(path[first : len(path) - last]) for path in paths)


def _alike(paths: Sequence[Sequence[str]], most: int) -> int:
    """How many parts all paths begin with, at most so many."""
    places = zip(*(path[:most] for path in paths), strict=False)
    return sum(1 for _ in takewhile(lambda parts: len(set(parts)) == 1, places))


def _said(names: Iterable[str]) -> list[str]:
    return [name or WHOLE_MODEL for name in names]


def _same(values: Iterable[int]) -> bool:
    return len(set(values)) < 2


def _folded(line: str, width: int) -> list[str]:
    return textwrap.wrap(
        line, width, subsequent_indent=INDENT, break_long_words=False, break_on_hyphens=False
    )
