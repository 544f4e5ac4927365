"""A body as the kernels run it: products with the row, a term of their columns, a product, a term of its
columns.

    h=linear(x,p0); mul(linear(mul(silu(slice(h,0,F,1)),slice(h,F,2*F,1)),p1),w)

becomes: products `gate` (outputs 0 … F of p0) and `up` (outputs F … 2F), middle term silu(gate) · up, down
product with p1, last term down · w. A slice of a product is another product; what is applied before a slice
is applied after it. Bodies of any other shape run by the reference, and `Unsupported` says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dsmoe_compiler.codegen.operand import Operand
from dsmoe_compiler.codegen.pointwise import POINTWISE
from dsmoe_compiler.codegen.term import Product, Term, Vector
from dsmoe_compiler.ir.body import ACTIVATIONS, GEMMS, Body


class Unsupported(Exception):
    """There is no kernel for this layer; the message says what it would have to do."""


@dataclass(frozen=True)
class Ffn:
    """A body in the kernels' form. `width` is F; x is first multiplied by `factor`, a term of its routing
    weight, where there is one.
    """

    hidden: int
    width: int
    middle: Term
    down: Product
    last: Term
    factor: Term | None

    @property
    def products(self) -> list[Product]:
        """The products with the row."""
        return self.middle.products

    @property
    def is_weighted(self) -> bool:
        """Whether the last term is down · w and nothing else."""
        return [s.op for s in self.last.steps] in (["product", "w", "mul"], ["w", "product", "mul"])


@dataclass(frozen=True)
class _Columns:
    """Which of a row's columns are asked for."""

    first: int
    step: int
    count: int


def as_ffn(body: Body, hidden: int, params: Sequence[Operand]) -> Ffn:
    """The body in the kernels' form; `params` are its tensors, the experts first. Raises Unsupported."""
    widths = row_widths(body, hidden, params)
    last = Term()
    whole = _Columns(0, 1, widths[body.result])
    reader = _Reader(body, widths, last, whole.count)
    last.result = reader.read(body.result, whole)
    if len(reader.products) != 1:
        raise Unsupported("it has no single last product" if reader.products else "it has no product")
    ((at, columns),) = reader.products
    if columns != _Columns(0, 1, widths[at]):
        raise Unsupported("its last product is read in part")
    step = body.steps[at]
    down = Product(_param(body, step.args[1]), step.op == "matmul")
    middle = Term()
    row = step.args[0]
    inner = _Reader(body, widths, middle, widths[row])
    if _under_casts(body, row) == "x":
        raise Unsupported("it has one product only")
    middle.result = inner.read(row, _Columns(0, 1, widths[row]))
    if not inner.products:
        raise Unsupported("its hidden row is no product")
    inputs = {body.steps[at].args[0] for at, _ in inner.products}
    if len(inputs) > 1:
        raise Unsupported("its first products read different rows")
    factor = _factor(body, inputs.pop(), widths)
    for at, columns in inner.products:
        first = body.steps[at]
        part = Product(_param(body, first.args[1]), first.op == "matmul", columns.first, columns.step)
        middle.products.append(part)
    _require_pair(middle.products, params)
    _put_gate_first(middle)
    last.products.append(down)
    return Ffn(hidden, widths[row], middle, down, last, factor)


class _Reader:
    """Reads a body from a step down to the products under it, as a term of the columns asked for, `count` of
    them.
    """

    def __init__(self, body: Body, widths: Sequence[int], term: Term, count: int) -> None:
        self.body, self.widths, self.term, self.count = body, widths, term, count
        self.products: list[tuple[int, _Columns]] = []

    def read(self, at: int, columns: _Columns) -> int:
        """The number of the term's line that is these columns of a step."""
        step = self.body.steps[at]
        term = self.term
        if step.op in GEMMS:
            if columns.count != self.count:
                raise Unsupported("one number of a product stands for a whole row")
            if (at, columns) not in self.products:
                self.products.append((at, columns))
            return term.number("product", (), (self.products.index((at, columns)),))
        if step.op == "w":
            return term.number("w")
        if step.op == "const":
            return term.number("const", (), step.attrs)
        if step.op == "p":
            return self._vector(int(step.attrs[0] or 0), columns)
        if step.op == "slice":
            start, stop, stride = (None if a is None else int(a) for a in step.attrs)
            of = range(self.widths[step.args[0]])[start:stop:stride]
            return self.read(
                step.args[0],
                replace(columns, first=of.start + columns.first * of.step, step=columns.step * of.step),
            )
        if step.op == "glu":
            half = self.widths[step.args[0]] // 2
            value = self.read(step.args[0], columns)
            gate = self.read(step.args[0], replace(columns, first=columns.first + half))
            return term.number("mul", (value, term.number("sigmoid", (gate,))))
        if step.op == "expand":
            return self._operand(step.args[0], columns)
        if step.op == "x":
            raise Unsupported("it reads x beside its products")
        if step.op not in POINTWISE:
            raise Unsupported(f"`{step.op}` joins the numbers of a row")
        return term.number(step.op, tuple(self._operand(a, columns) for a in step.args), step.attrs)

    def _operand(self, at: int, columns: _Columns) -> int:
        """An operand's line; one number stands for every column."""
        single = self.widths[at] == 1
        return self.read(at, _Columns(0, 1, 1) if single else columns)

    def _vector(self, param: int, columns: _Columns) -> int:
        vector = Vector(param, columns.first, columns.step, single=columns.count == 1)
        if vector not in self.term.vectors:
            self.term.vectors.append(vector)
        return self.term.number("vector", (), (self.term.vectors.index(vector),))


