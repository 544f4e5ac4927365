"""A pointwise term as Triton text: one function of a block of numbers in float32.

    @triton.jit
    def activate(gate, up):
        return silu(gate) * up

Arithmetic is float32 whatever the model's dtype is; a cast to a narrower one rounds where the model rounds.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dsmoe_compiler.codegen.term import Step, Term

# Operators of bodies as Triton expressions of their operands a, b, c and attributes, by their names.
POINTWISE: Mapping[str, str] = {
    "add": "{a} + {b}",
    "sub": "{a} - {b}",
    "mul": "{a} * {b}",
    "div": "{a} / {b}",
    "neg": "-{a}",
    "minimum": "tl.minimum({a}, {b}, tl.PropagateNan.ALL)",
    "maximum": "tl.maximum({a}, {b}, tl.PropagateNan.ALL)",
    "add_scaled": "{a} + {0} * {b}",
    "lerp": "tl.where(tl.abs({c}) < 0.5, {a} + {c} * ({b} - {a}), {b} - ({b} - {a}) * (1.0 - {c}))",
    "addcmul": "{a} + {0} * {b} * {c}",
    "addcdiv": "{a} + {0} * {b} / {c}",
    "abs": "tl.abs({a})",
    "sign": "sign({a})",
    "exp": "tl.exp({a})",
    "exp2": "tl.exp2({a})",
    "expm1": "expm1({a})",
    "log": "tl.log({a})",
    "log2": "tl.log2({a})",
    "log1p": "log1p({a})",
    "sqrt": "tl.sqrt({a})",
    "rsqrt": "tl.rsqrt({a})",
    "reciprocal": "1.0 / {a}",
    "sin": "tl.sin({a})",
    "cos": "tl.cos({a})",
    "erf": "tl.erf({a})",
    "tanh": "tanh({a})",
    "sigmoid": "tl.sigmoid({a})",
    "log_sigmoid": "log_sigmoid({a})",
    "relu": "tl.maximum({a}, 0.0, tl.PropagateNan.ALL)",
    "silu": "silu({a})",
    "mish": "mish({a})",
    "selu": "elu({a}, 1.6732632423543772, 1.0507009873554805, 1.0)",
    "hardswish": "{a} * (clamp({a} + 3.0, 0.0, 6.0) / 6.0)",
    "hardsigmoid": "clamp({a} + 3.0, 0.0, 6.0) / 6.0",
    "gelu": "gelu({a})",
    "gelu_tanh": "gelu_tanh({a})",
    "softplus": "softplus({a}, {0}, {1})",
    "leaky_relu": "tl.where({a} > 0.0, {a}, {a} * {0})",
    "elu": "elu({a}, {0}, {1}, {2})",
    "celu": "elu({a}, {0}, 1.0, 1.0 / {0})",
    "threshold": "tl.where({a} <= {0}, {1}, {a})",
    "softshrink": "tl.where({a} > {0}, {a} - {0}, tl.where({a} < -{0}, {a} + {0}, {a} * 0.0))",
    "hardshrink": "tl.where(({a} >= -{0}) & ({a} <= {0}), 0.0, {a})",
    "pow": "",
    "clamp": "",
    "cast": "",
    "gt": "{a} > {b}",
    "ge": "{a} >= {b}",
    "lt": "{a} < {b}",
    "le": "{a} <= {b}",
    "eq": "{a} == {b}",
    "ne": "{a} != {b}",
    "logical_and": "{a} & {b}",
    "logical_or": "{a} | {b}",
    "logical_not": "~{a}",
    "where": "tl.where({a}, {b}, {c})",
}
_BOOLEAN = frozenset({"gt", "ge", "lt", "le", "eq", "ne", "logical_and", "logical_or", "logical_not"})
_POWERS: Mapping[float, str] = {
    1.0: "{a}",
    2.0: "{a} * {a}",
    3.0: "{a} * {a} * {a}",
    4.0: "{a} * {a} * {a} * {a}",
    0.5: "tl.sqrt({a})",
    -0.5: "tl.rsqrt({a})",
    -1.0: "1.0 / {a}",
}


@dataclass(frozen=True)
class Function:
    """A generated device function: its name, text, and the library functions it calls."""

    name: str
    source: str
    calls: tuple[str, ...]


class NoExpression(Exception):
    """Triton has no expression for an operator with these attributes."""


def device_function(
    name: str, doc: str, term: Term, products: Sequence[str], strides: Mapping[int, int], prefix: str = "p"
) -> Function:
    """The term as a device function of its products' blocks, called as given, and of what else it reads.

    `strides` gives each vector tensor's distance from expert to expert, `prefix` begins the vectors' names.
    Raises NoExpression.
    """
    writer = _Writer(term, products, strides, prefix)
    result = writer.text(term.result)
    body = "".join(f"    {line}\n" for line in (*writer.lines, f"return {result}"))
    others = ("weight", "expert", "column", "inside", *vector_names(term, prefix))
    reads = [*products, *(n for n in others if re.search(rf"\b{n}\b", body))]
    source = f'@triton.jit\ndef {name}({", ".join(reads)}):\n    """{doc}"""\n{body}'
    return Function(name, source, tuple(sorted(writer.calls)))


def vector_names(term: Term, prefix: str = "p") -> tuple[str, ...]:
    """The parameters through which a term's vectors are read, one for each tensor."""
    return tuple(f"{prefix}{param}" for param in dict.fromkeys(v.param for v in term.vectors))


