"""Ctrl-C: obeyed soon, heard always, and nothing is left behind."""

import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dsmoe_compiler as dsmoe
from dsmoe_compiler.cli.stages import load_modules
from dsmoe_compiler.functions import as_module
from dsmoe_compiler.interrupt import Deferred, forwards, poll

MAIN = signal.getsignal(signal.SIGINT)


def press() -> None:
    """Ctrl-C, as the terminal sends it; Python acts on it before the next line."""
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(autouse=True)
def _ordinary() -> Iterator[None]:
    """Python's own handler before, and every handler put back after."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler and sys.gettrace() is None
    signal.signal(signal.SIGINT, MAIN)


def test_it_waits_until_the_end() -> None:
    done = list[int]()
    with pytest.raises(KeyboardInterrupt), Deferred():
        press()
        done.append(1)
    assert done == [1]


def test_a_poll_obeys() -> None:
    done = list[int]()
    with pytest.raises(KeyboardInterrupt), Deferred():
        poll()
        press()
        poll()
        done.append(1)
    poll()
    assert done == []


def test_without_one_nothing_happens() -> None:
    with Deferred(), Deferred():
        poll()
    poll()


def test_the_outermost_counts() -> None:
    done = list[int]()
    with pytest.raises(KeyboardInterrupt), Deferred():
        with Deferred():
            press()
        done.append(1)
    assert done == [1]


def test_a_context_manager_is_left_whole() -> None:
    """What this is all about: pressed in `__exit__`, before that has put anything back."""
    left = list[str]()

    @contextmanager
    def careful() -> Iterator[None]:
        yield
        press()
        left.append("put back")

    with pytest.raises(KeyboardInterrupt), Deferred(), careful():
        pass
    assert left == ["put back"]


def test_an_error_on_the_way_does_not_hide_it() -> None:
    with pytest.raises(KeyboardInterrupt) as caught, Deferred():
        press()
        raise ValueError
    assert isinstance(caught.value.__context__, ValueError)


def test_swallowed_once_it_is_raised_again() -> None:
    with pytest.raises(KeyboardInterrupt), Deferred():
        press()
        with suppress(BaseException):
            poll()


def test_a_second_one_is_obeyed_at_once() -> None:
    done = list[int]()
    with pytest.raises(KeyboardInterrupt), Deferred():
        press()
        done.append(1)
        press()
        done.append(2)
    assert done == [1]


def test_the_users_own_handler_is_called_later_and_once() -> None:
    calls = list[int]()

    def own(signum: int, frame: FrameType | None) -> None:
        calls.append(signum)

    signal.signal(signal.SIGINT, own)
    with Deferred():
        press()
        assert calls == []
        poll()
        assert calls == [signal.SIGINT]
        poll()
    assert calls == [signal.SIGINT] and signal.getsignal(signal.SIGINT) is own
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_an_ignored_signal_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Deferred():
        press()
        poll()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_handler_set_meanwhile_stays() -> None:
    def other(signum: int, frame: FrameType | None) -> None:
        pass

    with Deferred():
        signal.signal(signal.SIGINT, other)
    assert signal.getsignal(signal.SIGINT) is other
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_the_entry_of_a_forward_obeys() -> None:
    done = list[str]()

    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            done.append("inner")
            return x

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: Tensor) -> Tensor:
            done.append("outer")
            elsewhere()
            done.append("after")
            return self.inner(x)  # type: ignore[no-any-return]

    def elsewhere() -> None:
        press()
        done.append("elsewhere")

    model = Outer()
    with pytest.raises(KeyboardInterrupt), Deferred(forwards(model)):
        model(torch.ones(1))
    assert done == ["outer", "elsewhere", "after"]


def test_a_forward_that_never_ends_is_interrupted() -> None:
    class Endless(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            end = time.monotonic() + 20
            while time.monotonic() < end:
                pass
            return x

    timer, start = threading.Timer(0.1, press), time.monotonic()
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        dsmoe.compile(Endless(), (torch.ones(2, 3),))
    assert time.monotonic() - start < 15


def test_a_debuggers_trace_is_kept() -> None:
    def trace(frame: FrameType, event: str, argument: Any) -> None:
        pass

    model = nn.Linear(2, 2)
    sys.settrace(trace)
    try:
        with pytest.raises(KeyboardInterrupt), Deferred(forwards(model)):
            press()
            assert sys.gettrace() is trace
        assert sys.gettrace() is trace
    finally:
        sys.settrace(None)


def test_the_forwards_of_a_model_and_of_a_function() -> None:
    class Wrapped(nn.Module):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return x

    def function(x: Tensor) -> Tensor:
        return x

    model = nn.Sequential(nn.Linear(2, 2), Wrapped())
    unwrapped: Any = Wrapped.forward
    assert forwards(model) == {
        nn.Sequential.forward.__code__,
        nn.Linear.forward.__code__,
        unwrapped.__wrapped__.__code__,
    }
    assert function.__code__ in forwards(as_module(function))
    assert forwards(as_module(functools.partial(function)))


def test_another_threads_work_is_not_ours_to_interrupt() -> None:
    seen = list[object]()

    def work() -> None:
        with Deferred():
            seen.append(signal.getsignal(signal.SIGINT))
            poll()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]


@pytest.mark.parametrize("stage", ["capture", "normalize", "lift_experts", "fuse_router", "lower", "check"])
def test_every_stage_can_be_interrupted(stage: str) -> None:
    def at(name: str) -> None:
        if name == stage:
            press()

    model, x = nn.Linear(4, 4), torch.randn(3, 4)
    before = {name: id(value) for name, value in vars(model).items()}
    with pytest.raises(KeyboardInterrupt):
        dsmoe.compile(model, (x,), progress=at)
    assert {name: id(value) for name, value in vars(model).items()} == before
    assert dsmoe.compile(model, (x,))(x).allclose(model(x), atol=1e-6)


def _interrupted(model: str, rounds: int, folder: Path, seed: int = 0) -> Iterator[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.interrupted_process", model, str(rounds), str(seed), str(folder)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "KeyboardInterrupt" not in done.stderr, "Python printed one that nobody could catch"
    yield from map(json.loads, done.stdout.splitlines())


def _check(rounds: Iterator[dict[str, Any]], moments: int) -> set[str]:
    """The stages that Ctrl-C ended."""
    *each, last = rounds
    assert len(each) == moments and last == {"afterwards": True}
    for one in each:
        assert one["reached"] and one["left behind"] == {} and one["files"] == [], one
        assert one["waited"] < 10, one
    return {one["stage"] for one in each}


def test_random_moments_of_a_small_compile(tmp_path: Path) -> None:
    assert "capture" in _check(_interrupted("layer", 8, tmp_path), 8)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["zoo", "loop"])
def test_twenty_random_moments(tmp_path: Path, model: str) -> None:
    # A stage of a millisecond is over before the thread that presses wakes; another then hears it.
    ended = _check(_interrupted(model, 20, tmp_path, seed=1), 20)
    assert "capture" in ended and len(ended) >= 3


@pytest.mark.slow
def test_a_hundred_random_moments_of_a_small_compile(tmp_path: Path) -> None:
    _check(_interrupted("layer", 100, tmp_path), 100)


def _one_process(script: str, *arguments: str) -> str:
    """What a script prints that presses Ctrl-C itself."""
    begin = (
        "import os, signal, sys, threading, time, torch, dsmoe_compiler as dsmoe\n"
        "def press(): os.kill(os.getpid(), signal.SIGINT)\n"
    )
    command = [sys.executable, "-c", begin + script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_waiting_for_a_turn_can_be_interrupted() -> None:
    """While another thread compiles, Ctrl-C ends the wait, not that thread's work."""
    out = _one_process(
        "model, x = torch.nn.Linear(4, 4), torch.ones(2, 4)\n"
        "holding, enough, results = threading.Event(), threading.Event(), []\n"
        "def at(stage):\n"
        "    if stage == 'lower': holding.set(); enough.wait(60)\n"
        "def other(): results.append(dsmoe.compile(model, (x,), progress=at))\n"
        "thread = threading.Thread(target=other); thread.start(); holding.wait()\n"
        "threading.Timer(0.3, press).start()\n"
        "try: dsmoe.compile(model, (x,))\n"
        "except KeyboardInterrupt: print('interrupted', thread.is_alive()); enough.set()\n"
        "thread.join(); print(results[0](x).allclose(model(x), atol=1e-6))\n"
        "print(dsmoe.compile(model, (x,))(x).allclose(model(x), atol=1e-6))"
    )
    assert out.split() == ["interrupted", "True", "True", "True"]


