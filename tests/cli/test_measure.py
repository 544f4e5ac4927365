"""The measuring loop: order, rounds and medians; not speed."""

from collections.abc import Callable

import pytest

from dsmoe_compiler.cli import measure
from dsmoe_compiler.cli.measure import LEAST_ROUNDS, Rounds, interleaved


def _silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which nothing else runs."""
    monkeypatch.setattr(measure, "_preemptions", lambda: 0)


def test_calls_take_turns_the_order_turns_around_and_each_knows_its_round() -> None:
    order: list[str] = []

    def call(name: str) -> Callable[[int], None]:
        return lambda i: order.append(f"{name}{i}")

    interleaved({"a": call("a"), "b": call("b")}, 3)
    assert order == ["a0", "b0"] + ["b0", "a0"] + ["a1", "b1"] + ["b2", "a2"]


def test_what_comes_before_a_call_is_not_timed() -> None:
    now = [0.0]

    def passing(seconds: float) -> Callable[[int], None]:
        return lambda i: now.__setitem__(0, now[0] + seconds)

    found = interleaved({"a": passing(1.0)}, 3, lambda: now[0], before={"a": passing(100.0)})
    assert set(found.seconds["a"]) == {1.0}


def test_the_calmer_half_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    now, taken = [0.0], [0]
    monkeypatch.setattr(measure, "_preemptions", lambda: taken[0])

    def call(i: int) -> None:
        disturbed = i % 2 == 1
        taken[0] += disturbed
        now[0] += 50.0 if disturbed else 1.0

    found = interleaved({"a": call}, 6, lambda: now[0])
    assert (found.seconds["a"], found.kept, found.discarded) == ((1.0, 1.0, 1.0), 3, 3)


def test_a_spent_budget_ends_it_but_not_before_the_least_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    _silent(monkeypatch)
    found = interleaved({"a": lambda i: None}, 100, budget_seconds=0)
    assert found.kept + found.discarded == LEAST_ROUNDS


def test_the_most_rounds_end_it_too() -> None:
    found = interleaved({"a": lambda i: None}, 7, budget_seconds=60)
    assert found.kept + found.discarded == 7


def test_medians_and_the_median_of_the_rounds_own_ratios() -> None:
    found = Rounds({"slow": (2.0, 30.0, 8.0), "fast": (1.0, 10.0, 2.0)}, 0)
    assert (found.median("slow"), found.median("fast")) == (8.0, 2.0)
    assert found.ratio("slow", "fast") == 3.0
