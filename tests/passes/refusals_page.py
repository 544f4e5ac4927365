"""docs/refusals.md, made of the layers that provoke each code:

python -m tests.passes.refusals_page > docs/refusals.md
"""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from collections.abc import Iterator

from dsmoe_compiler.ir.errors import CODES, REMEDIES, CaptureError
from dsmoe_compiler.report.explained import group, page
from dsmoe_compiler.report.report import LayerReport
from tests.passes import refusals
from tests.passes.refusals import PROVOKED, Provoked, outcome_of

WIDTH, LINE = 100, 120  # of what is printed, of the page's own text
_HEADER = """\
# Refusals

What the compiler does not understand, or cannot prove to be what it looks like, it leaves as it was: the
layer runs as written, and the report says why. A refusal has a code, a reason, the value at which
understanding ended, and the user's line there. `dsmoe explain MODEL` says more: how far the layer was
understood before, which known spelling is nearest, and what it would take. In Python,
`report.layers[i].refusal` and `.explanation` are the same as data.

R1xx are those of a `CaptureError`: the model cannot be compiled. R2xx are about the router (the experts are
fused all the same), R3xx about the experts, R4xx about the permutation, the combine and other ways from ids
to rows and back, R5xx about the whole program. R203, R304, R306 and R501 are what validation found: a
rewrite that changes the answer is taken back. No model is known to provoke them; the examples are passes
broken on purpose.

This page is made by `python -m tests.passes.refusals_page`: every example is a test, and every refusal what
that test gets (numbers of lines left out). `m.gate` (E, D) are a router's weights, `m.up` (E, F, D) and
`m.down` (E, D, F) the experts'. The examples use:
"""
_HELPERS = (refusals.route, refusals.expert, refusals.matched, refusals.pairs, refusals.combined)


def text() -> str:
    """The whole page."""
    return "\n".join(_lines()) + "\n"


def code_of(provoked: Provoked) -> str:
    """What the model could not be captured with, the layer or its router was refused with, or a rewrite taken
    back.
    """
    outcome = outcome_of(provoked)
    if isinstance(outcome, CaptureError):
        return outcome.code
    (found,) = outcome.report.layers
    told = found.refusal or next((left.refusal for left in found.left), None)
    return told.code if told else found.remarks[0].partition(": ")[0]


def _lines() -> Iterator[str]:
    yield _HEADER
    yield from _code("\n\n\n".join(inspect.getsource(helper).rstrip() for helper in _HELPERS))
    for provoked in PROVOKED:
        yield ""
        yield f"## {provoked.code}: {CODES[provoked.code]}"
        yield ""
        yield from _code(inspect.getsource(provoked.shown).rstrip())
        yield ""
        yield "```text"
        yield from _told(provoked)
        yield "```"
        yield ""
        yield textwrap.fill(f"What to do: {_remedy(provoked)}.", LINE)


def _code(source: str) -> Iterator[str]:
    yield "```python"
    yield source
    yield "```"


def _told(provoked: Provoked) -> Iterator[str]:
    """What `dsmoe explain` prints of it, up to how far it was understood."""
    outcome = outcome_of(provoked)
    if isinstance(outcome, CaptureError):
        yield from textwrap.wrap(_rounded(_numberless(str(outcome))), WIDTH, break_long_words=False)
        return
    report = outcome.report
    lines = page(report, group(report.layers), WIDTH)
    first = next((i for i, line in enumerate(lines) if line.kind == "heading"), len(lines))
    told = [_numberless(line.text) for line in lines[:first]]
    wanted = told if report.layers[0].refusal else _of_router(told)
    yield from "\n".join(_rounded(line) for line in wanted).rstrip().splitlines()


def _numberless(line: str) -> str:
    return re.sub(r"\.py:\d+", ".py", line)


def _of_router(told: list[str]) -> list[str]:
    """Of a fused layer, what is said of the part that was left."""
    start = next(i for i, line in enumerate(told) if re.search(r"R\d\d\d: ", line))
    stop = next((i for i, line in enumerate(told) if i > start and line.startswith("  shared")), len(told))
    asked = next((i for i, line in enumerate(told) if i > start and "to fuse it:" in line), stop)
    return told[start:asked]


def _rounded(line: str) -> str:
    """An error's size differs from machine to machine."""
    return re.sub(r"\d\.\d+e[+-]\d+", "…", line)


def _remedy(provoked: Provoked) -> str:
    outcome = outcome_of(provoked)
    if isinstance(outcome, CaptureError):
        return REMEDIES[provoked.code]
    layer: LayerReport = outcome.report.layers[0]
    told = layer.explanation.remedy if layer.explanation and layer.refusal else ""
    return told if told and layer.refusal and layer.refusal.code == provoked.code else REMEDIES[provoked.code]


if __name__ == "__main__":
    sys.stdout.write(text())
