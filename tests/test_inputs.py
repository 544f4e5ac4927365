"""How a program is called: as the model is, with a clear word on what does not fit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import dsmoe_compiler as dsmoe
from tests.tiny_models import Experts, tokens


class _Model(nn.Module):
    """out (T, 16) from x (T, 16), an optional bias (T, 16), and constants."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Experts()

    def forward(
        self, x: Tensor, bias: Tensor | None = None, scale: float = 1.0, *, twice: bool = False
    ) -> Tensor:
        out: Tensor = self.layer(x) * scale
        out = out if bias is None else out + bias
        return out * 2 if twice else out


x_TD = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
MODEL = _Model()


@pytest.fixture(scope="module")
def by_position() -> dsmoe.Program:
    return dsmoe.compile(MODEL, (x_TD, x_TD), {"twice": True})


@pytest.fixture(scope="module")
def by_keyword() -> dsmoe.Program:
    return dsmoe.compile(MODEL, (), {"bias": x_TD, "x": x_TD, "scale": 3.0})


CALLS: dict[str, Callable[[Callable[..., Any]], Any]] = {
    "as captured": lambda f: f(x_TD, x_TD, twice=True),
    "by keyword": lambda f: f(bias=x_TD, x=x_TD, twice=True),
    "mixed": lambda f: f(x_TD, bias=x_TD, twice=True),
    "a default given": lambda f: f(x_TD, x_TD, 1.0, twice=True),
    "a constant left out": lambda f: f(x_TD, x_TD),
}


@pytest.mark.parametrize("how", CALLS)
def test_captured_by_position(by_position: dsmoe.Program, how: str) -> None:
    with torch.no_grad():
        assert CALLS[how](by_position).allclose(MODEL(x_TD, x_TD, twice=True), atol=1e-5)


def test_captured_by_keyword_called_by_position(by_keyword: dsmoe.Program) -> None:
    with torch.no_grad():
        expected = MODEL(x_TD, x_TD, 3.0)
        assert by_keyword(x_TD, x_TD, 3.0).allclose(expected, atol=1e-5)
        assert by_keyword(x_TD, scale=3.0, bias=x_TD).allclose(expected, atol=1e-5)


MISFITS: dict[str, tuple[Callable[[Callable[..., Any]], Any], str]] = {
    "nothing": (lambda f: f(), "argument 'x' is missing"),
    "one missing": (lambda f: f(x_TD), "argument 'bias' is missing"),
    "given twice": (lambda f: f(x_TD, x_TD, x=x_TD), "argument 'x' is given twice"),
    "surplus by name": (
        lambda f: f(x_TD, x_TD, colour=x_TD),
        "argument 'colour' was not part of the captured call",
    ),
    "surplus by name, and nothing": (lambda f: f(x_TD, x_TD, colour=None), "argument 'colour' was not part"),
    "surplus by position": (lambda f: f(x_TD, x_TD, 1.0, x_TD), "4 arguments by position"),
    "another constant": (
        lambda f: f(x_TD, x_TD, twice=False),
        "twice is False; the program was captured for True",
    ),
    "another default": (lambda f: f(x_TD, x_TD, 2.0), "argument 'scale' was not part of the captured call"),
    "a number for a tensor": (lambda f: f(x_TD, 3), "bias is a int, the program takes a tensor there"),
    "a list for a tensor": (lambda f: f([x_TD], x_TD), "another structure than the captured call"),
    "None for a tensor": (lambda f: f(x_TD, None), "bias is a NoneType"),
}


@pytest.mark.parametrize("how", MISFITS)
def test_what_does_not_fit_is_said_in_one_line(by_position: dsmoe.Program, how: str) -> None:
    call, says = MISFITS[how]
    with pytest.raises(dsmoe.InputError) as caught:
        call(by_position)
    assert says in str(caught.value) and "\n" not in str(caught.value)


SHAPES: dict[str, tuple[tuple[Tensor, Tensor], str]] = {
    "rank": ((x_TD[None], x_TD), "x has 3 dimensions, the program takes 2"),
    "a static size": ((torch.ones(5, 17), x_TD), "x: dimension 1 is 17, the program takes 16 only"),
    "sizes that must agree": (
        (x_TD, x_TD[:4]),
        "bias: dimension 0 is 4, but x: dimension 0 is 5 and they are one size",
    ),
    "dtype": ((x_TD.double(), x_TD), "x is torch.float64, the program takes torch.float32"),
    "ids for numbers": ((x_TD, x_TD.long()), "bias is torch.int64, the program takes torch.float32"),
}


