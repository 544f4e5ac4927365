"""Experts' bodies that onnxruntime's `com.microsoft::MoE` has kernels for, and what those have to be told.

A kernel computes, of one row and one expert, with its products' biases where there are any:

    swiglu:    down( g · sigmoid(alpha · g) · (u + beta) ),  g = min(gate(x), limit),  u = up(x) in ±limit
    otherwise: down( activation(first(x)) )

The routing weight multiplies a kernel's output; one that multiplies x can be put there by whoever calls it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from dsmoe_compiler.codegen.ffn import Ffn, Unsupported, as_ffn
from dsmoe_compiler.codegen.operand import Operand
from dsmoe_compiler.codegen.term import Product, Step, Term, Vector
from dsmoe_compiler.ir.spec import ExpertsSpec

Weighs = Literal["output", "x", "nothing"]


class NotExpressible(Exception):
    """Why no kernel of onnxruntime's computes a layer: one line."""


@dataclass(frozen=True)
class Linear:
    """Rows of every expert's matrix, and those numbers of its bias."""

    product: Product
    bias: Vector | None


@dataclass(frozen=True)
class Activation:
    """The middle of a body: `first` is one product, or gate and up. `op` is onnxruntime's name for it."""

    op: str
    first: tuple[Linear, ...]
    alpha: float = 1.0
    beta: float = 0.0
    limit: float = math.inf


@dataclass(frozen=True)
class KernelFfn:
    """A body as a kernel computes it. `width` is F, `weighs` what the routing weight multiplies."""

    middle: Activation
    down: Linear
    width: int
    weighs: Weighs


def kernel_ffn(spec: ExpertsSpec, shapes: Sequence[Sequence[int]]) -> KernelFfn:
    """The body as a kernel computes it; `shapes` are its tensors', E first. Raises NotExpressible."""
    operands = [Operand(tuple(s), _strides(s), "float32") for s in shapes]
    try:
        ffn = as_ffn(spec.body, spec.hidden, operands)
    except Unsupported as e:
        raise NotExpressible(str(e)) from None
    weighs = _weighs(ffn)
    middle, last = _Reader(ffn.middle, shapes), _Reader(ffn.last, shapes)
    outputs = [at for at in last.factors(ffn.last.result) if ffn.last.steps[at].op != "w"]
    down = last.linear(outputs[0]) if len(outputs) == 1 else None
    if down is None:
        raise NotExpressible("its output is more than a product, a bias and the routing weight")
    product = down.product
    if shapes[product.param][2 if product.transposed else 1] != spec.hidden:
        raise NotExpressible("its output is not as wide as its input")
    activation = _gated(middle) if len(ffn.products) == 2 else _plain(middle)
    return KernelFfn(activation, down, ffn.width, weighs)


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    """How numbers of this shape lie in whole memory."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _weighs(ffn: Ffn) -> Weighs:
    """What the routing weight multiplies. Raises NotExpressible."""
    weights = [op for op in _used(ffn.last) if op == "w"]
    if ffn.middle.weighs or len(weights) > 1:
        raise NotExpressible("the routing weight does not only multiply the output")
    if ffn.factor is None:
        return "output" if weights else "nothing"
    if weights or set(_used(ffn.factor)) - {"cast"} != {"w"}:
        raise NotExpressible("x is multiplied by more than the routing weight")
    return "x"


def _used(term: Term) -> Iterator[str]:
    """The operators under a term's result."""
    stack = [term.result]
    while stack:
        step = term.steps[stack.pop()]
        yield step.op
        stack.extend(step.args)


def _gated(middle: _Reader) -> Activation:
    """gate · sigmoid(alpha · gate) · (up + beta). Raises NotExpressible."""
    gate_at, alpha, others = middle.swish()
    if gate_at is None or len(others) != 1:
        raise NotExpressible("onnxruntime has no kernel for its gating")
    up_at, beta = middle.with_number("add", others[0], 0.0)
    up_at, least, most = middle.clamped(up_at)
    gate_at, least_gate, limit = middle.clamped(gate_at)
    if least_gate != -math.inf or (least, most) != (-limit, limit):
        raise NotExpressible("onnxruntime clamps gate and up with one limit, the gate from above only")
    gate, up = middle.linear(gate_at), middle.linear(up_at)
    if gate is None or up is None:
        raise NotExpressible("onnxruntime has no kernel for its gating")
    if (gate.bias is None) != (up.bias is None):
        raise NotExpressible("only one of gate and up has a bias")
    return Activation("swiglu", (gate, up), alpha, beta, limit)


