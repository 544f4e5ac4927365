"""Python control flow over a tensor's values, traced without touching the code that holds it.

torch.export stops where Python needs to know a value: a loop over the experts that were hit, a count moved to
the host, a branch on "has any token". While `Unrolling` is entered, such places are traced as they behave
for an expert that has tokens, and what that takes for granted is written down as an `Assumption`:

    for e in hit.nonzero(): …            every index is visited, in order      VISITS
    for e in torch.unique(ids): …        the same, up to what ids can be       VISITS
    torch.bincount(ids)                  a count for every class               CLASSES
    counts.tolist(), .cpu().numpy()      one symbolic size each                COUNTS
    if mask.any(): …                     the expert has tokens                 TOKENS
    if n == 0: continue                  the expert has tokens                 TOKENS
    rows[start:end]                      0 <= start <= end <= len(rows)        WITHIN
    sizes that depend on data meet       they are equal, and none is 1         SIZES
    weights[e], e a class too many       no token selects the last class       SENTINEL

An assumption is about the user's code, so it can be false: whoever captures has to replay the graph against
the model on routings where it would show. Names formatted from an index and a static `bincount` are taken as
well; these assume nothing. Questions about sizes are answered in `sizes.py`.

Nothing outside the current thread and the traced program is changed: a function mode is thread-local, the
oracle of `sizes.py` is set on the one ShapeEnv in use, conversions on the one model's modules.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from types import CodeType
from typing import Any, TypeAlias, TypeVar, cast

import sympy
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._sympy.symbol import SymT, symbol_is_type
from torch.utils.weak import WeakIdKeyDictionary

from dsmoe_compiler.ir.graph import depends_on_data
from dsmoe_compiler.tracing.assumption import (
    CLASSES,
    COUNTS,
    SENTINEL,
    SIZES,
    TOKENS,
    VISITS,
    WITHIN,
    Assumption,
)
from dsmoe_compiler.tracing.frames import callers_of_number, user_line

Function: TypeAlias = Callable[..., Any]
_Fact = TypeVar("_Fact")
_OfTensors: TypeAlias = MutableMapping[Tensor, _Fact]

# Functions whose results follow from a known tensor: all that code does with a list of hit experts.
_FOLLOWS = frozenset(
    {
        *("__getitem__", "unbind", "squeeze", "unsqueeze", "flatten", "view", "reshape", "ravel", "select"),
        *("to", "cpu", "cuda", "int", "long", "detach", "contiguous", "clone", "type", "split", "chunk"),
        *("tolist", "item", "numpy", "unique", "sort", "__len__", "__int__", "__index__"),
    }
)
_SAME_NUMBERS = frozenset(
    {
        *("to", "cpu", "int", "long", "detach", "contiguous", "clone", "view", "reshape", "flatten", "ravel"),
        *("squeeze", "unsqueeze", "select", "__getitem__", "item"),
    }
)
_MOVES = frozenset({"t", "transpose", "permute", "expand", "scatter_", "scatter"})
# Functions that pick entries of a floating tensor.
_SELECTS = frozenset(
    {"topk", "argmax", "argmin", "max", "min", "sort", "argsort", "kthvalue", "median", "mode", "multinomial"}
)
# Functions that find where a mask is true, and the first argument that may be the mask: what is picked from
# says nothing of how much is picked.
_FINDS = {"nonzero": 0, "where": 0, "argwhere": 0, "__getitem__": 1, "masked_select": 1}
_TO_FLOATS = frozenset({"float", "half", "double", "bfloat16", "type", "type_as", "histc", "sum"})


class Unrolling(TorchFunctionMode):
    """Enter it around the forward while torch.export traces; `assumed` then lists what it took for granted.

    With `skip_last`, loops over hit indices leave out the last: the class of dropped tokens, for which a
    model may have no weights.
    """

    def __init__(self, skip_last: bool = False) -> None:
        super().__init__()
        self.skip_last = skip_last
        self.asks_value = False
        # Functions of the user's that want a number where a symbol would do.
        self.baked = set[CodeType]()
        self._assumed: dict[Assumption, None] = {}
        self._known: _OfTensors[Tensor] = WeakIdKeyDictionary()  # its values, on the CPU
        # Sizes that say how many tokens an expert has: of what masks of pairs find, of counts read.
        self.routed = set[sympy.Symbol]()
        self._routing: _OfTensors[bool] = WeakIdKeyDictionary()  # whether it says who chose whom
        self._flags: _OfTensors[bool] = WeakIdKeyDictionary()  # whether its numbers are 0 and 1
        self._ends: _OfTensors[bool] = WeakIdKeyDictionary()  # whether its numbers are running sums of counts
        self._before: _OfTensors[Tensor | None] = WeakIdKeyDictionary()  # of a running sum, the one before it
        self._read: _OfTensors[Any] = WeakIdKeyDictionary()  # of a running sum, the number it was read into
        self._counts: _OfTensors[bool] = WeakIdKeyDictionary()  # whether its numbers count something
        self._widths: _OfTensors[int] = WeakIdKeyDictionary()  # how many classes its ids are chosen from
        self._branches: _OfTensors[bool] = WeakIdKeyDictionary()  # what it is where an expert has tokens

    @property
    def assumed(self) -> tuple[Assumption, ...]:
        """In the order they were met, each once."""
        return tuple(self._assumed)

    def assume(self, text: str) -> None:
        """Write down an assumption about the line of the user's code that runs now."""
        self._assumed[Assumption(text, user_line())] = None

    def __torch_function__(
        self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        tensor = args[0] if args and isinstance(args[0], Tensor) else None
        result = self._called(func, name, tensor, args, kwargs)
        self._follow_routing(name, args, kwargs, result)
        return result

    def _called(
        self, func: Function, name: str, tensor: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """What the function gives, or what is given in its stead."""
        if tensor is None:
            made = func(*args, **kwargs)
            if name == "zeros" and isinstance(made, Tensor) and not made.is_floating_point():
                self._flags[made] = True
            return made
        if name in _FOLLOWS and tensor in self._known:
            return self._follow(func, name, tensor, args[1:], kwargs)
        answer = self._answer(name, tensor, args, kwargs)
        if answer is not None:
            return answer[0]
        if name == "__bool__":
            return self._value(func, tensor)
        if (name == "__int__" and _constant(tensor) is None) or (name == "__len__" and _is_unknown(tensor)):
            self.baked.update(callers_of_number())  # Python wants a number; it may do with a symbol
        result = func(*args, **kwargs)
        self._learn(name, tensor, args, result)
        return result

    def routes(self, inputs: Any) -> None:
        """Take integers and booleans among a call's inputs for selections that were made elsewhere."""
        for leaf in pytree.tree_leaves(inputs):
            if isinstance(leaf, Tensor) and _is_integral(leaf):
                self._routing[leaf] = True

    def _follow_routing(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Remember which tensors say who chose whom, and which sizes were read from such."""
        results = [
            r for r in (result if isinstance(result, (tuple, list)) else (result,)) if isinstance(r, Tensor)
        ]
        operands = [a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        if name in _SELECTS and operands and operands[0].is_floating_point():
            chosen = [r for r in results if _is_integral(r)]
        elif any(a in self._routing for a in operands):
            kept = name in _SAME_NUMBERS | _MOVES | _TO_FLOATS
            chosen = [r for r in results if kept or _is_integral(r)]
            masks = [a for a in pytree.tree_leaves(args[_FINDS.get(name, 0) :]) if isinstance(a, Tensor)]
            if name in _FINDS and masks and all(a in self._routing for a in masks):
                self.routed.update(s for r in results for size in r.shape for s in _unknown_symbols(size))
        else:
            return
        for tensor in chosen:
            self._routing[tensor] = True

    def _value(self, func: Function, tensor: Tensor) -> Any:
        """A branch on a tensor that asks for no tokens: nothing about it is assumed."""
        self.asks_value = True
        try:
            return func(tensor)
        finally:
            self.asks_value = False

    def _answer(
        self, name: str, tensor: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any] | None:
        """What to give instead of calling the function, as a tuple of one; None: call it."""
        match name:
            case "view" | "reshape" if (sizes := _rows_regrouped(tensor, args[1:])) is not None:
                self.assume(SIZES)
                return (getattr(tensor, name)(sizes),)
            case "nonzero" | "where" if self._lists_indices(tensor, args, kwargs):
                as_tuple = name == "where" or bool(kwargs.get("as_tuple"))
                return (self._every_index(tensor, as_tuple),)
            case "unique" | "unique_consecutive" if tensor in self._widths:
                return self._every_id(tensor, kwargs)
            case "bincount":
                return self._static_bincount(tensor, args, kwargs)
            case "__getitem__" if (bounds := _unknown_bounds(args[1])) is not None:
                self.assume(WITHIN)
                return (tensor.narrow(0, bounds[0], bounds[1] - bounds[0]),)
            case "one_hot":
                return _symbolic_one_hot(tensor, args, kwargs)
            case "__format__" if (constant := _constant(tensor)) is not None and tensor.numel() == 1:
                return (format(constant.item(), *args[1:]),)
            case "numpy" if _is_short_list(tensor):
                import numpy

                return (numpy.array(self._numbers(tensor), dtype=object),)
            case "tolist" if _is_short_list(tensor):
                return (self._numbers(tensor),)
            case "item" if tensor in self._before:
                return (self._end(tensor),)
            case "item" if tensor in self._counts and _constant(tensor) is None:
                return (self._count(tensor),)
            case "__bool__" | "item" if tensor in self._branches:
                self.assume(TOKENS)
                return (self._branches[tensor],)
            case "__bool__" if tensor in self._counts and tensor in self._routing:
                self.assume(TOKENS)
                return (True,)
        return None

    def _learn(self, name: str, tensor: Tensor, args: tuple[Any, ...], result: Any) -> None:
        """Remember which results count something, which are ids, and which booleans ask whether there is
        anything.
        """
        if isinstance(result, tuple) and name in ("topk", "sort") and len(result) == 2:
            width = tensor.shape[-1] if name == "topk" else self._widths.get(tensor)
            chosen = result[1] if name == "topk" else result[0]
            if isinstance(width, int):
                self._widths[chosen] = width
        if name == "unbind" and tensor in self._ends and tensor.dim() == 1:
            self._follow_each_other(result)
        elif name == "unbind" and tensor in self._counts:  # which is how torch makes a list of a tensor
            self._counts.update((entry, True) for entry in result)
        if not isinstance(result, Tensor) or _constant(result) is not None:
            return
        if result.dtype == torch.bool:
            if self._is_mask_of_pairs(name, tensor):
                self._flags[result] = True
            answer = self._with_tokens(name, tensor, args)
            if answer is not None and result.dim() == 0:
                self._branches[result] = answer
        elif not result.is_floating_point() and not result.is_complex():
            width = tensor.shape[-1] if name == "argmax" else self._widths.get(tensor)
            if isinstance(width, int) and name in (*_SAME_NUMBERS, *_MOVES, "argmax"):
                self._widths[result] = width
            moved = name in (*_SAME_NUMBERS, *_MOVES)
            flags = tensor.dtype == torch.bool or tensor in self._flags
            if name in ("one_hot", "new_zeros", "zeros_like") or (flags and moved):
                self._flags[result] = True
            if (name == "cumsum" and tensor in self._counts) or (moved and tensor in self._ends):
                self._ends[result] = True
            again = tensor in self._counts and (moved or name in ("cumsum", "sum"))
            added = name in ("scatter_add", "scatter_add_", "index_add", "index_add_") and flags
            if name in ("bincount", "count_nonzero") or (name == "sum" and flags) or again or added:
                self._counts[result] = True

    def _with_tokens(self, name: str, tensor: Tensor, args: tuple[Any, ...]) -> bool | None:
        """Whether a question about a tensor is true of an expert that has tokens; None if it is no such
        question.
        """
        if name in ("logical_not", "__invert__", "bitwise_not") and tensor in self._branches:
            return not self._branches[tensor]
        if name == "any" and tensor in self._routing:
            return True
        if name in _SAME_NUMBERS and tensor in self._branches:
            return bool(self._branches[tensor])
        counts = tensor in self._counts and tensor in self._routing
        if not counts or len(args) < 2 or not isinstance(args[1], (int, float)):
            return None
        match name, args[1]:
            case ("eq" | "__eq__" | "le" | "__le__", 0) | ("lt" | "__lt__", 1):
                return False
            case ("ne" | "__ne__" | "gt" | "__gt__" | "greater", 0) | ("ge" | "__ge__", 1):
                return True
        return None

    def _is_mask_of_pairs(self, name: str, tensor: Tensor) -> bool:
        """Whether a boolean result says which pairs chose an expert: ids compared, or made of such."""
        if name in ("eq", "__eq__"):
            return not tensor.is_floating_point() and tensor.dtype != torch.bool
        kept = name in (*_SAME_NUMBERS, *_MOVES, "any", "bool", "gt", "__gt__", "ne", "__ne__")
        return kept and tensor in self._flags

    def _lists_indices(self, tensor: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        one_argument = len(args) == 1 and not set(kwargs) - {"as_tuple"}
        vector = tensor.dim() == 1 and isinstance(tensor.shape[0], int)
        return one_argument and vector and tensor in self._routing

    def _every_index(self, tensor: Tensor, as_tuple: bool) -> Tensor | tuple[Tensor]:
        """All indices of a vector of static size, as nonzero gives those of the hit ones."""
        self.assume(VISITS)
        if self.skip_last:
            self.assume(SENTINEL)
        with _disable_current_modes():
            values = torch.arange(int(tensor.shape[0]) - self.skip_last)
            values = values if as_tuple else values.unsqueeze(1)
        made = self._traced(values, tensor.device)
        return (made,) if as_tuple else made

    def _every_id(self, tensor: Tensor, kwargs: dict[str, Any]) -> tuple[Any] | None:
        """All ids that a top-k can choose, as unique gives those it chose; and how often it chose them."""
        if kwargs.get("return_inverse") or kwargs.get("dim") is not None:
            return None
        self.assume(VISITS)
        with _disable_current_modes():
            values = torch.arange(self._widths[tensor])
        ids = self._traced(values, tensor.device)
        if not kwargs.get("return_counts"):
            return (ids,)
        counts = self._static_bincount(tensor.reshape(-1), (), {"minlength": len(values)})
        assert counts is not None
        return ((ids, counts[0]),)

    def _traced(self, values: Tensor, device: torch.device) -> Tensor:
        """A constant of the traced program with these values, remembered."""
        where = torch.device("cpu") if device.type == "meta" else device  # there it would have no values
        made = torch.tensor(values.tolist(), dtype=values.dtype, device=where)
        self._known[made] = values
        return made

    def _follow(
        self, func: Function, name: str, tensor: Tensor, rest: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The result for a tensor whose values are known: numbers as they are, tensors as constants."""
        if name in ("cpu", "cuda"):
            return tensor
        if name == "to":  # its values stay on the CPU
            kwargs = {k: v for k, v in kwargs.items() if k != "device"}
            rest = tuple(a for a in rest if not isinstance(a, (torch.device, str)))
            if not rest and not kwargs:
                return tensor
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            result = func(self._known[tensor], *rest, **kwargs)
        if isinstance(result, Tensor):
            return self._traced(result, tensor.device)
        if isinstance(result, (tuple, list)) and all(isinstance(r, Tensor) for r in result):
            return type(result)(self._traced(r, tensor.device) for r in result)
        return result

    def _static_bincount(
        self, tensor: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor] | None:
        """bincount(x, minlength=n) of numbers below n has n entries, more would be an index error here; of
        ids without a minlength, as many as there are classes to choose.
        """
        size = kwargs.get("minlength", args[2] if len(args) > 2 else 0)
        if not size and tensor in self._widths:
            self.assume(CLASSES)
            size = self._widths[tensor]
        weighted = kwargs.get("weights", args[1] if len(args) > 1 else None) is not None
        if weighted or not isinstance(size, int) or not size:
            return None
        counts = torch.zeros(size, dtype=torch.int64, device=tensor.device)
        counts = counts.index_add(0, tensor.long(), torch.ones_like(tensor, dtype=torch.int64))
        self._counts[counts] = True
        return (counts,)

    def _numbers(self, tensor: Tensor) -> list[Any]:
        """The entries of a vector of static size, one symbolic integer each."""
        entries = [tensor[i] for i in range(int(tensor.shape[0]))]
        self._routing.update((e, True) for e in entries if tensor in self._routing)
        if tensor in self._ends:
            self._follow_each_other(entries)
            return [self._end(e) for e in entries]
        return [self._count(e) if tensor in self._counts else e.item() for e in entries]

    def _follow_each_other(self, ends: Sequence[Tensor]) -> None:
        for before, end in itertools.pairwise((None, *ends)):
            assert end is not None
            self._before[end] = before

    def _end(self, tensor: Tensor) -> Any:
        """A running sum as the one before it and a count, so that a segment's ends are known to ascend."""
        if tensor not in self._read:
            before = self._before[tensor]
            start = 0 if before is None else self._end(before)
            more = tensor if before is None else tensor - before
            self._routing.update((t, True) for t in (more,) if tensor in self._routing)
            self._read[tensor] = start + self._count(more)
        return self._read[tensor]

    def _count(self, tensor: Tensor) -> Any:
        """A scalar that counts something as a symbolic integer."""
        with torch._C.DisableTorchFunction():
            number = tensor.item()
        if isinstance(number, torch.SymInt):
            self.assume(COUNTS)
            torch._check(number >= 0)
            if tensor in self._routing:
                self.routed.update(_unknown_symbols(number))
        return number


def _is_integral(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() and not tensor.is_complex()


def _unknown_symbols(size: Any) -> Iterator[sympy.Symbol]:
    """The symbols for numbers read from data in a size, as it is written and as it is known."""
    if isinstance(size, torch.SymInt):
        for expression in (size.node.expr, size.node._expr):
            yield from (s for s in expression.free_symbols if symbol_is_type(s, SymT.UNBACKED_INT))


def _is_short_list(tensor: Tensor) -> bool:
    """A vector of integers whose length does not vary and whose values tracing does not know."""
    vector = tensor.dim() == 1 and isinstance(tensor.shape[0], int)
    return vector and not tensor.is_floating_point() and _constant(tensor) is None


def _unknown_bounds(index: Any) -> tuple[Any, Any] | None:
    """(start, end) of a plain slice by numbers that depend on data."""
    if not isinstance(index, slice) or index.step not in (None, 1) or index.stop is None:
        return None
    bounds = (0 if index.start is None else index.start, index.stop)
    return bounds if any(depends_on_data(b) for b in bounds) else None


def _rows_regrouped(tensor: Tensor, sizes: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The sizes of rows.view(T, K, -1), the rows' width for -1, where their number depends on data."""
    sizes = tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes
    if tensor.dim() != 2 or not isinstance(tensor.shape[1], int) or not depends_on_data(tensor.shape[0]):
        return None
    counted = len(sizes) > 1 and not any(isinstance(s, int) and s == -1 for s in sizes[:-1])
    if not counted or not isinstance(sizes[-1], int) or sizes[-1] != -1 or any(map(depends_on_data, sizes)):
        return None
    return (*sizes[:-1], tensor.shape[1])


def _is_unknown(tensor: Tensor) -> bool:
    """Whether the tensor's length depends on data."""
    return tensor.dim() > 0 and depends_on_data(tensor.shape[0])


def _constant(tensor: Tensor) -> Tensor | None:
    """The values of a tensor that tracing knows, as torch records them."""
    return getattr(tensor, "constant", None)


def _symbolic_one_hot(tensor: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor] | None:
    """one_hot with a class count that varies: a comparison, which has no check on values."""
    classes = kwargs.get("num_classes", args[1] if len(args) > 1 else -1)
    if not isinstance(classes, torch.SymInt):
        return None
    return ((tensor.unsqueeze(-1) == torch.arange(cast(int, classes), device=tensor.device)).to(torch.int64),)
