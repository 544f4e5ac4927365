"""How a captured program is called: arguments bound as the model binds them, shapes held to what was captured."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from dsmoe_compiler.ir.errors import InputError, ShapeError


@dataclass(frozen=True)
class CallSignature:
    """The model's parameters by name, and which of them the captured call passed by position and by keyword.

    `defaults` holds those of the model's defaults that survive JSON: passing a default explicitly changes nothing.
    """

    names: tuple[str, ...]
    positional: int
    keywords: tuple[str, ...]
    defaults: Mapping[str, Any]

    @staticmethod
    def of_call(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> CallSignature:
        """Of `function` called as function(*args, **kwargs). Raises InputError when it cannot be called so."""
        parameters = inspect.signature(function).parameters
        try:
            inspect.signature(function).bind(*args, **kwargs)
        except TypeError as e:
            raise InputError(f"the example inputs do not fit {getattr(function, '__qualname__', function)}: {e}") from e
        by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        names = tuple(n for n, p in parameters.items() if p.kind in by_position)
        plain = (bool, int, float, str, type(None))
        defaults = {n: p.default for n, p in parameters.items() if isinstance(p.default, plain)}
        return CallSignature(names, len(args), tuple(kwargs), defaults)

    @staticmethod
    def of_exported(program: ExportedProgram) -> CallSignature:
        """Of an exported program, whose inputs keep the names of its graph."""
        spec = program.call_spec.in_spec
        assert spec is not None
        args, kwargs = spec.children()
        users = [str(u) for u in program.graph_signature.user_inputs]
        whole = all(child.is_leaf() for child in args.children())
        names = tuple(users[: args.num_children]) if whole else ()
        return CallSignature(names, args.num_children, tuple(kwargs.context or ()), {})


@dataclass(frozen=True)
class _Leaf:
    """One flat input: its name for messages, and the captured tensor's sizes, dtype and device, or the constant."""

    name: str
    sizes: tuple[sympy.Expr, ...] | None
    dtype: torch.dtype | None
    device: torch.device | None
    constant: object = None


