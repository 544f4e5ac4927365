"""Whether two ways to run a model give the same answers, as far as rounding lets them.

A row is everything along an output's last dimension, usually one token, and its error is relative to its own
length. In float32 sums in another order leave it far below 5e-4; in lower precision every intermediate is
rounded, and the median row may be off by four times the type's eps. Two right programs still disagree on
single tokens, where two experts' scores nearly tie and a last digit picks another expert: in float32 about
one token in 10^5 a layer, in bfloat16 many more. So a tenth of the rows may be far off in float32, and a
fifth in lower precision; the rows of several calls are judged together: one token alone decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsmoe_compiler.outputs import Structure

_FINE = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Difference:
    """Of answers: the norm of what they differ by over the norm of what is right, of the output where that is
    largest; and what is wrong in words, "" where rounding explains it.
    """

    error: float
    wrong: str = ""


def rounding_of(model: Callable[..., object]) -> float:
    """eps of the type with the fewest digits among a model's parameters, of 16 bits or more; 0 for none."""
    if not isinstance(model, nn.Module):
        return 0.0
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point() and p.element_size() > 1}
    return max((torch.finfo(kind).eps for kind in kinds), default=0.0)


def difference(answers: Iterable[tuple[object, object]], rounding: float) -> Difference:
    """How far answers are from the right ones: pairs of both, of a model whose parameters have this eps."""
    outputs: list[list[_Rows]] = []
    for actual, expected in answers:
        ours, actual_values = Structure.of(actual)
        theirs, expected_values = Structure.of(expected)
        if ours != theirs:
            return Difference(float("inf"), "it has other parts than eager's")
        outputs = outputs or [[] for _ in expected_values]
        for rows, a, b in zip(outputs, actual_values, expected_values, strict=True):
            if wrong := _unlike(a, b):
                return Difference(float("inf"), wrong)
            rows.append(_rows(a, b))
    judged = [_judged(rows, rounding) for rows in outputs]
    wrong = next((each.wrong for each in judged if each.wrong), "")
    return Difference(max((each.error for each in judged), default=0.0), wrong)


@dataclass(frozen=True)
class _Rows:
    """How far each row of an output is off, its right length, and the eps of its type."""

    apart: Tensor
    length: Tensor
    eps: float


def _unlike(actual: Tensor, expected: Tensor) -> str:
    """What no rounding explains, in words; "" for nothing."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return f"it is {_kind(actual)}, eager's is {_kind(expected)}"
    if not expected.is_floating_point():
        return "" if actual.equal(expected) else "its integers are not eager's"
    return "" if actual.isfinite().equal(expected.isfinite()) else "NaN or infinity in other places"


def _rows(actual: Tensor, expected: Tensor) -> _Rows:
    width = expected.shape[-1] if expected.dim() else 1
    if not expected.is_floating_point() or not expected.numel():
        return _Rows(torch.zeros(0), torch.zeros(0), 0.0)
    a, b = (t.reshape(-1, width).float().nan_to_num(0.0, 0.0, 0.0) for t in (actual, expected))
    return _Rows((a - b).norm(dim=-1), b.norm(dim=-1), torch.finfo(expected.dtype).eps)


def _judged(rows: list[_Rows], rounding: float) -> Difference:
    """The rows of all calls of one output."""
    apart, length = torch.cat([r.apart for r in rows]), torch.cat([r.length for r in rows])
    if not len(apart):
        return Difference(0.0)
    error = (apart.norm() / length.norm().clamp(min=1e-30)).item()
    errors = apart / length.clamp(min=length.mean().item() / 10 + 1e-30)
    eps = max(rounding, *(r.eps for r in rows))
    typical, far, share = (4 * eps, 64 * eps, 0.2) if eps > _FINE else (5e-4, 5e-4, 0.1)
    median, further = errors.median().item(), (errors > far).float().mean().item()
    if median <= typical and further <= share:
        return Difference(error)
    return Difference(
        error, f"the median row is off by {median:.1e}, {further:.0%} of the rows by more than {far:.1e}"
    )


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
