"""Colours and type of the drawings, by day and by night."""

from __future__ import annotations

_DAY = """--ink:#1c2127;--muted:#626b76;--paper:#ffffff;--panel:#f5f6f8;--card:#ffffff;--edge:#8a94a0;
--rule:#dfe3e8;--router:#4f63c6;--permutation:#737c88;--experts:#14806a;--combine:#a86a12;--shared:#9a4788;
--lost:#c22f28;--given:#8a94a0;--result:#8a94a0;--fused:#8a94a0"""
_NIGHT = """--ink:#e8eaed;--muted:#9fa8b3;--paper:#121518;--panel:#191d22;--card:#21262c;--edge:#77818d;
--rule:#2e353d;--router:#93a3f0;--permutation:#a9b2bd;--experts:#56c7aa;--combine:#e3b262;--shared:#dc93cb;
--lost:#ff7b72;--given:#77818d;--result:#77818d;--fused:#77818d"""
_MONO = "ui-monospace,'SF Mono',Menlo,Consolas,'DejaVu Sans Mono','Liberation Mono',monospace"
_SANS = "system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif"
_LOOKS = ("router", "permutation", "experts", "combine", "shared", "lost", "given", "result", "fused")

VARIABLES = f"""
.layer{{{_DAY}}}
@media (prefers-color-scheme:dark){{.layer{{{_NIGHT}}}}}"""

SVG_STYLE = (
    VARIABLES
    + f"""
.layer .mono{{font-family:{_MONO}}}
.layer .sans{{font-family:{_SANS}}}
.layer text{{fill:var(--ink);white-space:pre}}
.layer .paper{{fill:var(--paper)}}
.layer .panel{{fill:var(--panel);stroke:var(--rule)}}
.layer .card{{fill:var(--card);stroke:var(--hue);stroke-opacity:.5}}
.layer .card.lost{{stroke-width:2;stroke-opacity:1}}
.layer .card.given,.layer .card.result{{stroke-dasharray:3 3}}
.layer .bar{{fill:var(--hue)}}
.layer .field{{fill:var(--hue);fill-opacity:.07;stroke:var(--hue);stroke-opacity:.18}}
.layer .pill{{fill:var(--hue);fill-opacity:.14}}
.layer .code{{fill:var(--panel)}}
.layer .alarm{{fill:var(--lost);fill-opacity:.1}}
.layer .alarm-text{{fill:var(--lost)}}
.layer .name,.layer .title{{font-weight:600}}
.layer .panel-title,.layer .heading{{font-weight:650}}
.layer .heading,.layer .badge{{fill:var(--hue)}}
.layer .role-name{{paint-order:stroke;stroke:var(--panel);stroke-width:5px;stroke-linejoin:round}}
.layer .note,.layer .type{{fill:var(--muted)}}
.layer .arrow{{fill:none;stroke:var(--edge);stroke-width:1.3}}
.layer .arrow.head{{fill:var(--edge);stroke:none}}
.layer .becomes{{fill:none;stroke:var(--ink);stroke-width:2.5;stroke-linecap:round}}
.layer .becomes.head{{fill:var(--ink);stroke:var(--ink);stroke-linejoin:round}}
"""
    + "".join(f".layer .{look}{{--hue:var(--{look})}}\n" for look in _LOOKS)
)

PAGE_STYLE = (
    VARIABLES
    + f"""
:root{{color-scheme:light dark}}
body{{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 {_SANS}}}
header,main{{max-width:1800px;margin:0 auto;padding:0 32px}}
header{{padding-top:32px}}
h1{{font:600 22px/1.3 {_MONO};margin:0}}
header p{{margin:4px 0 0;color:var(--muted)}}
.facts{{display:flex;flex-wrap:wrap;gap:6px 36px;margin:20px 0}}
dt{{color:var(--muted);font-size:12px}}
dd{{margin:0}}
.drawing{{border:1px solid var(--rule);border-radius:12px;overflow:hidden}}
.tools{{display:flex;flex-wrap:wrap;align-items:center;gap:8px;padding:8px 12px;font-size:13px;
border-bottom:1px solid var(--rule);background:var(--panel)}}
.tools button{{font:inherit;color:inherit;background:var(--card);border:1px solid var(--rule);
border-radius:6px;min-width:30px;padding:2px 8px;cursor:pointer}}
.tools output{{min-width:3.4em;text-align:center;color:var(--muted)}}
.roles{{display:flex;flex-wrap:wrap;gap:4px 16px;margin-right:auto;color:var(--muted)}}
.roles i{{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:6px;
background:var(--hue)}}
.view{{overflow:auto;height:min(82vh,1100px);cursor:grab}}
.view:active{{cursor:grabbing}}
.view svg{{display:block;margin:0 auto}}
.texts{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,620px),1fr));gap:24px;
margin:24px 0 48px}}
figure{{margin:0;min-width:0}}
figcaption{{font-weight:600;margin-bottom:6px}}
pre{{margin:0;padding:14px 16px;overflow:auto;max-height:80vh;background:var(--panel);
border:1px solid var(--rule);border-radius:10px;font:12px/1.55 {_MONO}}}
pre b{{font-weight:400}}
pre mark{{background:none;color:inherit;outline:1px solid var(--lost);
outline-offset:3px;border-radius:3px}}
pre .comment{{color:var(--muted)}}
pre .parameter{{color:var(--experts)}}
pre .value{{color:var(--router)}}
pre .operator{{font-weight:600}}
"""
    + "".join(f".roles .{look}{{--hue:var(--{look})}}\n" for look in _LOOKS[:5])
)
