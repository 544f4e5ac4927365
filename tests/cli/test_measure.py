"""The measuring loop: order, rounds and medians; not speed."""

from dsmoe_compiler.cli.measure import Timing, alternate


def test_calls_take_turns_and_the_order_turns_around() -> None:
    order: list[str] = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    times = alternate(calls, budget_seconds=0, warm_up=1, least_rounds=3)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"
    assert {name: len(timing.seconds) for name, timing in times.items()} == {"a": 3, "b": 3}


def test_a_budget_ends_it_and_so_does_the_most_rounds() -> None:
    times = alternate({"a": lambda: None}, budget_seconds=60, most_rounds=7)
    assert len(times["a"].seconds) == 7


def test_the_median_of_all_rounds() -> None:
    assert Timing((3.0, 1.0, 100.0)).median == 3.0