def _param(body: Body, at: int) -> int:
    """Which tensor a product's matrices are. Raises Unsupported."""
    step = body.steps[at]
    if step.op != "p":
        raise Unsupported("a product's matrix is computed from an expert's tensors")
    return int(step.attrs[0] or 0)


def _factor(body: Body, at: int, widths: Sequence[int]) -> Term | None:
    """What x is multiplied by before the products: a term of the routing weight, or None where it is x
    itself. Raises Unsupported for anything else.
    """
    step = body.steps[at]
    while step.op == "cast":
        step = body.steps[step.args[0]]
    if step.op == "x":
        return None
    others = [a for a in step.args if _under_casts(body, a) != "x"]
    if step.op != "mul" or len(others) != 1 or widths[others[0]] != 1:
        raise Unsupported("its first product reads something computed from x")
    factor = Term()
    reader = _Reader(body, widths, factor, 1)
    factor.result = reader.read(others[0], _Columns(0, 1, 1))
    if reader.products or factor.vectors:
        raise Unsupported("x is multiplied by more than a term of its routing weight")
    return factor


def _under_casts(body: Body, at: int) -> str:
    while body.steps[at].op == "cast":
        at = body.steps[at].args[0]
    return body.steps[at].op


def row_widths(body: Body, hidden: int, params: Sequence[Operand]) -> list[int]:
    """How many numbers each step's row has; 1 where it is one number for all columns."""
    widths = list[int]()
    for step in body.steps:
        args = [widths[a] for a in step.args]
        if step.op == "x":
            width = hidden
        elif step.op == "p":
            tail = params[int(step.attrs[0] or 0)].shape[1:]
            width = tail[-1] if tail else 1
        elif step.op in GEMMS:
            matrix = params[_param(body, step.args[1])].shape
            if len(matrix) != 3:
                raise Unsupported("a product's matrix has no rows and columns")
            width = matrix[1] if step.op == "linear" else matrix[2]
        elif step.op == "slice":
            start, stop, stride = (int(a or 0) for a in step.attrs)
            width = len(range(args[0])[start : stop if step.attrs[1] is not None else None : stride])
        elif step.op == "glu":
            width = args[0] // 2
        elif step.op == "expand":
            width = int(step.attrs[0] or 0)
        else:
            width = max(args, default=1)
        widths.append(width)
    return widths


def _require_pair(products: Sequence[Product], params: Sequence[Operand]) -> None:
    """One product, or a gate and an up product that lie alike. Raises Unsupported."""
    lying = {(p.transposed, p.step, params[p.param].strides, params[p.param].shape) for p in products}
    if len(products) > 2 or len(lying) > 1:
        raise Unsupported("its first products are more than a gate and an up projection that lie alike")
    steps = {p.step for p in products}
    if steps == {2}:
        if len(products) < 2 or len({p.param for p in products}) > 1 or {p.first for p in products} != {0, 1}:
            raise Unsupported("its first products read every other output, but not as gate and up")
    elif steps != {1}:
        raise Unsupported(f"its first products read every {steps.pop()}th output")


def _put_gate_first(term: Term) -> None:
    """Of two products, the one that an activation is applied to comes first."""
    if len(term.products) == 2 and _activated(term) == {1}:
        term.products.reverse()
        swapped = {0: 1, 1: 0}
        for i, step in enumerate(term.steps):
            if step.op == "product":
                term.steps[i] = replace(step, attrs=(swapped[int(step.attrs[0] or 0)],))


def _activated(term: Term) -> set[int]:
    """The products under an activation."""
    under = list[set[int]]()
    for step in term.steps:
        below = set().union(*(under[a] for a in step.args))
        under.append({int(step.attrs[0] or 0)} if step.op == "product" else below)
    return set().union(*(under[i] for i, s in enumerate(term.steps) if s.op in ACTIVATIONS))
