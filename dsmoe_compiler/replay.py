"""The program against the model: the same calls, on the example, on another shape, and at size 1.

Each layer was validated alone; this catches what lies between them, and what capture assumed of the user's code.
Two right programs may still disagree on single tokens: where two experts' scores nearly tie, a difference in the last
digit picks another expert. So tokens are judged one by one: their median error must be what rounding explains, and
few may be far off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dsmoe_compiler.capture import resized
from dsmoe_compiler.inputs import Inputs
from dsmoe_compiler.validate import relative_error

Call = tuple[tuple[Any, ...], dict[str, Any]]
# Of the rows of an output: the median's relative error, what counts as far off, and how many may be.
_MEDIAN_FP32, _FAR_FP32 = 1e-4, 1e-2
_FAR_SHARE = 0.1


@dataclass(frozen=True)
class Replayed:
    """The largest relative error on the example, and the first call that went wrong, in words ("" if none)."""

    error: float | None
    wrong: str


def replay(model: Callable[..., Any], program: Callable[..., Any], inputs: Inputs, example: Call) -> Replayed:
    """Call both; the model is left with the values it had."""
    error: float | None = None
    for name, (args, kwargs) in _calls(inputs, example):
        try:
            with torch.no_grad(), _buffers_kept(model):
                expected = model(*args, **kwargs)
        except Exception:
            if name == "the example":
                raise
            continue  # the model itself does not take this shape
        with torch.no_grad(), _buffers_kept(model):
            actual = program(*args, **kwargs)
        compared = _compare(actual, expected)
        if compared.wrong:
            return Replayed(compared.error, f"{name}: {compared.wrong}")
        if name == "the example":
            error = compared.error
    return Replayed(error, "")


def _calls(inputs: Inputs, example: Call) -> Iterator[tuple[str, Call]]:
    yield "the example", example
    sizes = inputs.sizes(*example)
    for name, change in (("another shape", lambda n: n + 2), ("size 1", lambda n: 1)):
        other = {s: change(n) for s, n in sizes.items() if inputs.admits(s, change(n))}
        if other and other != {s: sizes[s] for s in other}:
            yield name, _resize(inputs, example, sizes | other)


def _resize(inputs: Inputs, example: Call, sizes: Mapping[sympy.Expr, int]) -> Call:
    leaves, spec = pytree.tree_flatten(inputs.bind(*example))
    numbers = {s: sympy.Integer(n) for s, n in sizes.items()}
    changed = []
    for leaf, expected in zip(leaves, inputs.leaf_sizes(), strict=True):
        for dim, size in enumerate(expected or ()):
            wanted = int(size.xreplace(numbers))
            if leaf.shape[dim] != wanted:
                leaf = resized(leaf, dim, wanted)
        changed.append(leaf)
    args, kwargs = pytree.tree_unflatten(changed, spec)
    return args, kwargs


@contextmanager
def _buffers_kept(model: object) -> Iterator[None]:
    """Buffers that a forward updates (running statistics, counters) have their values back afterwards."""
    module = model if isinstance(model, nn.Module) else getattr(model, "__self__", None)
    kept = [(b, b.clone()) for b in module.buffers()] if isinstance(module, nn.Module) else []
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in kept:
                buffer.copy_(before)


@dataclass(frozen=True)
class _Compared:
    error: float
    wrong: str


def _compare(actual: object, expected: object) -> _Compared:
    """By name where outputs have names: a cache that was not captured is no difference."""
    ours, theirs = _named(actual), _named(expected)
    worst = 0.0
    for name, tensor in ours.items():
        other = theirs.get(name)
        if other is None:
            return _Compared(float("inf"), f"the model has no output {name!r}")
        if tensor.shape != other.shape or tensor.dtype != other.dtype:
            found = f"{tensor.dtype} {tuple(tensor.shape)}, the model gives {other.dtype} {tuple(other.shape)}"
            return _Compared(float("inf"), f"output {name or 'value'} is {found}")
        if not tensor.numel():
            continue
        worst = max(worst, relative_error(tensor, other))
        if tensor.is_floating_point() and (reason := _rows_differ(tensor, other)):
            return _Compared(worst, f"output {name or 'value'}: {reason}")
        if not tensor.is_floating_point() and not torch.equal(tensor, other):
            return _Compared(worst, f"output {name or 'value'} differs")
    return _Compared(worst, "")


def _named(output: object) -> dict[str, Tensor]:
    leaves, _ = pytree.tree_flatten_with_path(dict(output) if isinstance(output, Mapping) else output)
    return {pytree.keystr(path): leaf for path, leaf in leaves if isinstance(leaf, Tensor)}


def _rows_differ(actual: Tensor, expected: Tensor) -> str:
    a, b = (t.double().nan_to_num(0.0).reshape(-1, t.shape[-1] if t.dim() else 1) for t in (actual, expected))
    if not torch.equal(actual.isnan(), expected.isnan()):
        return "NaN in other places"
    scale = b.norm(dim=-1).clamp(min=b.norm(dim=-1).mean() * 1e-3 + 1e-300)
    errors = (a - b).norm(dim=-1) / scale
    eps = torch.finfo(actual.dtype).eps
    low = actual.dtype.itemsize < 4
    median, far = (8 * eps, 64 * eps) if low else (_MEDIAN_FP32, _FAR_FP32)
    share = (errors > far).double().mean().item()
    if errors.median().item() > median or share > (2 * _FAR_SHARE if low else _FAR_SHARE):
        return f"the median row is off by {errors.median().item():.1e}, {share:.0%} of them far"
    return ""