def test_the_first_use_of_a_name_is_an_import_that_is_not_broken_off() -> None:
    """Torn in the middle, an import leaves modules that lack their submodules, and the next compile fails."""
    out = _one_process(
        "threading.Timer(0.05, press).start()\n"
        "try: dsmoe.compile; time.sleep(5)\n"
        "except KeyboardInterrupt: print('interrupted')\n"
        "print('dsmoe_compiler.api' in sys.modules)\n"
        "print(dsmoe.compile(torch.nn.Linear(4, 4), (torch.ones(2, 4),)).report.fused)"
    )
    assert out.split() == ["interrupted", "True", "0"]


def test_a_commands_imports_are_not_broken_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow_to_load.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nwhole = True\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    said = list[str]()
    with pytest.raises(KeyboardInterrupt):
        load_modules(said.append, "slow_to_load")
    assert sys.modules.pop("slow_to_load").whole and said == ["load torch"]


@pytest.mark.parametrize("work", ["program.save(path)", "dsmoe.load(path)"])
def test_saving_and_loading_are_interrupted_between_blocks(work: str, tmp_path: Path) -> None:
    """A file of 100 MB: the first block's digest is the moment."""
    out = _one_process(
        "import dsmoe_compiler.archive as archive\n"
        "path = sys.argv[1]\n"
        "program = dsmoe.compile(torch.nn.Linear(5000, 5000), (torch.ones(2, 5000),), verify='off')\n"
        "program.save(path)\n"
        "real, blocks = archive.sha256, []\n"
        "def count(block):\n"
        "    if len(block) > 1e6: blocks.append(len(block)); len(blocks) == 1 and press()\n"
        "    return real(block)\n"
        "archive.sha256 = count\n"
        f"try: {work}\n"
        "except KeyboardInterrupt: print('interrupted', len(blocks) < 12)\n"
        "archive.sha256 = real\n"
        "print(os.listdir(os.path.dirname(path)), dsmoe.load(path)(torch.ones(1, 5000)).shape[1])",
        str(tmp_path / "p.pt2"),
    )
    assert out.splitlines() == ["interrupted True", "['p.pt2'] 5000"]
