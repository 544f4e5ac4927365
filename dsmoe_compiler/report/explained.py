"""Why layers were refused and how others were understood, arranged for reading, on a terminal or as text."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from dsmoe_compiler.ir.errors import REMEDIES, Refusal
from dsmoe_compiler.ir.explanation import Explanation, Moment, SourceLine
from dsmoe_compiler.ir.spec import MoESpec
from dsmoe_compiler.report.layer_names import collapse
from dsmoe_compiler.report.report import LayerReport, Report
from dsmoe_compiler.report.story import WHOLE_MODEL

Kind: TypeAlias = Literal["title", "refused", "fused", "heading", "code", "text", "aside"]
_WEIGHTED = {"output": "weighed on the output", "inside": "weighed inside", "none": "not weighed"}


@dataclass(frozen=True)
class Line:
    """One line of the page, and what it is: that decides its colour."""

    text: str
    kind: Kind = "text"


@dataclass(frozen=True)
class Alike:
    """Layers about which there is one thing to say; `layer` is the first of them."""

    layer: LayerReport
    names: tuple[str, ...]

    @property
    def title(self) -> str:
        """Their names as one."""
        name = collapse(self.names) or WHOLE_MODEL
        return f"{name} ({len(self.names)} layers alike)" if len(self.names) > 1 else name


def group(layers: Sequence[LayerReport]) -> tuple[Alike, ...]:
    """The layers, those refused alike as one: the same code at the same lines for the same reason."""
    found = dict[object, list[LayerReport]]()
    for layer in layers:
        found.setdefault(_what_is_said(layer), []).append(layer)
    return tuple(Alike(same[0], tuple(layer.name for layer in same)) for same in found.values())


def _what_is_said(layer: LayerReport) -> object:
    """Everything but the names of values and parameters, which differ from layer to layer."""
    if layer.refusal is None:
        return layer.name
    because = re.sub(r"[%@][\w.]+", "", layer.refusal.because)
    moments = layer.explanation.moments if layer.explanation else ()
    nameless = tuple(replace(m, node="") for m in moments)
    return replace(layer.refusal, node="", because=because), nameless


def page(report: Report, alike: Sequence[Alike], width: int) -> tuple[Line, ...]:
    """What there is to say of these layers, at most `width` wide but for the user's own lines of code."""
    if not report.layers:
        text = f"{report.model}: no Mixture-of-Experts layers; the model runs unchanged"
        return (Line(text, "title"),)
    if not alike:
        many = f"all {len(report.layers)} layers" if len(report.layers) > 1 else "the one layer"
        lines = [Line(f"nothing to explain: {many} fused", "fused"), *_as_written(report)]
        return tuple(part for line in lines for part in _folded(line, width))
    blocks = [list(_block(each, width)) for each in alike]
    return tuple(line for i, block in enumerate(blocks) for line in ([Line("")] if i else []) + block)


def _as_written(report: Report) -> Iterator[Line]:
    for i, layer in enumerate(report.layers):
        if layer.left:
            what = ", ".join(left.what for left in layer.left)
            yield Line(f"{layer.name or WHOLE_MODEL}: {what}; --layer {i} says why", "aside")


