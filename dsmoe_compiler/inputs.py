"""How a captured program is called: arguments bound as the model binds them, shapes held to what was
captured.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from dsmoe_compiler.guards import Condition, Dimension, conditions
from dsmoe_compiler.ir.errors import InputError, ShapeError


@dataclass(frozen=True)
class CallSignature:
    """The model's parameters by name, and which of them the captured call passed by position and by keyword.

    `defaults` holds those of the model's defaults that survive JSON: passing a default explicitly changes
    nothing. `exact` says whether "neither 0 nor 1", which tracing assumes of sizes lightly, is held to.
    """

    names: tuple[str, ...]
    positional: int
    keywords: tuple[str, ...]
    defaults: Mapping[str, Any]
    exact: bool = False

    @staticmethod
    def of_call(
        function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> CallSignature:
        """Of `function` called as function(*args, **kwargs). Raises InputError when it cannot be called
        so.
        """
        signature = inspect.signature(function)
        parameters = signature.parameters
        try:
            signature.bind(*args, **kwargs)
        except TypeError as e:
            name = getattr(function, "__qualname__", type(function).__name__)
            raise InputError(f"the example inputs do not fit {name}: {e}") from e
        by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        names = tuple(n for n, p in parameters.items() if p.kind in by_position)
        plain = (bool, int, float, str, type(None))
        defaults = {n: p.default for n, p in parameters.items() if isinstance(p.default, plain)}
        return CallSignature(names, len(args), tuple(kwargs), defaults)

    @staticmethod
    def of_exported(program: ExportedProgram) -> CallSignature:
        """Of an exported program: it knows the parameters it was called with, not those that were left
        out.
        """
        spec = program.call_spec.in_spec
        assert spec is not None
        args, kwargs = spec.children()
        names = _argument_names(program)[: args.num_children]
        return CallSignature(tuple(names), args.num_children, tuple(kwargs.context or ()), {})


@dataclass(frozen=True)
class _Leaf:
    """One flat input: its name for messages and in guards, and the captured tensor's sizes, dtype and
    device, or the constant."""

    name: str
    guarded: str
    sizes: tuple[sympy.Expr, ...] | None
    dtype: torch.dtype | None
    device: torch.device | None
    constant: object = None


_REMEMBERED = 256  # calls' shapes, at most


@dataclass(frozen=True)
class Inputs:
    """The inputs a program takes."""

    exported: ExportedProgram
    call: CallSignature

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments in the captured structure. Raises InputError on a missing or surplus one,
        ShapeError on a tensor whose rank, size or dtype was not captured."""
        return pytree.tree_unflatten(self.flat(args, kwargs), self._spec)  # type: ignore[no-any-return]

    def flat(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """The arguments as the graph takes them, in its order. Raises as `bind` does."""
        bound = _in_order_of(self._spec, self._arrange(args, kwargs))
        leaves, spec = pytree.tree_flatten(bound)
        if spec != self._spec:
            raise InputError(
                f"the arguments have another structure than the captured call: {_shown(spec, self._spec)}"
            )
        return self._check(leaves)

    def ranges(self) -> dict[str, tuple[int, int | None]]:
        """Of each symbolic size, by its first place ("input_ids[0]"), the smallest and largest valid
        value.
        """
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

    def leaf_sizes(self) -> list[tuple[sympy.Expr, ...] | None]:
        """The captured sizes of every flat input, None for one that is no tensor."""
        return [leaf.sizes for leaf in self._leaves]

    def made_up(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A call, where no example is known: ids 0 and 1, numbers about 0, small sizes that differ."""
        generator = torch.Generator().manual_seed(0)
        symbols = sorted(
            {s for leaf in self._leaves for n in leaf.sizes or () for s in n.free_symbols}, key=str
        )
        numbers = {s: sympy.Integer(max(self._range(s)[0], 2 + place)) for place, s in enumerate(symbols)}
        leaves = [
            leaf.constant if leaf.sizes is None else _numbers(leaf, numbers, generator)
            for leaf in self._leaves
        ]
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        return args, kwargs

    def names(self) -> list[str]:
        """What each input that is a tensor is called: its argument's name, then keys and places."""
        return [
            re.sub(r"\['?(.+?)'?\]", r".\1", leaf.name) for leaf in self._leaves if leaf.sizes is not None
        ]

    @property
    def doubtful(self) -> bool:
        """Whether tracing assumed of any size that it is neither 0 nor 1, and this is not held to."""
        held = replace(self, call=replace(self.call, exact=True))
        return len(held._conditions) > len(self._conditions) or held.ranges() != self.ranges()

    @cached_property
    def _spec(self) -> pytree.TreeSpec:
        spec: pytree.TreeSpec | None = self.exported.call_spec.in_spec
        assert spec is not None
        return spec

    def _arrange(
        self, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        call = self.call
        names = call.names[: call.positional]
        if len(names) < call.positional or len(args) > len(call.names):
            if len(args) != call.positional or set(kwargs) != set(call.keywords):
                by_name = f", and {', '.join(call.keywords)} by name" if call.keywords else ""
                raise InputError(
                    f"{len(args)} arguments by position and {len(kwargs)} by name do not fit: the program "
                    f"takes {call.positional} by position{by_name}"
                )
            return tuple(args), {k: kwargs[k] for k in call.keywords}
        given = dict(zip(call.names, args, strict=False))
        if twice := sorted(set(given) & set(kwargs)):
            raise InputError(f"argument {twice[0]!r} is given twice")
        given |= kwargs
        captured = [self._take(given, name, i) for i, name in enumerate((*names, *call.keywords))]
        for name, value in given.items():
            if name not in call.defaults or not _equal(call.defaults[name], value):
                raise InputError(
                    f"argument {name!r} was not part of the captured call; compile with an example of it"
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
            name, guarded = self._leaf_names(path)
            if isinstance(value, Tensor):
                sizes = tuple(_expression(s) for s in value.shape)
                leaves.append(_Leaf(name, guarded, sizes, value.dtype, value.device))
            else:
                leaves.append(_Leaf(name, guarded, None, None, None, getattr(spec.arg, "value", value)))
        return tuple(leaves)

    @cached_property
    def _conditions(self) -> tuple[Condition, ...]:
        names = {leaf.guarded: leaf.name for leaf in self._leaves if leaf.sizes is not None}
        fixed = {
            (leaf.guarded, dim): int(size)
            for leaf in self._leaves
            for dim, size in enumerate(leaf.sizes or ())
            if size.is_Integer
        }
        guards = getattr(self.exported, "_guards_code", ())  # recorded by recent versions of torch
        found = conditions(guards, names, fixed)
        return tuple(c for c in found if self.call.exact or not c.doubtful)

    def _leaf_names(self, path: tuple[Any, ...]) -> tuple[str, str]:
        """A flat input's name for the user and for guards: `d['a']` and `L['d']['a']`."""
        side, key = path[0].idx, path[1]
        known = _argument_names(self.exported)
        if side == 1:
            first = str(key.key)
        else:
            first = known[key.idx] if key.idx < len(known) else f"argument {key.idx}"
        below = pytree.keystr(path[2:])
        surplus = re.fullmatch(r"(.+)_(\d+)", first)
        if surplus and side == 0 and key.idx >= len(self.call.names):  # xs_1 is the second of *xs
            return first + below, f"L['{surplus[1]}'][{surplus[2]}]{below}"
        return first + below, f"L['{first}']{below}"

    def _check(self, leaves: list[Any]) -> list[Any]:
        """The leaves as the graph takes them. What holds of tensors depends on their shapes and dtypes alone,
        so that shapes which have passed are looked up.
        """
        seen = tuple((v.dtype, *v.shape) if isinstance(v, Tensor) else None for v in leaves)
        if any(isinstance(n, torch.SymInt) for each in seen for n in each or ()):  # being traced
            return self._checked(leaves)
        if seen in self._passed:
            return [
                value if leaf.sizes is not None else self._check_leaf(leaf, value, {})
                for leaf, value in zip(self._leaves, leaves, strict=True)
            ]
        checked = self._checked(leaves)
        if all(a is b for a, b in zip(checked, leaves, strict=True) if isinstance(b, Tensor)):
            if len(self._passed) >= _REMEMBERED:
                self._passed.clear()
            self._passed.add(seen)
        return checked

    @cached_property
    def _passed(self) -> set[tuple[tuple[Any, ...] | None, ...]]:
        """Each input's dtype and sizes (None of one that is no tensor) in calls that passed."""
        return set()

    def _checked(self, leaves: list[Any]) -> list[Any]:
        sizes: dict[sympy.Expr, tuple[int, str]] = {}
        checked = [
            self._check_leaf(leaf, value, sizes) for leaf, value in zip(self._leaves, leaves, strict=True)
        ]
        numbers = {symbol: sympy.Integer(n) for symbol, (n, _) in sizes.items()}
        for leaf, value in zip(self._leaves, leaves, strict=True):
            for dim, size in enumerate(leaf.sizes or ()):
                if not size.is_Symbol and not size.is_Integer and size.free_symbols <= sizes.keys():
                    wanted = int(size.xreplace(numbers))
                    if value.shape[dim] != wanted:
                        found = f"{leaf.name}: dimension {dim} is {value.shape[dim]}"
                        raise ShapeError(f"{found}, with the other inputs' sizes it must be {wanted}")
        self._check_conditions(leaves)
        return checked

    def _check_conditions(self, leaves: list[Any]) -> None:
        """What the model's own branches assumed of the sizes when it was captured."""
        sizes: dict[Dimension, int] = {}
        for leaf, value in zip(self._leaves, leaves, strict=True):
            if leaf.sizes is not None:
                sizes |= {(leaf.guarded, dim): n for dim, n in enumerate(value.shape)}
        for condition in self._conditions:
            if not condition.holds(sizes):
                places = {leaf.guarded: leaf.name for leaf in self._leaves}
                name, dim = condition.sizes[0]
                raise ShapeError(
                    f"{places[name]}: dimension {dim} is {sizes[name, dim]}, the program takes sizes with "
                    f"{condition.text} only"
                )

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

    def _check_size(
        self, where: str, size: sympy.Expr, actual: int, sizes: dict[sympy.Expr, tuple[int, str]]
    ) -> None:
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
        bounds = self.exported.range_constraints.get(symbol)
        if bounds is None:
            return 0, None
        low = 0 if bounds.lower == 2 and not self.call.exact else int(max(bounds.lower, 0))
        return low, int(bounds.upper) if bounds.upper.is_Integer else None


def _numbers(leaf: _Leaf, sizes: Mapping[sympy.Expr, sympy.Expr], generator: torch.Generator) -> Tensor:
    """A tensor for an input, at these sizes."""
    shape = [int(size.xreplace(sizes)) for size in leaf.sizes or ()]
    assert leaf.dtype is not None
    made = (
        torch.randn(shape, generator=generator)
        if leaf.dtype.is_floating_point
        else torch.randint(2, shape, generator=generator)
    )
    return made.to(leaf.dtype).to(leaf.device)


def _argument_names(program: ExportedProgram) -> list[str]:
    """The model's names of the arguments of the captured call, positional ones first."""
    signature = program.module_call_graph[0].signature
    return list(signature.forward_arg_names or ()) if signature is not None else []


def _in_order_of(spec: pytree.TreeSpec, value: Any) -> Any:
    """The same value with the keys of its dicts in the captured order."""
    if spec.type is dict and type(value) is dict and value.keys() == set(spec.context):
        return {
            k: _in_order_of(child, value[k]) for k, child in zip(spec.context, spec.children(), strict=True)
        }
    if spec.type in (tuple, list) and type(value) is spec.type and len(value) == spec.num_children:
        return spec.type(_in_order_of(child, v) for child, v in zip(spec.children(), value, strict=True))
    return value


def _shown(given: pytree.TreeSpec, captured: pytree.TreeSpec) -> str:
    """Two structures on one line, tensors as dots."""
    dots = (
        str(pytree.tree_unflatten(["…"] * s.num_leaves, s)).replace("'…'", "…") for s in (given, captured)
    )
    return " instead of ".join(dots)


def _expression(size: int | torch.SymInt) -> sympy.Expr:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def _equal(a: object, b: object) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is b
    return type(a) is type(b) and a == b
