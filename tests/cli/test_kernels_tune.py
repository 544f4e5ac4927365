"""`dsmoe kernels --tune`: what is measured, what may win, what is kept; timed by a list instead of a clock,
and run by Triton's interpreter instead of a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

from dsmoe_compiler.codegen.choice import Choice
from dsmoe_compiler.codegen.gpu import for_target
from dsmoe_compiler.codegen.layer import Layer
from dsmoe_compiler.codegen.lowering import module_of
from dsmoe_compiler.codegen.tiles import Decode, Problem
from dsmoe_compiler.runtime import trials, tune
from dsmoe_compiler.runtime.fused_layers import FusedLayer
from tests.cli.fakes import run, wrong
from tests.codegen.interpreted import interpreter

SMALL = "tests.cli.small_model:build"


@dataclass
class FakeClock:
    """Runs each call once, and says in turn what it was told to; after that, always the last."""

    microseconds: list[float]
    timed: int = 0

    def __call__(self, calls: Sequence[Callable[[], object]]) -> float:
        assert len(calls) >= trials.ROUTINGS
        for call in calls[1:2]:
            call()
        self.timed += 1
        return self.microseconds[min(self.timed, len(self.microseconds)) - 1]


@dataclass
class Here:
    """The GPU at hand, which is none, and the user's folder of plans."""

    cache: Path
    clock: FakeClock = field(default_factory=lambda: FakeClock([100.0]))

    @property
    def kept(self) -> dict[str, dict[str, Any]]:
        """The plans in the user's cache, by their problem."""
        (file,) = self.cache.rglob("*.json")
        (entries,) = json.loads(file.read_text())["entries"].values()
        return dict(entries)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Here]:
    """Plans are measured on the CPU, few of them."""
    here = Here(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(
        trials,
        "bench_here",
        lambda: trials.Bench(torch.device("cpu"), for_target("sm_90"), here.clock),
    )
    monkeypatch.setattr(tune.tune, "__defaults__", (3,))
    monkeypatch.setattr(tune, "_OF_EACH", 1)
    monkeypatch.setattr(trials, "_MOST_COPIES", 2)
    with interpreter():
        yield here


def tuned(*arguments: str) -> Result:
    result = run("kernels", *arguments, "--tune")
    assert result.exit_code == 0, result.stderr
    return result


def test_the_fastest_is_kept_and_used(gpu: Here) -> None:
    gpu.clock.microseconds = [100.0, 80.0, 50.0, 90.0]
    shown = tuned(SMALL, "-T", "3", "--layer", "0").stdout.splitlines()
    assert shown[0] == "measured on NVIDIA H200 (sm_90)"
    old, new = (line.split() for line in shown[-2:])
    assert old[:3] == ["4", "old", "decode"] and old[-1] == "100.0"
    assert new[:2] == ["new", "decode"] and new[-2:] == ["50.0", "2.00×"]
    (entry,) = gpu.kept.values()
    assert entry["microseconds"] == 50.0
    (layer,) = json.loads(run("kernels", SMALL, "-T", "4", "--layer", "0", "--json").stdout)["kernels"]
    (plan,) = layer["plans"]
    assert (plan["from"], plan["measured_microseconds"]) == ("yours", 50.0)
    assert {"kind": plan["kernels"], "up": plan["up"], "down": plan["down"]} == entry["plan"]
    table = run("kernels", SMALL, "-T", "4", "--layer", "0").stdout
    assert "measured" in table and " 50.0  yours\n" in table


def test_a_plan_that_was_best_is_kept(gpu: Here) -> None:
    gpu.clock.microseconds = [10.0, 80.0]
    shown = tuned(SMALL, "-T", "1", "--layer", "0").stdout
    assert "\n1  kept decode " in shown and "new" not in shown


def test_layers_that_a_plan_cannot_tell_apart_are_measured_once(gpu: Here) -> None:
    result = tuned(SMALL, "-T", "1", "-T", "1", "--json")
    (found,) = json.loads(result.stdout)["tuned"]
    assert found["layers"] == ["0"] and found["measured"] == gpu.clock.timed > 1
    assert "note: 1 at T=1 is as 0\n" in result.stderr


def spoil(monkeypatch: pytest.MonkeyPatch, wrong: Callable[[int], bool], by: str) -> None:
    """Let the modules whose number is wrong return something else."""
    made = count()

    def broken(layer: Layer, choice: Choice) -> str:
        text = module_of(layer, choice)
        return text.replace("return out", f"return out {by}") if wrong(next(made)) else text

    monkeypatch.setattr(trials, "module_of", broken)


def test_a_wrong_plan_cannot_win(gpu: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, lambda number: number > 0, "* 1.01")
    gpu.clock.microseconds = [100.0, 1.0]
    result = tuned(SMALL, "-T", "1", "--layer", "0", "--json")
    (found,) = json.loads(result.stdout)["tuned"]
    assert found["new"]["microseconds"] == 100.0
    assert found["measured"] == gpu.clock.timed == 1 and found["failed"]
    assert "differs from the reference by 1.0e-02" in result.stderr


def test_a_plan_in_use_that_fails_is_replaced(gpu: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, lambda number: number == 0, "+ torch.nan")
    shown = tuned(SMALL, "-T", "1", "--layer", "0").stdout
    assert "1  old failed\n" in shown and "   new decode " in shown


def test_where_every_plan_fails_nothing_is_kept(gpu: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, lambda number: True, "+ 1")
    result = run("kernels", SMALL, "-T", "1", "--layer", "0", "--tune")
    assert result.exit_code == 70 and "no plan for tokens=1,hidden=16" in result.stderr
    assert not list(gpu.cache.rglob("*.json"))


@dataclass
class FakeTrials:
    """Says that every grouped plan is slower than the next, and the layer faster by a quarter without its
    shared experts.
    """

    fused: FusedLayer
    problem: Problem
    bench: trials.Bench
    measured: int = 0
    failed: tuple[()] = ()

    def run(self, choice: Choice) -> trials.Trial:
        self.measured += 1
        decode = 1000.0 if isinstance(choice.plan, Decode) else 0.0
        return trials.Trial(choice, 1000.0 - self.measured + decode, 0.0)

    def better(self, best: trials.Trial, choice: Choice) -> trials.Trial:
        return min(best, self.run(choice), key=lambda trial: trial.microseconds)

    def without_shared(self, choice: Choice) -> float:
        return 0.75 * (1000.0 - self.measured)


def test_shared_experts_have_a_plan_of_their_own(gpu: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "Trials", FakeTrials)
    (found,) = json.loads(tuned("deepseek-moe-tiny", "-T", "16384", "--json").stdout)["tuned"]
    (own,) = (entry for problem, entry in gpu.kept.items() if "experts=1," in problem)
    assert own["microseconds"] == pytest.approx(0.25 * found["new"]["microseconds"])
    assert own["plan"] == {"kind": "grouped", **found["new"]["shared"]}
    assert found["new"]["shared"] != found["old"]["shared"] and found["new"]["plan"] != found["old"]["plan"]


def test_without_a_gpu_it_is_one_line() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert wrong("kernels", SMALL, "--tune") == "--tune measures on a GPU, and torch sees none here"


@pytest.mark.parametrize("options", [("--arch", "sm_80"), ("--gpu", "H100"), ("--emit", "ptx")])
def test_the_gpu_at_hand_is_the_one(options: tuple[str, str]) -> None:
    assert "leave out --emit, --arch and --gpu." in wrong("kernels", SMALL, "--tune", *options)