def records(alike: Sequence[Alike], entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same as data: of a report's entries, the first of each kind, with the names of all alike."""
    by_name = {entry["name"]: entry for entry in entries}
    found = []
    for each in alike:
        refusal = each.layer.refusal
        told = {"layers": list(each.names), **by_name[each.layer.name]}
        if refusal is not None:
            told["refusal"] = {**told["refusal"], "meaning": refusal.meaning}
        found.append(told)
    return found


def _block(alike: Alike, width: int) -> Iterator[Line]:
    layer = alike.layer
    lines = _fused(alike, layer.spec) if layer.spec is not None else _refused(alike)
    for line in lines:
        if line.kind == "heading":
            yield Line("")
        yield from _folded(line, width)


def _refused(alike: Alike) -> Iterator[Line]:
    layer, refusal = alike.layer, alike.layer.refusal
    yield Line(f"{alike.title}: not fused", "title")
    if refusal is None:
        return
    yield Line(f"{refusal.code}: {refusal.meaning}", "refused")
    yield Line(f"  {refusal.because}")
    yield Line("")
    yield from _where(refusal, layer.explanation)
    remedy = REMEDIES[refusal.code]
    if layer.explanation is not None:
        yield from _moments("how far it was understood", layer.explanation.moments)
        yield from _nearest(layer.explanation)
        remedy = layer.explanation.remedy or remedy
    yield Line("to fuse it", "heading")
    yield Line(f"  {remedy}")


def _where(refusal: Refusal, explanation: Explanation | None) -> Iterator[Line]:
    """The line at which understanding ended, with its text, and the calls that lead there."""
    lines = explanation.moments[-1].lines if explanation and explanation.moments else ()
    at = next((i for i, line in enumerate(lines) if str(line) == refusal.source), None)
    if at is None:
        yield from _source(refusal.source, refusal.text)
        return
    yield from _source(_in_function(lines[at]), lines[at].text)
    for caller in reversed(lines[:at]):
        yield from _source(f"called at {_in_function(caller)}", caller.text)


def _in_function(line: SourceLine) -> str:
    return f"{line}, in {line.function}" if line.function else str(line)


def _source(where: str, text: str) -> Iterator[Line]:
    if where:
        yield Line(f"  {where}", "aside")
    if text:
        yield Line(f"      {text}", "code")


def _moments(heading: str, moments: Sequence[Moment]) -> Iterator[Line]:
    if not moments:
        return
    yield Line(heading, "heading")
    labels = max(len(m.what) for m in moments)
    for moment in moments:
        place = _place(moment)
        operator = moment.operator.split("::")[-1]
        where = f"{place}  {operator}" if place else operator
        yield Line(f"  {moment.what:<{labels}}  {where}", "aside")
        if moment.means:
            yield Line(" " * (labels + 4) + moment.means)
        elif place and place.text and moment.what != "lost":
            yield Line(" " * (labels + 4) + place.text, "code")


def _place(moment: Moment) -> SourceLine | None:
    """The innermost line that is no library's, if there is one."""
    own = [line for line in moment.lines if not line.installed] or list(moment.lines)
    return own[-1] if own else None


def _nearest(explanation: Explanation) -> Iterator[Line]:
    if not explanation.nearest:
        return
    several = "spellings" if len(explanation.nearest) > 1 else "spelling"
    yield Line(f"nearest known {several}", "heading")
    for spelling in explanation.nearest:
        yield Line(f"  {spelling.name}")
        yield from (Line(f"      {code}", "code") for code in spelling.written.splitlines())
        yield Line(f"      needs {spelling.needs}", "aside")


def _fused(alike: Alike, spec: MoESpec) -> Iterator[Line]:
    layer = alike.layer
    yield Line(f"{alike.title}: fused", "title")
    yield Line(str(spec), "fused")
    yield Line(
        f"  spelling  {layer.idiom}, at {layer.source}" if layer.source else f"  spelling  {layer.idiom}"
    )
    yield Line(f"  experts   {spec.experts}, {_WEIGHTED[spec.experts.weighting]}")
    yield Line(f"            {spec.experts.body}", "code")
    if spec.router is not None:
        yield Line(f"  router    {spec.router}")
    for left in layer.left:
        yield from _left(left.what, left.refusal)
    yield Line(f"  shared    {_shared(layer, spec)}")
    for remark in layer.remarks:
        yield Line(f"  taken back: {remark}")
    if layer.explanation is not None:
        yield from _moments("how it was understood", layer.explanation.moments)


def _left(what: str, refusal: Refusal | None) -> Iterator[Line]:
    about, _, how = what.partition(" ")
    if refusal is None:
        yield Line(f"  {about:<9} {how}")
        return
    yield Line(f"  {about:<9} {how}: {refusal.code}: {refusal.because}", "refused")
    for line in _source(refusal.source, refusal.text):
        yield replace(line, text=f"          {line.text}")
    yield Line(f"            to fuse it: {REMEDIES[refusal.code]}")


def _shared(layer: LayerReport, spec: MoESpec) -> str:
    if spec.shared is not None:
        return str(spec.shared)
    if any(left.what.startswith("shared") for left in layer.left):
        return "as written"
    if spec.router is None:
        return "not looked for: they join a layer that has its router"
    return "none: no body of the same input is added to the routed sum"


def _folded(line: Line, width: int) -> Iterator[Line]:
    """A sentence over several lines, each begun where its first word is; code is left whole."""
    if line.kind == "code" or len(line.text) <= width:
        yield line
        return
    indent = " " * (len(line.text) - len(line.text.lstrip()))
    label = re.match(r"\s*(?:\S+ )*\S* {2,}", line.text)
    hang = " " * label.end() if label and label.end() < width // 2 else indent
    for text in textwrap.wrap(
        line.text, width, subsequent_indent=hang, break_long_words=False, break_on_hyphens=False
    ):
        yield replace(line, text=text)
