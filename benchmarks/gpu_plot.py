"""A drawing of the figures: for each layer, time over the floor against the number of tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

_WIDTH, _HEIGHT, _MARGIN = 340, 260, 46
_COLOURS = (
    "#0b6e4f",
    "#c0392b",
    "#2e5c9a",
    "#8e6c00",
    "#7d3c98",
    "#5d6d7e",
    "#ba4a00",
    "#148f77",
    "#d4a017",
    "#2c3e50",
)
Series = Mapping[str, Sequence[tuple[int, float]]]  # by name, (T, time over floor)


def svg(panels: Mapping[str, Series], title: str) -> str:
    """One panel each, both axes logarithmic, and a legend; 1 is the floor."""
    names = list(dict.fromkeys(name for series in panels.values() for name in series))
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
    values = [v for series in panels.values() for line in series.values() for _, v in line]
    top = max([2.0, *values]) * 1.2
    width = _WIDTH * max(1, len(panels))
    height = _HEIGHT + 30 + 16 * len(names)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="8" y="16" font-size="13">{escape(title)}</text>',
    ]
    for i, (name, series) in enumerate(panels.items()):
        parts += [f'<g transform="translate({i * _WIDTH} 20)">', *_panel(name, series, colours, top), "</g>"]
    for i, name in enumerate(names):
        y = _HEIGHT + 34 + 16 * i
        parts.append(f'<line x1="10" x2="34" y1="{y}" y2="{y}" stroke="{colours[name]}" stroke-width="2"/>')
        parts.append(f'<text x="40" y="{y + 4}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(name: str, series: Series, colours: Mapping[str, str], top: float) -> list[str]:
    tokens = sorted({t for line in series.values() for t, _ in line}) or [1]
    low, high = math.log(tokens[0]), math.log(max(tokens[-1], tokens[0] + 1))

    def x(t: int) -> float:
        return _MARGIN + (math.log(t) - low) / (high - low) * (_WIDTH - _MARGIN - 14)

    def y(value: float) -> float:
        part = math.log(max(value, 0.8) / 0.8) / math.log(top / 0.8)
        return _HEIGHT - _MARGIN - part * (_HEIGHT - _MARGIN - 24)

    parts = [f'<text x="{_WIDTH / 2:.0f}" y="14" text-anchor="middle">{escape(name)}</text>']
    for value in [v for v in (1, 1.5, 2, 3, 5, 10, 20, 50, 100, 200, 500) if v <= top]:
        weight = 1.2 if value == 1 else 0.3
        parts.append(
            f'<line x1="{_MARGIN}" x2="{_WIDTH - 14}" y1="{y(value):.1f}" y2="{y(value):.1f}" '
            f'stroke="black" stroke-width="{weight}"/>'
        )
        parts.append(f'<text x="{_MARGIN - 4}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}×</text>')
    for t in tokens:
        parts.append(f'<text x="{x(t):.1f}" y="{_HEIGHT - _MARGIN + 16}" text-anchor="middle">{t}</text>')
    parts.append(f'<text x="{_WIDTH / 2:.0f}" y="{_HEIGHT - 12}" text-anchor="middle">tokens</text>')
    for label, line in series.items():
        points = " ".join(f"{x(t):.1f},{y(v):.1f}" for t, v in sorted(line))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colours[label]}" stroke-width="2"/>')
        parts += [
            f'<circle cx="{x(t):.1f}" cy="{y(v):.1f}" r="2.5" fill="{colours[label]}"/>' for t, v in line
        ]
    return parts
