"""The program against the model: the same calls, on the example, on another shape, and at size 1.

Each layer was validated alone; this catches what lies between them, and what capture assumed of the user's
code. Outputs are compared row by row (a row is everything along the last dimension, usually one token),
each row's error relative to its own length, or to a tenth of the average row's where it is shorter.

fp32: what rounding explains. Sums of n products in another order differ by about sqrt(n)·eps; n = 10⁴, four
such sums a layer, adding up as sqrt over 60 layers: 100 · 1.2e-7 · 2 · 8 = 2e-4. A row further off than
5e-4 is far. An expert of eight scaled by 1.05 moves a quarter of the rows by 1e-3 to 2e-2.

bf16, fp16: every intermediate is rounded, a few eps a layer, so the median row may be off by 4 eps (bf16: 3
%), and a row further off than 64 eps is far. Scaling one expert by a few percent lies below that; weights
left without renormalisation (tens of percent of every row) do not.

Two right programs may still disagree on single tokens: where two experts' scores nearly tie, a difference
in the last digit picks another expert. With scores a tenth of their deviation apart and rounding of 1e-6
that befalls a token 1e-5 times a layer: a replay of 63 tokens and 60 layers has such a token with p = 0.04.
A coincidence does not repeat: a call with far rows is made four more times with other values, and the
program is wrong when two of these have far rows again (a right one: 0.04 · 6 · 0.04² = 4e-4; a wrong one
that moves a tenth of the rows slips through as often as all its rows are missed, less than 0.2 % of the
time with 63 rows). In low precision, where near ties are common, rows that are far are no proof at all
until they are more than a fifth; then the same rule holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from dsmoe_compiler.capture import prepare_configs
from dsmoe_compiler.functions import as_module
from dsmoe_compiler.inputs import Inputs
from dsmoe_compiler.ir.errors import InputError, ShapeError
from dsmoe_compiler.outputs import Structure
from dsmoe_compiler.preserve import preserved, values_kept
from dsmoe_compiler.resize import resized
from dsmoe_compiler.validate import relative_error

Call = tuple[tuple[Any, ...], dict[str, Any]]
# Sizes tried for "another shape", each unlike the example's; the first that the program takes is used.
_OTHER_SIZES: tuple[Callable[[int, int], int], ...] = (
    lambda size, place: max(size + 2, 7 + 2 * place),
    lambda size, place: size + 2,
    lambda size, place: 2 * size,
    lambda size, place: size + 1,
    lambda size, place: size - 1,
)
_REPEATS, _DIRTY_REPEATS = 4, 2


@dataclass(frozen=True)
class Replayed:
    """The largest relative error on the example, and the first call that went wrong, in words ("" if
    none).
    """

    error: float | None
    wrong: str


def replay(model: Callable[..., Any], program: Callable[..., Any], inputs: Inputs, example: Call) -> Replayed:
    """Call both; the model is left with the values it had. Raises InputError if it fails on its example."""
    module = as_module(model)
    error: float | None = None
    with preserved(module), torch.no_grad():
        prepare_configs(module)
        for name, call in _calls(inputs, example):
            compared = _both(module, program, call, may_fail=name != "the example")
            if name == "the example" and compared is not None:
                error = compared.error
            if compared is None or not compared.wrong:
                continue
            if compared.proven or _repeats(module, program, inputs, call):
                return Replayed(compared.error, f"{name}: {compared.wrong}")
    return Replayed(error, "")


def replay_routings(
    model: Callable[..., Any], program: Callable[..., Any], inputs: Inputs, example: Call
) -> str:
    """Call both with every selection forced, so that experts have no token, one, or all of them; what
    differs, in words ("" if nothing does).

    `program` must hold the selections that the model makes: the graph as captured. Whatever picks entries of
    floating scores picks what `_PATTERNS` say, in both; integers and masks among the inputs, which may be
    selections made elsewhere, are also 0 (or false) everywhere, and their largest. Forced selections leave
    no near ties.
    """
    module = as_module(model)
    sizes = inputs.sizes(*example)
    other = _resized_call(inputs, example, sizes, {s: n + 2 for s, n in sizes.items()}) or example
    with preserved(module), torch.no_grad():
        prepare_configs(module)
        for turn, (words, pattern) in enumerate(_PATTERNS.items()):
            call = (example, other)[turn % 2]
            uniform = [_uniform(call, last) for last in (False, True)] if turn < 2 else []
            for forced in (call, *uniform):
                with _Forced(pattern):
                    compared = _both(module, program, forced, may_fail=True)
                if compared is not None and compared.wrong:
                    return f"every token routed to {words}: {compared.wrong}"
    return ""


def _uniform(call: Call, last: bool) -> Call:
    """The call with 0 everywhere in an integer input or a mask, or with the largest it has."""

    def uniform(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.is_floating_point() or leaf.is_complex() or not leaf.numel():
            return leaf
        if leaf.dtype == torch.bool:
            return torch.full_like(leaf, last)
        return torch.full_like(leaf, int(leaf.max()) if last else min(0, int(leaf.min())))

    args, kwargs = pytree.tree_map(uniform, call)
    return args, kwargs


def _spread(rows: int, count: int, width: int) -> Tensor:
    """Entries as far apart as they can be: for three of which two are picked, the first and the last."""
    return torch.linspace(0, width - 1, count).round().long().expand(rows, count)


def _but_one(rows: int, count: int, width: int) -> Tensor:
    """The last entries for the first row, the first ones for all others."""
    ids = torch.arange(count).repeat(rows, 1)
    ids[:1] += width - count
    return ids


def _among(half: int) -> Callable[[int, int, int], Tensor]:
    """Entries drawn from every other one (or one more, where that is too few)."""

    def drawn(rows: int, count: int, width: int) -> Tensor:
        generator = torch.Generator().manual_seed(half)
        order = torch.arange(width).roll(-half)
        allowed = torch.cat([order[::2], order[1::2]])[: max(count, -(-width // 2))]
        ranks = torch.rand(rows, len(allowed), generator=generator).argsort(-1)
        return allowed[ranks[:, :count]]

    return drawn


# By what they are called: (rows, entries to pick, entries there are) -> the entries (rows, picked), distinct.
_PATTERNS: dict[str, Callable[[int, int, int], Tensor]] = {
    "the first experts": lambda rows, count, width: torch.arange(count).expand(rows, count),
    "the last experts": lambda rows, count, width: torch.arange(width - count, width).expand(rows, count),
    "the first experts, but for one token": _but_one,
    "experts far apart": _spread,
    "half of the experts": _among(0),
    "the other half of the experts": _among(1),
}
aten = torch.ops.aten


class _Forced(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered, what picks entries of floating tensors picks those of a pattern."""

    def __init__(self, pattern: Callable[[int, int, int], Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._pattern = pattern

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        scores = args[0] if args else None
        if not isinstance(scores, Tensor) or not scores.is_floating_point() or not scores.dim():
            return result
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        dim = given.get("dim", -1)
        if func in (aten.topk.default, aten.max.dim, aten.min.dim, aten.kthvalue.default):
            kept = result[1] if result[1].dim() == scores.dim() else result[1].unsqueeze(dim)
            ids = self._picked(kept, scores.shape[dim], dim)
            values = scores.gather(dim, ids)
            return tuple(t.reshape(result[1].shape) for t in (values, ids))
        if func in (aten.argmax.default, aten.argmin.default) and given.get("dim") is not None:
            kept = result if result.dim() == scores.dim() else result.unsqueeze(dim)
            return self._picked(kept, scores.shape[dim], dim).reshape(result.shape)
        if func in (aten.sort.default, aten.sort.stable):
            ids = self._picked(result[1], scores.shape[dim], dim)
            return scores.gather(dim, ids), ids
        return result

    def _picked(self, like: Tensor, width: int, dim: int) -> Tensor:
        """The pattern's entries, in the places of `like`: along `dim` the entries picked, else rows."""
        moved = like.movedim(dim, -1)
        count = moved.shape[-1]
        rows = moved.numel() // count if count else 0
        if count == width and width:  # all of them: in the order in which the pattern would have one
            first = self._pattern(rows, 1, width)
            ids = (first + torch.arange(width)) % width
        else:
            ids = self._pattern(rows, count, width)
        return ids.to(like.device).reshape(moved.shape).movedim(-1, dim).contiguous()


def _repeats(module: nn.Module, program: Callable[..., Any], inputs: Inputs, call: Call) -> bool:
    """Whether rows that were far off are so again with other values: near ties in routers are not."""
    again = (
        _both(module, program, _other_values(inputs, call, seed), may_fail=True) for seed in range(_REPEATS)
    )
    return sum(compared is not None and bool(compared.wrong) for compared in again) >= _DIRTY_REPEATS


def _both(module: nn.Module, program: Callable[..., Any], call: Call, may_fail: bool) -> _Compared | None:
    """The two compared on one call; None where the model itself does not take it."""
    random_state = torch.get_rng_state()
    try:
        with values_kept(module):
            args, kwargs = _own(call)
            expected = module(*args, **kwargs)
    except Exception as e:  # the user's code may raise anything
        if may_fail:
            return None
        reason = next(iter(str(e).splitlines()), "") or type(e).__name__
        raise InputError(f"the model itself fails on the example inputs: {reason}") from e
    torch.set_rng_state(random_state)
    with values_kept(module):
        args, kwargs = _own(call)
        try:
            actual = program(*args, **kwargs)
        except Exception as e:  # operators of the graph may raise anything
            reason = next(iter(str(e).splitlines()), "") or type(e).__name__
            return _Compared(math.inf, f"the graph fails ({reason[:100]})", proven=True)
        return _compare(actual, expected, _rounding(module))


def _rounding(module: nn.Module) -> float:
    """eps of the type with the fewest digits among the model's parameters, of 16 bits or more."""
    kinds = {p.dtype for p in module.parameters() if p.is_floating_point() and p.element_size() > 1}
    return max((torch.finfo(kind).eps for kind in kinds), default=0.0)


def _own(call: Call) -> Call:
    """The call with tensors of its own: a model may write into its inputs."""
    args, kwargs = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, call)
    return args, kwargs


def _calls(inputs: Inputs, example: Call) -> Iterator[tuple[str, Call]]:
    yield "the example", example
    sizes = inputs.sizes(*example)
    for change in _OTHER_SIZES:
        wanted = {s: change(n, place) for place, (s, n) in enumerate(sizes.items())}
        if (other := _resized_call(inputs, example, sizes, wanted)) is not None:
            yield "another shape", _other_values(inputs, other, seed=_REPEATS)
            break
    ones = dict.fromkeys(sizes, 1)
    kept = sizes if inputs.doubtful else ()  # a width that only a view fixes cannot be 1
    for single in (ones, *({**ones, s: sizes[s]} for s in kept if sizes[s] > 1)):
        if (call := _resized_call(inputs, example, sizes, single)) is not None:
            yield "size 1", call


def _resized_call(
    inputs: Inputs, example: Call, sizes: Mapping[sympy.Expr, int], wanted: Mapping[sympy.Expr, int]
) -> Call | None:
    """The example at other sizes, if the program takes them and they are others."""
    if wanted == sizes:
        return None
    leaves, spec = pytree.tree_flatten(inputs.bind(*example))
    numbers = {s: sympy.Integer(n) for s, n in wanted.items()}
    for i, expected in enumerate(inputs.leaf_sizes()):
        for dim, size in enumerate(expected or ()):
            leaves[i] = resized(leaves[i], dim, int(size.xreplace(numbers)))
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    try:
        inputs.bind(args, kwargs)
    except ShapeError:
        return None
    return args, kwargs


def _other_values(inputs: Inputs, call: Call, seed: int) -> Call:
    """The call with rows unlike each other: ids drawn up to the largest seen, numbers scaled; masks stay
    masks.
    """
    generator = torch.Generator().manual_seed(seed)

    def other(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.numel() or leaf.is_complex():
            return leaf
        if leaf.is_floating_point():
            factor = 0.5 + torch.rand(leaf.shape, generator=generator)
            return leaf * factor.to(leaf.dtype).to(leaf.device)
        largest = 1 if leaf.dtype == torch.bool else int(leaf.max())
        if largest <= 1 or int(leaf.min()) < 0:
            return leaf
        return torch.randint(largest + 1, leaf.shape, generator=generator).to(leaf.dtype).to(leaf.device)

    args, kwargs = pytree.tree_map(other, inputs.bind(*call))
    return args, kwargs


@dataclass(frozen=True)
class _Compared:
    """The largest relative error, what is wrong in words ("" if nothing), and whether no near tie can
    explain it.
    """

    error: float
    wrong: str
    proven: bool = False


def _compare(actual: object, expected: object, rounding: float) -> _Compared:
    """Caches, which a program does not return, are no difference; numbers may have been rounded as much as
    the model's parameters are, whatever type they are returned in.
    """
    ours, actual_values = Structure.of(actual)
    theirs, expected_values = Structure.of(expected)
    if ours != theirs:
        return _Compared(float("inf"), "the model returns other containers or constants there", proven=True)
    worst, far = 0.0, ""
    for i, (a, b) in enumerate(zip(actual_values, expected_values, strict=True)):
        name = f"output {i}" if len(actual_values) > 1 else "the output"
        if a.shape != b.shape or a.dtype != b.dtype:
            found = f"{name} is {_kind(a)}, the model's is {_kind(b)}"
            return _Compared(float("inf"), found, proven=True)
        if a.numel():
            worst = max(worst, relative_error(a, b))
            rows = _rows(a, b, rounding)
            if rows.wrong:
                far = far or f"{name}: {rows.wrong}"
                if rows.proven:
                    return _Compared(worst, far, proven=True)
    return _Compared(worst, far)


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _rows(actual: Tensor, expected: Tensor, rounding: float = 0.0) -> _Compared:
    a, b = (t.reshape(-1, t.shape[-1] if t.dim() else 1) for t in (actual, expected))
    if not actual.is_floating_point():
        errors = torch.where((a != b).any(-1), float("inf"), 0.0).double()
        median, far, share = float("inf"), 0.0, 0.0
    else:
        if not torch.equal(a.isfinite(), b.isfinite()):
            return _Compared(float("inf"), "NaN or infinity in other places", proven=True)
        a, b = (t.double().nan_to_num(0.0, 0.0, 0.0) for t in (a, b))
        length = b.norm(dim=-1)
        errors = (a - b).norm(dim=-1) / length.clamp(min=length.mean().item() / 10 + 1e-300)
        eps = max(torch.finfo(actual.dtype).eps, rounding)
        coarse = eps > torch.finfo(torch.float32).eps
        median, far, share = (4 * eps, 64 * eps, 0.2) if coarse else (5e-4, 5e-4, 0.0)
    middle, worse = errors.median().item(), (errors > far).double().mean().item()
    if middle <= median and worse <= share:
        return _Compared(0.0, "")
    return _Compared(
        0.0, f"the median row is off by {middle:.1e}, {worse:.0%} of the rows by more than {far:.1e}"
    )
