"""Gated shared experts: a body that a number of each token scales, as an FFN and that number.

    mul(linear(mul(silu(linear(x,p0)),linear(x,p1)),p2),sigmoid(linear(x,p3)))

becomes the FFN `mul(linear(mul(silu(linear(x,p0)),linear(x,p1)),p2),w)` and the gate `sigmoid(linear(x,p3))`,
which stands where a routed expert has its routing weight.
"""

from __future__ import annotations

from collections.abc import Sequence

from dsmoe_compiler.codegen.ffn import row_widths
from dsmoe_compiler.codegen.operand import Operand
from dsmoe_compiler.ir.body import Body, Terms


def split_gate(body: Body, hidden: int, params: Sequence[Operand]) -> tuple[Body, Body | None]:
    """The FFN of a body, and its gate where it has one. Raises Unsupported where a width is not known."""
    at, casts = body.result, list[str]()
    while body.steps[at].op == "cast":
        casts.append(str(body.steps[at].attrs[0]))
        at = body.steps[at].args[0]
    widths, step = row_widths(body, hidden, params), body.steps[at]
    gates = [a for a in step.args if widths[a] == 1 and body.steps[a].op not in ("const", "p")]
    if step.op != "mul" or len(gates) != 1 or widths[at] == 1:
        return body, None
    (ffn,) = (a for a in step.args if a != gates[0])
    terms = Terms(list(body.steps))
    scaled = terms.number("mul", (ffn, terms.number("w")))
    for dtype in reversed(casts):
        scaled = terms.number("cast", (scaled,), (dtype,))
    return terms.body(scaled, {}), terms.body(gates[0], {})