@pytest.mark.parametrize("what", SHAPES)
def test_a_shape_outside_what_was_captured(by_position: dsmoe.Program, what: str) -> None:
    args, says = SHAPES[what]
    with pytest.raises(dsmoe.ShapeError) as caught:
        by_position(*args, twice=True)
    assert str(caught.value) == says


def _branch(x: Tensor, y: Tensor) -> Tensor:
    return x.sum() * 2 + y.sum() if x.shape[0] > y.shape[0] else x.sum()


CONDITIONS: dict[
    str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...], str]
] = {
    "one size larger than another": (
        _branch,
        ((6, 3), (4, 3)),
        ((4, 3), (6, 3)),
        "x: dimension 0 is 4, the program takes sizes with x.shape[0] > y.shape[0] only",
    ),
    "even": (
        lambda x: x * 2 if x.shape[0] % 2 == 0 else x,
        ((4, 3),),
        ((5, 3),),
        "x: dimension 0 is 5, the program takes sizes with x.shape[0] % 2 == 0 only",
    ),
    "a least size": (
        lambda x: x * 2 if x.shape[0] >= 4 else x,
        ((5, 3),),
        ((3, 3),),
        "x: dimension 0 is 3, the program takes 4 and more",
    ),
    "not 1": (
        lambda x: x * 2 if x.shape[0] != 1 else x,
        ((5, 3),),
        ((1, 3),),
        "x: dimension 0 is 1, the program takes sizes with x.shape[0] != 1 only",
    ),
    "rows of a view not 1": (
        lambda x: x.view(-1, 4) * (2 if x.view(-1, 4).shape[0] != 1 else 1),
        ((3, 4),),
        ((1, 4),),
        "x: dimension 1 is 4, the program takes sizes with x.shape[1] * x.shape[0] // 4 != 1 only",
    ),
}


@pytest.mark.parametrize("what", CONDITIONS)
def test_a_branch_on_sizes_is_held_to(what: str) -> None:
    function, example, misfit, says = CONDITIONS[what]
    program = dsmoe.compile(function, tuple(torch.randn(size) for size in example))
    for size in (1, 2):
        inputs = tuple(torch.randn(size * shape[0], *shape[1:]) for shape in example)
        assert program(*inputs).allclose(function(*inputs))
    with pytest.raises(dsmoe.ShapeError) as caught:
        program(*(torch.randn(size) for size in misfit))
    assert str(caught.value) == says


def test_what_passed_once_passes_in_its_place_only() -> None:
    """Shapes that were taken are remembered by argument."""
    made = dsmoe.compile(lambda x, n: x * n, (torch.ones(3, 4), 2))
    made(torch.ones(3, 4), 2)
    with pytest.raises(dsmoe.DsmoeError):
        made(2, torch.ones(3, 4))
    with pytest.raises(dsmoe.DsmoeError):
        made(torch.ones(3, 4), 3)
    with pytest.raises(dsmoe.DsmoeError):
        made(torch.ones(3, 4).double(), 2)


def test_a_sum_over_the_rows_of_a_view_takes_one_row() -> None:
    """torch asks whether there is more than one, and the answer is the same."""

    def function(x: Tensor) -> Tensor:
        rows = x.view(-1, 4)
        return torch.einsum("td,te->de", rows, rows)

    program = dsmoe.compile(function, (torch.randn(2, 3, 4),))
    for size in ((2, 3, 4), (1, 1, 4), (1, 5, 4)):
        x = torch.randn(size)
        assert program(x).allclose(function(x), atol=1e-6)


def test_a_branch_on_size_1_taken_by_the_example() -> None:
    program = dsmoe.compile(lambda x: x * 2 if x.shape[0] == 1 else x, (torch.ones(1, 3),))
    assert program(torch.ones(1, 3)).equal(torch.full((1, 3), 2.0))
    with pytest.raises(dsmoe.ShapeError, match="x: dimension 0 is 2, the program takes 1 only"):
        program(torch.ones(2, 3))


