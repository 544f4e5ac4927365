"""Lists of parameters fold into what one can read, and only where their order is said exactly."""

from dsmoe_compiler.ir.name_lists import fold_names


def names(numbers: range | list[int], form: str = "experts.{}.w1.weight") -> list[str]:
    return [form.format(i) for i in numbers]


def test_a_module_list_is_one_text() -> None:
    assert fold_names(names(range(64))) == ["experts.{0..63}.w1.weight"]


def test_gaps_are_said() -> None:
    assert fold_names(names([0, 1, 2, 5, 7, 8])) == ["experts.{0..2,5,7..8}.w1.weight"]


def test_two_lists_one_after_the_other() -> None:
    both = [*names(range(4)), *names(range(4), "experts.{}.w3.weight")]
    assert fold_names(both) == ["experts.{0..3}.w1.weight", "experts.{0..3}.w3.weight"]


def test_numbers_within_a_name() -> None:
    assert fold_names(names(range(8), "expert_{}.wi.weight")) == ["expert_{0..7}.wi.weight"]
    zeros = ["expert_01.w", "expert_02.w", "expert_03.w"]
    assert fold_names(zeros) == zeros, "they could not be told from expert_1"


def test_what_does_not_ascend_is_written_out() -> None:
    backwards = names([3, 2, 1, 0])
    assert fold_names(backwards) == backwards
    assert fold_names(names([0, 1])) == names([0, 1]), "two are short enough"


def test_names_that_differ_otherwise_are_written_out() -> None:
    mixed = ["a.gate", "a.up", "a.down", "b.0.c.0", "b.1.c.1", "b.2.c.2"]
    assert fold_names(mixed) == mixed