class _Writer:
    """Writes a line for each value that more than one other reads, and for each vector."""

    def __init__(self, term: Term, products: Sequence[str], strides: Mapping[int, int], prefix: str) -> None:
        self.term, self.products, self.strides, self.prefix = term, products, strides, prefix
        self.lines, self.calls = list[str](), set[str]()
        self._texts = dict[int, str]()
        self._readers = [sum(s.args.count(i) for s in term.steps) for i in range(len(term.steps))]

    def text(self, at: int) -> str:
        """The expression that stands for a step."""
        if at not in self._texts:
            step = self.term.steps[at]
            text = self._expression(step)
            if step.args and self._readers[at] > 1:
                name = f"v{sum(line.startswith('v') for line in self.lines)}"
                self.lines.append(f"{name} = {text}")
                text = name
            self._texts[at] = text
        return self._texts[at]

    def _expression(self, step: Step) -> str:
        which = step.attrs[0] if step.attrs else None
        if step.op == "product":
            return self.products[int(which or 0)]
        if step.op == "w":
            return "weight"
        if step.op == "const":
            return _number(which)
        if step.op == "vector":
            return self._load(int(which or 0))
        template = _template(step)
        for function in _LIBRARY:
            if re.search(rf"(?<![.\w]){function}\(", template):
                self.calls.add(function)
        operands = {letter: self.text(a) for letter, a in zip("abc", step.args, strict=False)}
        if step.op == "add" and all(self._is_truth(a) for a in step.args):
            raise NoExpression("no expression for a sum of truth values")
        for letter, a in zip("abc", step.args, strict=False):
            if step.op.startswith("logical_") or (step.op == "where" and letter == "a"):
                operands[letter] = self._truth(a, operands[letter])
            elif self._is_truth(a):
                operands[letter] = f"({operands[letter]}).to(tl.float32)"
        attributes = {str(i): _number(a) for i, a in enumerate(step.attrs)}
        return _filled(template, operands | attributes)

    def _truth(self, at: int, text: str) -> str:
        """A number as a truth value."""
        return text if self._is_truth(at) else f"({text} != 0.0)"

    def _is_truth(self, at: int) -> bool:
        """Whether a step's values are truth values, which Triton adds up and negates as one bit."""
        return self.term.steps[at].op in _BOOLEAN

    def _load(self, which: int) -> str:
        vector = self.term.vectors[which]
        name = f"b{which}"
        begin = [f"{self.prefix}{vector.param}"]
        if stride := self.strides[vector.param]:
            begin.append(f"expert.to(tl.int64) * {stride}")
        if vector.first:
            begin.append(str(vector.first))
        if vector.single:
            load = f"tl.load({' + '.join(begin)})"
        else:
            begin.append("column" if vector.step == 1 else f"{vector.step} * column")
            load = f"tl.load({' + '.join(begin)}, mask=inside, other=0.0)"
        self.lines.append(f"{name} = {load}.to(tl.float32)")
        return name


def _template(step: Step) -> str:
    """The expression of an operator with its attributes. Raises NoExpression."""
    if step.op == "pow":
        exponent = step.attrs[0]
        if not isinstance(exponent, (int, float)) or float(exponent) not in _POWERS:
            raise NoExpression(f"no expression for a number to the power of {exponent}")
        return _POWERS[float(exponent)]
    if step.op == "clamp":
        low, high = step.attrs
        if low is None:
            return "tl.minimum({a}, {1}, tl.PropagateNan.ALL)"
        return "tl.maximum({a}, {0}, tl.PropagateNan.ALL)" if high is None else "clamp({a}, {0}, {1})"
    if step.op == "cast":
        dtype = step.attrs[0]
        if dtype in ("float32", "float64"):
            return "{a}"
        if dtype in ("bfloat16", "float16"):
            return f"({{a}}).to(tl.{dtype}).to(tl.float32)"
        raise NoExpression(f"no expression for a cast to {dtype}")
    return POINTWISE[step.op]


def _number(value: object) -> str:
    if isinstance(value, (int, float)) and not math.isfinite(value):
        return f'float("{value}")'
    return repr(float(value)) if isinstance(value, (int, float)) else str(value)


_HOLE = re.compile(r"\{(\w)\}")


def _filled(template: str, values: Mapping[str, str]) -> str:
    """The template with operands in place; one that is an expression of its own in brackets where it needs
    them.
    """

    def fill(hole: re.Match[str]) -> str:
        text = values[hole[1]]
        alone = template[: hole.start()].endswith(("(", ", ")) and template[hole.end() :].startswith(
            (")", ",")
        )
        return text if alone or hole[0] == template or _is_simple(text) else f"({text})"

    return _HOLE.sub(fill, template)


def _is_simple(text: str) -> bool:
    """Whether a text is a name, a number or one call."""
    try:
        node = ast.parse(text, mode="eval").body
    except SyntaxError:
        return False
    return isinstance(node, (ast.Name, ast.Constant, ast.Call))


_LIBRARY = (
    "silu",
    "tanh",
    "gelu",
    "gelu_tanh",
    "log1p",
    "expm1",
    "log_sigmoid",
    "softplus",
    "mish",
    "elu",
    "sign",
    "clamp",
)
