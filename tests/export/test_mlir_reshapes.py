"""Reshapes spelled as merges and splits: the groups of dimensions, and the graph they make."""

from collections.abc import Callable

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from dsmoe_compiler.export.mlir.reshapes import groups, spell_reshapes

B, L = sympy.symbols("b l", integer=True, positive=True)


@pytest.mark.parametrize(
    ("shape", "out", "expected"),
    [
        ((B, L, 96), (B * L, 96), [(0, 2, 0, 1), (2, 3, 1, 2)]),
        ((B * L, 96), (B, L, 96), [(0, 1, 0, 2), (1, 2, 2, 3)]),
        ((B, L, 96), (B, L, 4, 24), [(0, 1, 0, 1), (1, 2, 1, 2), (2, 3, 2, 4)]),
        ((B, L, 96), (B * L, 4, 24), [(0, 2, 0, 1), (2, 3, 1, 3)]),
        ((B, L), (L, B), [(0, 2, 0, 2)]),
        ((B, L, 6), (B, 2, 3 * L), [(0, 1, 0, 1), (1, 3, 1, 3)]),
        ((B, 1, L), (B, L), [(0, 1, 0, 1), (1, 3, 1, 2)]),
        ((B, L), (1, B, L, 1), [(0, 1, 0, 2), (1, 2, 2, 4)]),
        ((B * (L + 1), 2), (B * L + B, 2), [(0, 1, 0, 1), (1, 2, 1, 2)]),
        ((), (1, 1), []),
    ],
)
def test_groups(
    shape: tuple[sympy.Expr, ...], out: tuple[sympy.Expr, ...], expected: list[tuple[int, ...]]
) -> None:
    assert groups(list(map(sympy.sympify, shape)), list(map(sympy.sympify, out))) == expected


class _Reshape(nn.Module):
    def __init__(self, shape_of: Callable[[int, int], tuple[int, ...]]) -> None:
        super().__init__()
        self.shape_of = shape_of

    def forward(self, x: Tensor) -> Tensor:
        return x.view(self.shape_of(x.shape[0], x.shape[1])) + 1


def _spelled(shape_of: Callable[[int, int], tuple[int, ...]]) -> ExportedProgram:
    sizes = ((Dim("b"), Dim("l"), Dim.STATIC),)
    exported = torch.export.export(_Reshape(shape_of), (torch.rand(3, 5, 12),), dynamic_shapes=sizes)
    spell_reshapes(exported.graph)
    exported.graph_module.recompile()
    return exported


SHAPES: dict[str, Callable[[int, int], tuple[int, ...]]] = {
    "merged": lambda b, _: (-1, 12),
    "merged and split": lambda b, n: (b * n, 3, 4),
    "swapped": lambda b, n: (n, b, 12),
    "one": lambda b, n: (b * n * 12,),
    "ones": lambda b, n: (1, b, 1, n * 12, 1),
    "heads": lambda b, n: (b, n, -1, 4),
    "as it was": lambda b, n: (b, n, 12),
}


@pytest.mark.parametrize("name", SHAPES)
@given(b=st.integers(2, 4), n=st.integers(2, 7))
def test_the_graph_computes_the_same(name: str, b: int, n: int) -> None:
    x = torch.rand(b, n, 12)
    (result,) = torch.fx.Interpreter(_SPELLED[name].graph_module).run(x)
    assert torch.equal(result, _Reshape(SHAPES[name])(x))


def test_only_the_reshape_that_changes_nothing_is_left() -> None:
    left = {n for n, e in _SPELLED.items() if any(x.target == _VIEW for x in e.graph.nodes)}
    assert left == {"as it was"}


def test_the_values_have_the_shapes_they_say() -> None:
    for exported in _SPELLED.values():
        for node in exported.graph.nodes:
            if node.op == "call_function" and isinstance(node.meta.get("val"), Tensor):
                args = torch.fx.map_arg(node.args, lambda n: n.meta["val"])
                assert str(node.meta["val"].shape) == str(node.target(*args).shape), node


def test_reshapes_of_fixed_sizes_stay() -> None:
    exported = torch.export.export(_Reshape(lambda b, n: (b * n, 12)), (torch.rand(3, 5, 12),))
    spell_reshapes(exported.graph)
    assert any(node.target == _VIEW for node in exported.graph.nodes)


_VIEW = torch.ops.aten.view.default
_SPELLED = {name: _spelled(shape_of) for name, shape_of in SHAPES.items()}
