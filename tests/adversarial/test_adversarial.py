"""Adversaries: what must fuse though it does not look like a layer, what must not though it does.

Nothing checks the rewrites here: verification is off, and the program is held against eager.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import dsmoe_compiler as dsmoe
from dsmoe_compiler.program import Program
from tests.adversarial.as_eager import AS_EAGER
from tests.adversarial.layer import Adversary, Case, Outputs, layer
from tests.adversarial.must_fuse import MUST_FUSE
from tests.adversarial.refused import REFUSED
from tests.passes.checks import TOLERANCE

TOKENS = (6, 1, 0, 11)


def compiled(case: Case) -> Program:
    return dsmoe.compile(layer(case.run), case.inputs(6), verify="off")


def values(outputs: Outputs) -> Iterator[Tensor]:
    """The tensors of nested outputs."""
    if isinstance(outputs, Tensor):
        yield outputs
        return
    for output in outputs:
        yield from values(output)


def assert_as_eager(program: Program, case: Case) -> None:
    """The same values for some, one and no tokens; what one call leaves in the state is there in the next."""
    made = layer(case.run)
    ran = 0
    for tokens in TOKENS:
        inputs = case.inputs(tokens)
        if eager(layer(case.run), inputs) is None:
            continue
        expected = eager(made, inputs)
        assert expected is not None
        ran += 1
        actual = list(values(program(*(t.clone() for t in inputs))))
        assert len(actual) == len(expected)
        for a, e in zip(actual, expected, strict=True):
            finite = e[e.isfinite()].abs() if e.is_floating_point() else e.new_zeros(0)
            scale = max(finite.max().item() if finite.numel() else 1.0, 1e-3)
            torch.testing.assert_close(a, e, rtol=0, atol=TOLERANCE[torch.float32] * scale, equal_nan=True)
    assert ran >= 2, "eager must run on some of the sizes"


def eager(made: Adversary, inputs: tuple[Tensor, ...]) -> list[Tensor] | None:
    """What the layer itself gives, None for sizes that it has no form for."""
    try:
        return list(values(made(*(t.clone() for t in inputs))))
    except (RuntimeError, IndexError):
        return None


@pytest.mark.parametrize("case", MUST_FUSE, ids=str)
def test_fuses(case: Case) -> None:
    program = compiled(case)
    found = program.report.layers
    assert [str(one.refusal) for one in found] == ["None"] * len(found) and len(found) == case.layers
    assert_as_eager(program, case)


@pytest.mark.parametrize("case", (*AS_EAGER, *REFUSED), ids=str)
def test_runs_as_eager(case: Case) -> None:
    program = compiled(case)
    if case.router:
        said = [remark for remark in program.report.remarks if "router as written" in remark]
        assert len(said) == 1 and case.refused in said[0] and case.because in said[0], program.report.remarks
    elif case.refused:
        said = [str(found.refusal) for found in program.report.layers]
        assert any(case.refused in one and case.because in one for one in said), said
    assert_as_eager(program, case)
