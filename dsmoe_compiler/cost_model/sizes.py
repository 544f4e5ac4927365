"""The numbers that a graph's symbolic sizes have at a batch and a length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from dsmoe_compiler.inputs import CallSignature, Inputs
from dsmoe_compiler.ir.errors import InputError

USUAL_LENGTH = 4096
LARGEST = 2**62  # bytes; torch's sizes and strides are of 64 bits, one of them the sign


class OfData(Exception):
    """A size is read from a tensor's values: no batch and length say what it is."""


@dataclass(frozen=True)
class Sizes:
    """`batch` sequences of `length` tokens, and what number each symbol of the graph then is.

    `kept` names the sizes that stayed as they were captured: "mask[2] is 7".
    """

    batch: int
    length: int
    numbers: Mapping[sympy.Expr, int]
    kept: tuple[str, ...] = ()
    _known: dict[sympy.Expr, Any] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def _integers(self) -> dict[sympy.Expr, sympy.Integer]:
        return {symbol: sympy.Integer(number) for symbol, number in self.numbers.items()}

    @property
    def tokens(self) -> int:
        """T of one forward."""
        return self.batch * self.length

    def number(self, size: Any) -> Any:
        """A recorded size, number or truth value as Python's own. Raises OfData."""
        if not isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return size
        expression = size.node.expr
        if expression not in self._known:
            self._known[expression] = _python(expression.xreplace(self._integers))
        return self._known[expression]

    def on_meta(self, tensor: Tensor) -> Tensor:
        """A tensor of the meta device that lies as a recorded one does. Raises OfData, and InputError where
        that is larger than tensors can be.
        """
        shape, strides = ([self.number(s) for s in sizes] for sizes in (tensor.shape, tensor.stride()))
        last = sum(max(size - 1, 0) * stride for size, stride in zip(shape, strides, strict=True))
        if max(last, *shape, 0) * tensor.element_size() > LARGEST:
            raise InputError(
                f"{self.batch} x {self.length} tokens are more than tensors can hold: give fewer or shorter "
                "sequences"
            )
        return torch.empty_strided(shape, strides, dtype=tensor.dtype, device="meta")


def sizes_at(exported: ExportedProgram, batch: int, length: int | None = None) -> Sizes:
    """The sizes of a forward of `batch` sequences of `length` tokens; None: 4096, or the most there can be.

    Ids (B, L), or rows (B, L, D), say which sizes are the batch and the length, without them the first two
    of what has four or more, as images do; where all inputs are rows (T, D), T is batch · length. A size that
    capture fixed stays as it is, and so does one that is neither.
    Raises ShapeError where the program takes no such sizes, InputError where no tensor is so large.
    """
    leaves = _leaves(exported)
    numbers, kept = dict[sympy.Expr, int](), list[str]()
    longest = USUAL_LENGTH if length is None else length
    first = next((leaf for leaf in leaves if leaf.holds_ids), None) or next(
        (leaf for leaf in leaves if len(leaf.sizes) > 2), None
    )
    if first is not None:
        if length is None:
            longest = min([longest, *(_most(exported, size) for leaf in leaves for size in leaf.sizes[1:])])
        for what, size in zip(("batch", "length"), first.sizes[:2], strict=True):
            if size.is_Integer:
                kept.append(f"the {what} is {size}")
        batch, longest = _or_fixed(first.sizes[0], batch), _or_fixed(first.sizes[1], longest)
        # Images have sizes of their own; beside ids or rows, what has four is a mask.
        tokens_end = 2 if len(first.sizes) > 3 else max(len(leaf.sizes) for leaf in leaves)
        for leaf in (first, *leaves):
            for dim, size in enumerate(leaf.sizes):
                if size.is_Symbol and len(leaf.sizes) > 1 and dim != leaf.width and dim < tokens_end:
                    numbers.setdefault(size, longest if dim else batch)
    elif leaves and leaves[0].sizes:
        rows = leaves[0].sizes[0]
        if not rows.is_Symbol:
            batch, longest = 1, int(rows)
            kept.append(f"there are {rows} tokens")
        for leaf in leaves:
            if leaf.sizes and leaf.sizes[0].is_Symbol:
                numbers.setdefault(leaf.sizes[0], batch * longest)
    for leaf in leaves:
        for dim, size in enumerate(leaf.sizes):
            if size.is_Symbol and size not in numbers:
                numbers[size] = leaf.example[dim]
                kept.append(f"{leaf.name}[{dim}] is {leaf.example[dim]}")
    sizes = Sizes(batch, longest, numbers, tuple(kept))
    _require_fit(exported, sizes)
    return sizes


@dataclass(frozen=True)
class _Leaf:
    """A tensor that the caller gives: its sizes as expressions, and those of the example."""

    name: str
    sizes: tuple[sympy.Expr, ...]
    example: tuple[int, ...]
    dtype: torch.dtype

    @property
    def width(self) -> int | None:
        """The dimension of rows (B, L, D) that is not a number of anything; None of other tensors."""
        return 2 if len(self.sizes) == 3 and self.dtype.is_floating_point else None

    @property
    def holds_ids(self) -> bool:
        """Whether it can be tokens' ids, (B, L)."""
        return len(self.sizes) == 2 and self.dtype in (torch.int64, torch.int32)


def _leaves(exported: ExportedProgram) -> list[_Leaf]:
    given = {s.arg.name for s in exported.graph_signature.input_specs if s.kind is InputKind.USER_INPUT}
    found = []
    for node in exported.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and node.name in given and isinstance(value, Tensor):
            sizes = tuple(
                s.node.expr if isinstance(s, torch.SymInt) else sympy.Integer(s) for s in value.shape
            )
            found.append(_Leaf(node.name, sizes, tuple(map(_example, value.shape)), value.dtype))
    return found


def _example(size: int | torch.SymInt) -> int:
    """The number that capture traced a size at; of a program from a file, which keeps none, 2."""
    if not isinstance(size, torch.SymInt):
        return size
    return int(size.node.hint) if size.node.hint is not None else 2


def _or_fixed(size: sympy.Expr, wanted: int) -> int:
    return int(size) if size.is_Integer else wanted


def _most(exported: ExportedProgram, size: sympy.Expr) -> int:
    bounds = exported.range_constraints.get(size)
    return int(bounds.upper) if bounds is not None and bounds.upper.is_Integer else USUAL_LENGTH


def _require_fit(exported: ExportedProgram, sizes: Sizes) -> None:
    """Raise ShapeError unless a program may be called with tensors of these sizes."""
    spec: pytree.TreeSpec | None = exported.call_spec.in_spec
    assert spec is not None
    values = {node.name: node.meta.get("val") for node in exported.graph.nodes if node.op == "placeholder"}
    leaves = []
    for each in exported.graph_signature.input_specs:
        if each.kind is InputKind.USER_INPUT:
            value = values.get(each.arg.name)
            leaves.append(
                sizes.on_meta(value) if isinstance(value, Tensor) else getattr(each.arg, "value", value)
            )
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    Inputs(exported, CallSignature.of_exported(exported)).flat(args, kwargs)


def _python(value: sympy.Basic) -> Any:
    """A sympy number or truth value as Python's."""
    if value.is_Boolean:
        return bool(value)
    if value.free_symbols:
        raise OfData(str(value))
    return int(value) if value.is_integer else float(value)
