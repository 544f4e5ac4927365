"""A spec over several lines, for reading; `ir.spec.parse` reads it back as it reads the canonical line.

moe(top_k=6,
    experts=experts(count=64, hidden=2048,
        body="h=linear(x,p0); mul(linear(mul(silu(slice(h,0,1408,1)),slice(h,1408,2816,1)),p1),w)"),
    router=router(top_k=6, score="softmax"))
"""

from __future__ import annotations

import ast

STEP = 4


def spec_lines(text: str, width: int) -> list[str]:
    """The canonical line of a spec as lines of at most `width` characters, where its names allow that.

    Raises ValueError or SyntaxError when `text` is no spec.
    """
    call = ast.parse(text, mode="eval").body
    if not isinstance(call, ast.Call):
        raise ValueError(f"not a spec: {text!r}")
    return _call(call, "", 0, width)


def _call(call: ast.Call, label: str, indent: int, width: int) -> list[str]:
    """`label` and the call: on one line if it fits, else its leading plain fields on the first one."""
    opening = f"{' ' * indent}{label}{ast.unparse(call.func)}("
    whole = opening + ", ".join(f"{k.arg}={_flat(k.value)}" for k in call.keywords) + ")"
    if len(whole) <= width:
        return [whole]
    lines, inner = [opening], indent + STEP
    for i, keyword in enumerate(call.keywords):
        end = "," if i + 1 < len(call.keywords) else ")"
        plain = not isinstance(keyword.value, ast.Call)
        one = f"{keyword.arg}={_flat(keyword.value)}{end}"
        space = "" if lines[-1].endswith("(") else " "
        if plain and not lines[-1].endswith("),") and len(lines[-1]) + len(space) + len(one) <= width:
            lines[-1] += space + one
        else:
            lines += _field(keyword, inner, width)
            lines[-1] += end
    return lines


def _field(keyword: ast.keyword, indent: int, width: int) -> list[str]:
    label = f"{keyword.arg}="
    if isinstance(keyword.value, ast.Call):
        return _call(keyword.value, label, indent, width)
    one = f"{' ' * indent}{label}{_flat(keyword.value)}"
    if len(one) < width or not _is_text(keyword.value):
        return [one]
    hanging = " " * (indent + len(label))
    pieces = ast.literal_eval(keyword.value).split("; ")
    joined = [p + "; " for p in pieces[:-1]] + pieces[-1:]
    return [
        f"{hanging}{_quoted(p)}" if i else f"{' ' * indent}{label}{_quoted(p)}" for i, p in enumerate(joined)
    ]


def _flat(value: ast.expr) -> str:
    if isinstance(value, ast.Call):
        return f"{ast.unparse(value.func)}({', '.join(f'{k.arg}={_flat(k.value)}' for k in value.keywords)})"
    return _quoted(ast.literal_eval(value)) if _is_text(value) else ast.unparse(value)


def _is_text(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def _quoted(text: str) -> str:
    return f'"{text}"'
