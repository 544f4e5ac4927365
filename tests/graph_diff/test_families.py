"""Names that differ in numbers become one text, and it says those names and no others."""

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsmoe_compiler.graph_diff.families import Family, families
from dsmoe_compiler.graph_diff.layers import natural


def names_of(text: str) -> set[str]:
    """The names a family's text says."""
    parts = re.split(r"\{([^}]*)\}", text)
    choices = [
        [p] if i % 2 == 0 else [str(n) for run in p.split(",") for n in _numbers(run)]
        for i, p in enumerate(parts)
    ]
    return {"".join(chosen) for chosen in itertools.product(*choices)}


def _numbers(run: str) -> range:
    first, _, last = run.partition("-")
    return range(int(first), int(last or first) + 1)


def test_every_expert_of_every_layer_is_one_line() -> None:
    names = [f"layers.{i}.mlp.experts.{j}.w1" for i in range(1, 28) for j in range(64)]
    assert families(names) == [Family("layers.{1-27}.mlp.experts.{0-63}.w1", 27 * 64)]


def test_what_is_no_combination_stays_apart() -> None:
    names = ["a.0.b.0", "a.0.b.1", "a.1.b.0"]
    assert families(names) == [Family("a.0.b.{0-1}", 2), Family("a.1.b.0", 1)]


@pytest.mark.parametrize(
    "names", [["w1", "w2"], ["x.00", "x.01"], ["a.1", "b.1"], ["v1_x", "v2_x"], ["²", "³"]]
)
def test_numbers_that_are_part_of_a_word_are_letters(names: list[str]) -> None:
    assert [family.text for family in families(names)] == names


def test_underscores_and_slashes_part_numbers_from_words() -> None:
    assert families(["val_3", "val_10", "/l/2/W"]) == [Family("/l/2/W", 1), Family("val_{3,10}", 2)]


def test_order_is_by_the_numbers_worth() -> None:
    texts = [family.text for family in families(["x10w", "x9w", "x10w.1", ""])]
    assert texts == ["", "x9w", "x10w", "x10w.1"]
    assert natural("a2") < natural("a10") < natural("b") and natural("2") < natural("a")


@given(st.lists(st.tuples(*[st.integers(0, 4)] * 3), unique=True))
def test_a_text_says_all_its_names_and_no_other(numbers: list[tuple[int, int, int]]) -> None:
    names = [f"m.{a}.n_{b}/w{c}.{c}" for a, b, c in numbers]
    found = families(names)
    said = [name for family in found for name in names_of(family.text)]
    assert sorted(said) == sorted(names), "each once"
    assert sum(family.count for family in found) == len(names)
