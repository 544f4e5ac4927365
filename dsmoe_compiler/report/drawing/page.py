"""A page about one layer: the drawing, what is known of it, its text before and after. Needs no network."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

from dsmoe_compiler.report.drawing.compose import compose
from dsmoe_compiler.report.drawing.layer_graph import MEANING, ROLES, LayerAnatomy, LayerGraph
from dsmoe_compiler.report.drawing.palette import PAGE_STYLE
from dsmoe_compiler.report.drawing.svg import svg
from dsmoe_compiler.report.story import WHOLE_MODEL

_WORDS = re.compile(
    r"(?P<comment>#[^\n]*)|(?P<parameter>@[^\s,\])]+)|(?P<value>%\w+)|(?P<operator>[\w.]+)(?=\()"
)
_ZOOM = """
const view = document.querySelector('.view'), drawing = view.querySelector('svg');
const width = drawing.viewBox.baseVal.width, height = drawing.viewBox.baseVal.height;
let scale = 1;
function zoom(to, x = view.clientWidth / 2, y = view.clientHeight / 2) {
  to = Math.min(4, Math.max(0.1, to));
  const left = (view.scrollLeft + x) * to / scale - x, top = (view.scrollTop + y) * to / scale - y;
  scale = to;
  drawing.setAttribute('width', width * to);
  drawing.setAttribute('height', height * to);
  view.scrollTo(left, top);
  document.querySelector('output').textContent = Math.round(to * 100) + ' %';
}
const fit = () => zoom(Math.min(1, (view.clientWidth - 2) / width));
const steps = {in: () => zoom(scale * 1.25), out: () => zoom(scale / 1.25), fit, one: () => zoom(1)};
for (const button of document.querySelectorAll('button')) button.onclick = steps[button.name];
view.addEventListener('wheel', event => {
  if (!event.ctrlKey && !event.metaKey) return;
  event.preventDefault();
  const box = view.getBoundingClientRect();
  zoom(scale * Math.exp(-event.deltaY / 300), event.clientX - box.left, event.clientY - box.top);
}, {passive: false});
let held = null;
view.onpointerdown = event => {
  if (event.pointerType !== 'mouse' || event.button) return;
  held = [event.clientX + view.scrollLeft, event.clientY + view.scrollTop];
  view.setPointerCapture(event.pointerId);
};
view.onpointermove = event => held && view.scrollTo(held[0] - event.clientX, held[1] - event.clientY);
view.onpointerup = view.onpointercancel = () => held = null;
fit();
const lost = drawing.querySelector('.lost');
if (lost) view.scrollTop = lost.getBoundingClientRect().top - view.getBoundingClientRect().top - 200;
"""


def page(anatomy: LayerAnatomy) -> str:
    """The layer as one HTML document."""
    name = anatomy.report.name or WHOLE_MODEL
    sides = [("Before", anatomy.before)]
    if anatomy.after is not None:
        sides.append(("After", anatomy.after))
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            '<head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
            f"<title>{_text(name)} of {_text(anatomy.model)}</title>",
            f"<style>{PAGE_STYLE}</style></head>",
            '<body class="layer">',
            f"<header><h1>{_text(name)}</h1><p>{_text(_verdict(anatomy))}</p></header>",
            "<main>",
            *_facts(anatomy),
            *_drawing(anatomy),
            '<section class="texts">',
            *(
                f"<figure><figcaption>{title}</figcaption><pre>{_text_of(side)}</pre></figure>"
                for title, side in sides
            ),
            "</section>",
            "</main>",
            f"<script>{_ZOOM}</script>",
            "</body></html>\n",
        ]
    )


def _verdict(anatomy: LayerAnatomy) -> str:
    report = anatomy.report
    if report.spec is not None:
        return str(report.spec)
    return f"not fused: {report.refusal}" if report.refusal else "not fused"


def _facts(anatomy: LayerAnatomy) -> Iterable[str]:
    report, after = anatomy.report, anatomy.after
    operators = str(len(anatomy.before.operators)) + (f" → {len(after.operators)}" if after else "")
    facts = [
        ("model", anatomy.model),
        ("spelling", report.idiom),
        ("source", report.source),
        ("operators on data", operators),
        *(("remark", remark) for remark in report.remarks),
    ]
    yield '<dl class="facts">'
    yield from (f"<div><dt>{_text(k)}</dt><dd>{_text(v)}</dd></div>" for k, v in facts if v)
    yield "</dl>"


def _drawing(anatomy: LayerAnatomy) -> Iterable[str]:
    yield '<section class="drawing"><div class="tools"><span class="roles">'
    for role in ROLES:
        yield f'<span class="{role}" title="{_text(MEANING[role])}"><i></i>{role}</span>'
    yield '</span><button name="out" aria-label="smaller">−</button><output>100 %</output>'
    yield '<button name="in" aria-label="larger">+</button><button name="fit">fit</button>'
    yield '<button name="one">1:1</button></div>'
    yield f'<div class="view" tabindex="0">{svg(compose(anatomy, heading=False))}</div></section>'


def _text_of(graph: LayerGraph) -> str:
    """A layer's text; the line where understanding ended stands out."""
    lost = next((operator.line for operator in graph.operators if operator.lost), None)
    if lost is None:
        return _marked(graph.text)
    before, line, after = graph.text.partition(f"\n{lost}\n")
    return f"{_marked(before)}\n<mark>{_marked(line[1:-1])}</mark>\n{_marked(after)}"


def _marked(text: str) -> str:
    """The text with its words in the colours of what they are."""
    marked, at = list[str](), 0
    for found in _WORDS.finditer(text):
        marked.append(_text(text[at : found.start()]))
        marked.append(f'<b class="{found.lastgroup}">{_text(found.group())}</b>')
        at = found.end()
    return "".join([*marked, _text(text[at:])])


def _text(text: str) -> str:
    return html.escape(text)
