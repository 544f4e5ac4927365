"""Pointwise terms over columns of products and experts' vectors: what a kernel applies to its block of
numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dsmoe_compiler.ir.body import Attr


@dataclass(frozen=True)
class Product:
    """The outputs `first`, `first + step`, … of a tensor's matrices times the row; (in, out) where
    transposed.
    """

    param: int
    transposed: bool
    first: int = 0
    step: int = 1


@dataclass(frozen=True)
class Vector:
    """Each expert's numbers `first`, `first + step`, … of a tensor; one number for all columns where
    `single`.
    """

    param: int
    first: int = 0
    step: int = 1
    single: bool = False


@dataclass(frozen=True)
class Step:
    """One line of a term: an operator of bodies on earlier lines, or a leaf: "product" (attrs: which),
    "vector" (attrs: which), "const" (attrs: the number), "w".
    """

    op: str
    args: tuple[int, ...] = ()
    attrs: tuple[Attr, ...] = ()


@dataclass
class Term:
    """A pointwise term in value-numbered form: the last line but those nobody reads is the result."""

    products: list[Product] = field(default_factory=list)
    vectors: list[Vector] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    result: int = -1

    def number(self, op: str, args: tuple[int, ...] = (), attrs: tuple[Attr, ...] = ()) -> int:
        """The line `op(*args, *attrs)`, made when it is new."""
        step = Step(op, args, attrs)
        if step not in self.steps:
            self.steps.append(step)
        return self.steps.index(step)

    @property
    def weighs(self) -> bool:
        """Whether the routing weight occurs."""
        return any(s.op == "w" for s in self.steps)
