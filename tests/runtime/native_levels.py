"""The native library at each instruction level, and how near to float64 its answers are to be.

How near, beside the largest number of a token's row, with u = 2⁻²⁴ in float32 and v = 2⁻⁹ in bfloat16, half a
unit in the last place of each:

- float32: the roundings of a sum of n products are independent, it is off by about √n·u. There are two such
  sums, over D and over F; what is pointwise between them is up to three dozen roundings, an exponential's and
  a logarithm's being two units each. Together √D + √F + 64 times u.
- bfloat16: operands are exact and products are summed in float32, as above. The output is rounded, by v. So
  is each hidden number: their sum is off by 0.4·v of its usual size, the worst of ten thousand sums by four
  times that, and a token may be three times as large inside as its row is: 5·v. Where the weight is on the
  token, the token is rounded, and with it gate and up: twice 5·v more. The shared experts' gate is the
  model's own bfloat16: its logit and the sigmoid, 2·v more.

A number that is not computed, or computed from the wrong row, is off by a tenth and more.

Letters: T tokens, D model width, F expert hidden width, E experts, K experts per token.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dsmoe_compiler.ir import reference
from dsmoe_compiler.ir.spec import MoESpec
from dsmoe_compiler.runtime.native.experts import bind
from dsmoe_compiler.runtime.native.levels import VARIABLE
from dsmoe_compiler.runtime.native.library import LEVELS, Library, native
from tests.codegen.layers import Made

SINGLE, HALF = 2.0**-24, 2.0**-9


def best() -> Library:
    """The library at the machine's best level; skips where there is none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(VARIABLE, raising=False)
        library = native()
    if not isinstance(library, Library):
        pytest.skip(f"no native kernels: {library.because}")
    return library


def levels() -> tuple[str, ...]:
    """Those of the machine, ascending; skips where there is no library."""
    return LEVELS[: LEVELS.index(best().level) + 1]


def at(level: str) -> Library:
    """The library at that level; skips where there is none, or the machine lacks it."""
    library = best()
    if LEVELS.index(level) > LEVELS.index(library.level):
        pytest.skip(f"this machine has no {level}, its best is {library.level}")
    return Library(library.handle, level)


def run(made: Made, level: str) -> Tensor:
    """The layer by the kernels. Raises Unsupported where they do not run it."""
    library = at(level)
    if not isinstance(made.spec, MoESpec):
        layer = bind(library, made.spec, made.x, made.weights, made.params)
        return layer(made.x, made.ids, made.weights)
    weights, ids = reference.route_tokens(made.x, made.router, made.spec)
    spec = made.spec
    layer = bind(library, spec.experts, made.x, weights, made.params, spec.shared, made.shared)
    return layer(made.x, ids, weights)


def rounding(
    dtype: torch.dtype, hidden: int, width: int, *, weighted_tokens: bool = False, gated: bool = False
) -> float:
    """How far a layer of D × F may be off."""
    single = (math.sqrt(hidden) + math.sqrt(width) + 64) * SINGLE
    roundings = 6 + 10 * weighted_tokens + 2 * gated
    return single if dtype == torch.float32 else single + roundings * HALF


def assert_close(got: Tensor, expected: Tensor, allowed: float, usual: float | None = None) -> None:
    """Every token's row as near as allowed, beside its largest number or, where it cancels, the `usual` size
    of all numbers.
    """
    assert got.shape == expected.shape
    if not expected.numel():
        return
    sizes = expected.abs().amax(1).clamp_min(max(usual or usual_size(expected), 1e-30))
    off = (got.double() - expected).abs().amax(1) / sizes
    worst = int(off.nan_to_num(math.inf).argmax())
    assert off[worst] <= allowed, f"token {worst} is off by {off[worst]:.3g}, {allowed:.3g} is allowed"


def usual_size(numbers: Tensor) -> float:
    """The root of their mean square."""
    return numbers.double().square().mean().sqrt().item()