def _plain(middle: _Reader) -> Activation:
    """An activation of one product. Raises NotExpressible."""
    factors = middle.factors(middle.term.result)
    step = middle.step(factors[0])
    gate_at, alpha, others = middle.swish()
    if gate_at is not None and not others and alpha == 1:
        op, inner = "silu", gate_at
    elif step.op == "relu" and len(factors) == 1:
        op, inner = "relu", step.args[0]
    else:
        op, inner = "identity", factors[0]
    first = middle.linear(inner) if op == "silu" or len(factors) == 1 else None
    if first is None:
        raise NotExpressible("onnxruntime has no kernel for its activation")
    return Activation(op, (first,))


class _Reader:
    """Reads a term of float32 numbers, in which a cast to float32 does nothing."""

    def __init__(self, term: Term, shapes: Sequence[Sequence[int]]) -> None:
        self.term, self.shapes = term, shapes

    def under_casts(self, at: int) -> int:
        """The line that a line is, or is a cast of. Raises NotExpressible where numbers are rounded."""
        while (step := self.term.steps[at]).op == "cast":
            if step.attrs != ("float32",):
                raise NotExpressible(f"it casts to {step.attrs[0]}")
            at = step.args[0]
        return at

    def step(self, at: int) -> Step:
        return self.term.steps[self.under_casts(at)]

    def factors(self, at: int) -> list[int]:
        """The lines that are multiplied."""
        at = self.under_casts(at)
        step = self.term.steps[at]
        return [f for a in step.args for f in self.factors(a)] if step.op == "mul" else [at]

    def swish(self) -> tuple[int | None, float, list[int]]:
        """The gate and alpha of gate · sigmoid(alpha · gate) among the result's factors, and the others."""
        factors = self.factors(self.term.result)
        for at in factors:
            step, others = self.step(at), list(factors)
            others.remove(at)
            if step.op == "silu":
                return self.under_casts(step.args[0]), 1.0, others
            if step.op == "sigmoid":
                gate, alpha = self.with_number("mul", step.args[0], 1.0)
                if gate in others:
                    others.remove(gate)
                    return gate, alpha, others
        return None, 1.0, factors

    def with_number(self, op: str, at: int, without: float) -> tuple[int, float]:
        """`op(a, number)` as a and the number; anything else as itself and `without`."""
        step = self.step(at)
        if step.op == op:
            for a, b in (step.args, step.args[::-1]):
                other = self.step(b)
                if other.op == "const":
                    return self.under_casts(a), float(other.attrs[0] or 0)
        return self.under_casts(at), without

    def clamped(self, at: int) -> tuple[int, float, float]:
        """What is clamped, and between what."""
        step = self.step(at)
        if step.op == "clamp":
            least, most = step.attrs
            return (
                self.under_casts(step.args[0]),
                -math.inf if least is None else float(least),
                math.inf if most is None else float(most),
            )
        at, most_too = self.with_number("minimum", at, math.inf)
        return at, -math.inf, most_too

    def linear(self, at: int) -> Linear | None:
        """A product, or the sum of one and its bias."""
        step = self.step(at)
        if step.op == "product":
            return Linear(self._product(step), None)
        if step.op != "add":
            return None
        a, b = (self.step(arg) for arg in step.args)
        product, vector = (a, b) if a.op == "product" else (b, a)
        if (product.op, vector.op) != ("product", "vector"):
            return None
        bias = self.term.vectors[int(vector.attrs[0] or 0)]
        known = not bias.single and len(self.shapes[bias.param]) == 2
        return Linear(self._product(product), bias) if known else None

    def _product(self, step: Step) -> Product:
        return self.term.products[int(step.attrs[0] or 0)]
