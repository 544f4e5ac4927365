"""torch.compile as a candidate: called until nothing new is compiled, broken off, or why it failed."""

import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dsmoe_compiler.cli.bench_inputs import Call
from dsmoe_compiler.cli.bench_torch_compile import torch_compiled

CALLS: tuple[Call, ...] = tuple(((torch.full((2,), float(i)),), {}) for i in range(3))
Run = Callable[[Any], Any]


@pytest.fixture
def compiles_to(monkeypatch: pytest.MonkeyPatch) -> Callable[[Run], None]:
    """Have torch.compile hand out a function of one's own."""

    def compiles_to(run: Run) -> None:
        monkeypatch.setattr(torch, "compile", lambda model: run)

    return compiles_to


def compiled_frame() -> None:
    """What torch notes when it compiles."""
    torch._dynamo.utils.counters["frames"]["total"] += 1


def test_it_is_called_until_nothing_new_is_compiled(compiles_to: Callable[[Run], None]) -> None:
    seen: list[float] = []

    def run(x: torch.Tensor) -> None:
        if len(seen) in (0, 4):  # in the first pass and in the second
            compiled_frame()
        seen.append(x[0].item())

    compiles_to(run)
    found = torch_compiled(torch.relu, CALLS, 60)
    assert (found.run, found.why) == (run, "")
    assert seen == [0.0, 1.0, 2.0] * 3


def test_what_never_settles_is_measured_all_the_same(compiles_to: Callable[[Run], None]) -> None:
    compiles_to(lambda x: compiled_frame())
    assert torch_compiled(torch.relu, CALLS, 60).run is not None


def test_a_failure_is_its_first_line(compiles_to: Callable[[Run], None]) -> None:
    def run(x: torch.Tensor) -> None:
        raise RuntimeError("\n  no C++ compiler\nand a long story")

    compiles_to(run)
    found = torch_compiled(torch.relu, CALLS, 60)
    assert (found.run, found.why) == (None, "no C++ compiler")


def test_what_takes_too_long_is_broken_off(compiles_to: Callable[[Run], None]) -> None:
    before = signal.getsignal(signal.SIGALRM)

    def run(x: torch.Tensor) -> None:
        while True:
            try:
                while True:
                    pass
            except Exception:
                pass

    compiles_to(run)
    found = torch_compiled(torch.relu, CALLS, 0.05)
    assert (found.run, found.why) == (None, "compiling takes more than 0.05 s")
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0.0


def test_ctrl_c_is_no_failure_of_the_compiler(compiles_to: Callable[[Run], None]) -> None:
    def run(x: torch.Tensor) -> None:
        raise KeyboardInterrupt

    compiles_to(run)
    with pytest.raises(KeyboardInterrupt):
        torch_compiled(torch.relu, CALLS, 60)
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0.0


@pytest.mark.slow
def test_torch_itself() -> None:
    found = torch_compiled(torch.relu, CALLS, 600)
    assert found.run is not None, found.why
    assert found.run(-CALLS[1][0][0]).equal(torch.zeros(2))
