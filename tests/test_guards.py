"""Conditions on sizes: read from torch's text, told in the user's words, and nothing else is ever run."""

import pytest

from dsmoe_compiler.guards import conditions

NAMES = {"L['x']": "x", "L['d']['a'][0]": "d['a'][0]"}


@pytest.mark.parametrize(
    ("guard", "text", "size", "holds"),
    [
        ("L['x'].size()[0] > 4", "x.shape[0] > 4", 4, False),
        ("(L['x'].size()[0] % 4) == 0", "x.shape[0] % 4 == 0", 8, True),
        ("max(3, L['x'].size()[0]) == 3", "max(3, x.shape[0]) == 3", 4, False),
        ("math.floor(L['x'].size()[0] / 2) == 2", "math.floor(x.shape[0] / 2) == 2", 5, True),
        ("4 // L['x'].size()[0] == 2", "4 // x.shape[0] == 2", 0, False),
    ],
)
def test_a_condition(guard: str, text: str, size: int, holds: bool) -> None:
    (condition,) = conditions([guard], NAMES)
    assert condition.text == text
    assert condition.holds({("L['x']", 0): size}) is holds


def test_nested_inputs_have_their_own_names() -> None:
    (condition,) = conditions(["L['d']['a'][0].size()[1] == L['x'].size()[0]"], NAMES)
    assert condition.text == "d['a'][0].shape[1] == x.shape[0]"
    assert condition.holds({("L['d']['a'][0]", 1): 3, ("L['x']", 0): 3})


@pytest.mark.parametrize(
    ("guard", "doubtful"),
    [
        ("L['x'].size()[0] != 1", True),
        ("(16*L['x'].size()[0]) != 16", True),
        ("L['x'].size()[0]*L['x'].size()[1] != 1", True),
        ("L['x'].size()[0] > 1", True),
        ("(L['x'].size()[0]*L['x'].size()[1]//16) != 1", True),
        ("(L['x'].size()[0]*L['x'].size()[1]//16) != 4", False),
        ("4*max(1, L['x'].size()[0]*L['x'].size()[1]//16) != 4", True),
        ("L['x'].size()[0] != 4", False),
        ("L['x'].size()[0] != 4096", False),
        ("16*L['x'].size()[0] != 65536", False),
        ("L['x'].size()[0] > L['x'].size()[1]", False),
    ],
)
def test_what_only_sizes_0_and_1_break_is_doubtful(guard: str, doubtful: bool) -> None:
    (condition,) = conditions([guard], NAMES)
    assert condition.doubtful is doubtful


@pytest.mark.parametrize(
    "guard",
    [
        "__import__('os').system('true') == L['x'].size()[0]",
        "L['x'].size()[0].__class__",
        "(lambda: L['x'].size()[0])()",
        "math.__dict__ == L['x'].size()[0]",
        "L['unknown'].size()[0] == 1",
        "3 == 4",
    ],
)
def test_anything_else_is_left_alone(guard: str) -> None:
    assert conditions([guard], NAMES) == ()