def _nested(data: dict[str, Any], *, extra: list[Tensor]) -> Tensor:
    return data["a"][0] + data["a"][1]["z"] * data["n"] + extra[0]  # type: ignore[no-any-return]


def test_nested_inputs() -> None:
    def data(rows: int) -> tuple[dict[str, Any], list[Tensor]]:
        return {"a": (torch.ones(rows, 3), {"z": torch.ones(rows, 3)}), "n": 2}, [torch.ones(rows, 3)]

    given, extra = data(4)
    program = dsmoe.compile(_nested, (given,), {"extra": extra})
    given, extra = data(1)
    backwards = {key: given[key] for key in reversed(given)}
    assert program(backwards, extra=extra).equal(torch.full((1, 3), 4.0))
    given["a"][1]["z"] = torch.ones(2, 3)
    with pytest.raises(
        dsmoe.ShapeError, match=r"data\['a'\]\[1\]\['z'\]: dimension 0 is 2, but data\['a'\]\[0\]"
    ):
        program(given, extra=extra)
    with pytest.raises(dsmoe.InputError, match=r"data\['n'\] is 3; the program was captured for 2"):
        program({**data(1)[0], "n": 3}, extra=extra)


def test_any_number_of_arguments() -> None:
    program = dsmoe.compile(lambda *xs: torch.cat(xs, 1).view(-1, 4), (torch.ones(4, 3), torch.ones(4, 5)))
    assert program(torch.ones(1, 2), torch.ones(1, 2)).shape == (1, 4)
    with pytest.raises(
        dsmoe.ShapeError, match=r"xs_0.shape\[0\] \* \(xs_0.shape\[1\] \+ xs_1.shape\[1\]\) % 4 == 0"
    ):
        program(torch.ones(1, 2), torch.ones(1, 3))
    with pytest.raises(dsmoe.InputError, match="1 arguments by position and 0 by name do not fit"):
        program(torch.ones(1, 2))


def test_one_tensor_given_twice_is_two_arguments() -> None:
    program = dsmoe.compile(lambda a, b: a - b, (x_TD, x_TD))
    assert program(x_TD, torch.zeros(5, 16)).equal(x_TD)


FORMS: dict[str, Any] = {
    "a dict by name": {"x": {0: Dim("rows", min=2, max=6)}},
    "a tuple by position": ({0: Dim("rows", min=2, max=6)},),
    "hints": ({0: Dim.DYNAMIC(min=2, max=6), 1: Dim.STATIC},),
}


@pytest.mark.parametrize("form", FORMS)
def test_dynamic_shapes_of_the_users_own(form: str) -> None:
    layer = Experts()
    program = dsmoe.compile(lambda x: layer(x), (x_TD,), dynamic_shapes=FORMS[form], require_fused=True)
    assert program(x_TD[:2]).shape == (2, 16)
    for rows in (1, 7):
        with pytest.raises(dsmoe.ShapeError, match=f"x: dimension 0 is {rows}, the program takes 2 to 6"):
            program(torch.ones(rows, 16))


def test_static_shapes() -> None:
    program = dsmoe.compile(nn.Linear(3, 3), (torch.ones(4, 3),), dynamic_shapes=None)
    with pytest.raises(dsmoe.ShapeError, match="input: dimension 0 is 5, the program takes 4 only"):
        program(torch.ones(5, 3))


@pytest.mark.parametrize("shapes", [{"y": {0: Dim.AUTO}}, ({0: Dim.AUTO}, {0: Dim.AUTO}), ({0: "rows"},)])
def test_dynamic_shapes_that_do_not_fit(shapes: Any) -> None:
    with pytest.raises(dsmoe.DsmoeError) as caught:
        dsmoe.compile(nn.Linear(3, 3), (torch.ones(4, 3),), dynamic_shapes=shapes)
    assert "dynamic_shapes" in str(caught.value) and "\n" not in str(caught.value)


def test_integer_widths_are_one() -> None:
    embedding = nn.Embedding(512, 8)
    program = dsmoe.compile(embedding, (tokens(2, 3),))
    assert program(tokens(4, 5).int()).equal(embedding(tokens(4, 5)))
    assert program(tokens(4, 5).t()).equal(embedding(tokens(4, 5).t()))


def test_the_ranges_are_named() -> None:
    program = dsmoe.compile(Experts(), (x_TD,))
    assert program.inputs.ranges() == {"x[0]": (0, None)}