@dataclass(frozen=True)
class Inputs:
    """The inputs a program takes."""

    exported: ExportedProgram
    call: CallSignature

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments in the captured structure. Raises InputError on a missing or surplus one, ShapeError on a
        tensor whose rank, size or dtype was not captured."""
        bound = self._arrange(args, kwargs)
        leaves, spec = pytree.tree_flatten(bound)
        if spec != self._spec:
            raise InputError(f"the arguments have another structure than the captured call: {spec} and {self._spec}")
        checked = self._check(leaves)
        return pytree.tree_unflatten(checked, spec)  # type: ignore[no-any-return]

    def ranges(self) -> dict[str, tuple[int, int | None]]:
        """Of each symbolic size, by its first place ("input_ids[0]"), the smallest and largest valid value."""
        found: dict[str, tuple[int, int | None]] = {}
        for leaf in self._leaves:
            for dim, size in enumerate(leaf.sizes or ()):
                if size.is_Symbol:
                    found.setdefault(f"{leaf.name}[{dim}]", self._range(size))
        return found

    def sizes(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[sympy.Expr, int]:
        """The number each symbolic size has in this call."""
        leaves = pytree.tree_leaves(self.bind(args, kwargs))
        return {
            size: value.shape[dim]
            for leaf, value in zip(self._leaves, leaves, strict=True)
            for dim, size in enumerate(leaf.sizes or ())
            if size.is_Symbol
        }

    def admits(self, symbol: sympy.Expr, size: int) -> bool:
        """Whether a symbolic size may have this number."""
        low, high = self._range(symbol)
        return size >= low and (high is None or size <= high)

    def leaf_sizes(self) -> list[tuple[sympy.Expr, ...] | None]:
        """The captured sizes of every flat input, None for one that is no tensor."""
        return [leaf.sizes for leaf in self._leaves]

    @cached_property
    def _spec(self) -> pytree.TreeSpec:
        assert self.exported.call_spec.in_spec is not None
        return self.exported.call_spec.in_spec

    def _arrange(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        call = self.call
        names = call.names[: call.positional]
        if len(names) < call.positional or len(args) > len(call.names):
            if len(args) != call.positional or set(kwargs) != set(call.keywords):
                raise InputError(f"the program takes {call.positional} arguments and {list(call.keywords)} by name")
            return tuple(args), {k: kwargs[k] for k in call.keywords}
        given = dict(zip(call.names, args, strict=False))
        if twice := sorted(set(given) & set(kwargs)):
            raise InputError(f"argument {twice[0]!r} is given twice")
        given |= kwargs
        captured = [self._take(given, name, i) for i, name in enumerate((*names, *call.keywords))]
        for name, value in given.items():
            if value is not None and not (name in call.defaults and _equal(call.defaults[name], value)):
                raise InputError(
                    f"argument {name!r} was not part of the captured call; compile with an example of it to use it"
                )
        return tuple(captured[: len(names)]), dict(zip(call.keywords, captured[len(names) :], strict=True))

    def _take(self, given: dict[str, Any], name: str, position: int) -> Any:
        if name in given:
            return given.pop(name)
        branches = [*self._spec.child(0).children(), *self._spec.child(1).children()]
        start = sum(b.num_leaves for b in branches[:position])
        leaves = self._leaves[start : start + branches[position].num_leaves]
        if any(leaf.sizes is not None for leaf in leaves):
            raise InputError(f"argument {name!r} is missing")
        return pytree.tree_unflatten([leaf.constant for leaf in leaves], branches[position])

    @cached_property
    def _leaves(self) -> tuple[_Leaf, ...]:
        values = {n.name: n.meta["val"] for n in self.exported.graph.nodes if n.op == "placeholder"}
        specs = [s for s in self.exported.graph_signature.input_specs if s.kind is InputKind.USER_INPUT]
        dummy = pytree.tree_unflatten(list(range(self._spec.num_leaves)), self._spec)
        paths = [path for path, _ in pytree.tree_flatten_with_path(dummy)[0]]
        leaves = []
        for spec, path in zip(specs, paths, strict=True):
            value = values.get(spec.arg.name)
            name = self._leaf_name(path)
            if isinstance(value, Tensor):
                sizes = tuple(_expression(s) for s in value.shape)
                leaves.append(_Leaf(name, sizes, value.dtype, value.device))
            else:
                leaves.append(_Leaf(name, None, None, None, getattr(spec.arg, "value", value)))
        return tuple(leaves)

    def _leaf_name(self, path: tuple[Any, ...]) -> str:
        side, key = path[0].idx, path[1]
        if side == 0:
            position = key.idx
            known = position < len(self.call.names)
            first = self.call.names[position] if known else f"argument {position}"
        else:
            first = str(key.key)
        return first + pytree.keystr(path[2:])

    def _check(self, leaves: list[Any]) -> list[Any]:
        sizes: dict[sympy.Expr, tuple[int, str]] = {}
        checked = [self._check_leaf(leaf, value, sizes) for leaf, value in zip(self._leaves, leaves, strict=True)]
        for leaf, value in zip(self._leaves, leaves, strict=True):
            for dim, size in enumerate(leaf.sizes or ()):
                if not size.is_Symbol and not size.is_Integer and size.free_symbols <= sizes.keys():
                    wanted = int(size.xreplace({s: sympy.Integer(n) for s, (n, _) in sizes.items()}))
                    if value.shape[dim] != wanted:
                        raise ShapeError(f"{leaf.name}: dimension {dim} is {value.shape[dim]}, {wanted} goes with the rest")
        return checked

    def _check_leaf(self, leaf: _Leaf, value: Any, sizes: dict[sympy.Expr, tuple[int, str]]) -> Any:
        if leaf.sizes is None:
            if not _equal(leaf.constant, value):
                raise InputError(f"{leaf.name} is {value!r}; the program was captured for {leaf.constant!r}")
            return leaf.constant
        if not isinstance(value, Tensor):
            raise InputError(f"{leaf.name} is a {type(value).__name__}, the program takes a tensor there")
        if value.dim() != len(leaf.sizes):
            raise ShapeError(f"{leaf.name} has {value.dim()} dimensions, the program takes {len(leaf.sizes)}")
        for dim, size in enumerate(leaf.sizes):
            self._check_size(f"{leaf.name}: dimension {dim}", size, value.shape[dim], sizes)
        if value.dtype != leaf.dtype:
            assert leaf.dtype is not None
            if value.is_floating_point() != leaf.dtype.is_floating_point or value.is_floating_point():
                raise ShapeError(f"{leaf.name} is {value.dtype}, the program takes {leaf.dtype}")
            return value.to(leaf.dtype)
        return value

    def _check_size(self, where: str, size: sympy.Expr, actual: int, sizes: dict[sympy.Expr, tuple[int, str]]) -> None:
        if size.is_Integer:
            if actual != int(size):
                raise ShapeError(f"{where} is {actual}, the program takes {int(size)} only")
        elif size.is_Symbol:
            low, high = self._range(size)
            if actual < low or (high is not None and actual > high):
                upper = "and more" if high is None else f"to {high}"
                raise ShapeError(f"{where} is {actual}, the program takes {low} {upper}")
            known, place = sizes.setdefault(size, (actual, where))
            if known != actual:
                raise ShapeError(f"{where} is {actual}, but {place} is {known} and they are one size")

    def _range(self, symbol: sympy.Expr) -> tuple[int, int | None]:
        bounds = self.exported.range_constraints.get(symbol)  # type: ignore[call-overload]
        if bounds is None:
            return 0, None
        # A lower bound of 2 is what tracing assumes of any size, not what the model needs.
        low = 0 if bounds.lower == 2 else int(max(bounds.lower, 0))
        return low, int(bounds.upper) if bounds.upper.is_Integer else None


def _expression(size: int | torch.SymInt) -> sympy.Expr:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)  # type: ignore[no-any-return]


def _equal(a: object, b: object) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is b
    return type(a) is type(b) and a == b
