"""A term as a formula one reads: silu(x·gate_e) * (x·up_e), an expert's own tensor marked by `_e`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from dsmoe_compiler.ir.body import Step, Terms

LONGEST = 120
_SIGNS = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
_NAMES = {"minimum": "min", "maximum": "max", "gelu_tanh": "gelu"}
_LEAVES = {"token": "x", "pair": "w", "x": "x", "w": "w"}


def formula(terms: Terms, term: int, tensors: Mapping[str, str], longest: int = LONGEST) -> str:
    """The term, its leaves x (the token's row), w (the pair's weight) and the experts' tensors, each named by
    the value of `tensors` for the parameter it stands for. What is nested too deep for `longest` characters
    is "…".
    """
    names = _leaf_names(terms, term, tensors)
    for depth in range(_depth(terms, term), 0, -1):
        text = _Writing(terms.steps.__getitem__, names).written(term, depth)
        if len(text) <= longest:
            return text
    return "…"


def _leaf_names(terms: Terms, term: int, tensors: Mapping[str, str]) -> dict[int, str]:
    """Where the term reads several inputs or several weights, they are numbered."""
    names, count = dict[int, str](), dict[str, int]()
    for at in sorted(terms.reachable(term)):
        step = terms.steps[at]
        if step.op in ("expert", "own"):
            names[at] = tensors.get(str(step.attrs[0]), "?") + "_e"
        elif step.op == "shared":
            names[at] = tensors.get(str(step.attrs[0]), "?")
        elif step.op in _LEAVES:
            letter = _LEAVES[step.op]
            count[letter] = count.get(letter, 0) + 1
            names[at] = letter if count[letter] == 1 else f"{letter}{count[letter]}"
    return names


def _depth(terms: Terms, term: int) -> int:
    depths = dict[int, int]()
    for at in sorted(terms.reachable(term)):  # a step's arguments come before it
        depths[at] = 1 + max((depths[a] for a in terms.steps[at].args), default=0)
    return depths[term]


class _Writing:
    def __init__(self, step: Callable[[int], Step], names: Mapping[int, str]) -> None:
        self._step, self._names = step, names

    def written(self, term: int, depth: int) -> str:
        step = self._step(term)
        if term in self._names:
            return self._names[term]
        if step.op == "const":
            return f"{step.attrs[0]:g}" if isinstance(step.attrs[0], float) else str(step.attrs[0])
        if depth <= 1:
            return "…"
        args = [self.written(a, depth - 1) for a in step.args]
        inner = [self._grouped(a, text) for a, text in zip(step.args, args, strict=True)]
        match step.op:
            case "linear" | "matmul":
                return f"{inner[0]}·{inner[1]}"
            case "add" | "sub" | "mul" | "div":
                return f"{inner[0]} {_SIGNS[step.op]} {inner[1]}"
            case "neg":
                return f"-{inner[0]}"
            case "pow":
                return f"{inner[0]}**{step.attrs[0]}"
            case "slice":
                return f"{inner[0]}[{_bounds(*step.attrs)}]"
            case "concat":
                return f"[{', '.join(args)}]"
            case "cast":
                return f"{step.attrs[0]}({args[0]})"
        return f"{_NAMES.get(step.op, step.op)}({', '.join([*args, *map(str, step.attrs)])})"

    def _grouped(self, term: int, text: str) -> str:
        """In brackets where the formula would read otherwise without."""
        infix = {"linear", "matmul", "add", "sub", "mul", "div", "neg", "pow"}
        return f"({text})" if self._step(term).op in infix and text != "…" else text


def _bounds(start: object, stop: object, step: object) -> str:
    skip = "" if step == 1 else f":{step}"
    return f"{start or ''}:{'' if stop is None else stop}{skip}"
