"""Obligations are found in the source, taken out one at a time, and missed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.mutation.equivalent import EQUIVALENT, UNREACHED
from tests.mutation.mutants import FILES, ROOT, Mutant, mutants, mutated, observed
from tests.mutation.runner import put_in
from tests.passes.checks import compiled, only_layer
from tests.passes.lookalikes import wrong_divisor
from tests.passes.spellings import Spec, layer

PERMUTATION = "passes/lift/permutation.py"


@pytest.fixture
def divisor() -> Iterator[Mutant]:
    """The obligation that pairs are divided by K; the file is whole again afterwards."""
    (found,) = (m for m in mutants(PERMUTATION) if m.kind == "raise" and m.function == "token_of")
    yield found
    put_in(PERMUTATION, None)


def test_an_obligation_taken_out_is_missed(divisor: Mutant) -> None:
    made = layer(Spec(wrong_divisor))
    assert not only_layer(compiled(made, verify="off")).fused
    put_in(PERMUTATION, mutated(divisor))
    assert only_layer(compiled(made, verify="off")).fused, "wrongly: nothing says that 3 is not 2"
    put_in(PERMUTATION, None)
    assert not only_layer(compiled(made, verify="off")).fused


@pytest.mark.parametrize("file", FILES)
def test_every_file_can_be_changed(file: str) -> None:
    for mutant in [m for m in mutants(file) if m.kind != "guard" or m.number % 20 == 0]:
        compile(mutated(mutant), file, "exec")
    compile(observed(file), file, "exec")


def test_what_is_said_to_be_equivalent_is_there() -> None:
    assert {*EQUIVALENT, *UNREACHED} <= {m.key for file in FILES for m in mutants(file)}


@pytest.mark.slow
def test_every_refusal_is_missed_where_it_is_taken_out() -> None:
    command = [sys.executable, "-m", "tests.mutation", "--kind", "raise,require"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
