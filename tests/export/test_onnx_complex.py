"""Complex values in a program become pairs of real ones: the same numbers, and nothing complex left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx_ir")

import onnxruntime

import dsmoe_compiler as dsmoe
from dsmoe_compiler.export.onnx.complex_pairs import split_complex
from tests.tiny_models import Experts

X, Y = torch.view_as_complex, torch.view_as_real


def _real(c: Tensor) -> Tensor:
    return torch.cat([c.real, c.imag], -1)


# Of a and b (4, 3, 2) float.
COMPUTED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "product": lambda a, b: Y(X(a) * X(b)),
    "by a real": lambda a, b: Y(X(a) * b[..., 0]),
    "a real by it": lambda a, b: Y(b[..., 0] * X(a)),
    "by a number": lambda a, b: Y(X(a) * 2.5),
    "by a complex number": lambda a, b: Y(X(a) * (1.5 - 2j)),
    "a real by a complex number": lambda a, b: Y(b * (1.5 - 2j)),
    "conjugate": lambda a, b: Y((X(a) * X(b).conj()).resolve_conj()),
    "sum and difference": lambda a, b: Y(X(a) + X(b)) - Y(X(b) - 2 * X(a)),
    "scaled sum": lambda a, b: Y(torch.add(X(a), X(b), alpha=3)),
    "a real that is larger": lambda a, b: Y(X(a)[:1] + b[..., 0]),
    "it less a real": lambda a, b: Y(X(a) - b[..., 1]),
    "and a complex number": lambda a, b: Y(X(a) + 2j),
    "by a real quotient": lambda a, b: Y(X(a) / (b[..., 0] + 9) / 2),
    "polar": lambda a, b: Y(torch.polar(a[..., 0], b[..., 0])),
    "of two": lambda a, b: Y(torch.complex(a[..., 0], b[..., 0])),
    "parts": lambda a, b: X(a).real * 2 + X(b).imag,
    "size": lambda a, b: X(a).abs(),
    "moved about": lambda a, b: Y((X(a).unsqueeze(0)[:, 1:].transpose(1, 2) * X(b)[1:].T).reshape(-1)),
    "gathered": lambda a, b: Y(X(a)[torch.tensor([2, 0, 0])].expand(2, 3, 3).sum(0)),
    "joined and cut": lambda a, b: _real(torch.stack(torch.cat([X(a), -X(b)]).chunk(2)).flatten(0, 1)),
    "from reals": lambda a, b: Y(a[..., 0].to(torch.complex64) * X(b)),
}


class Of(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.function(a, b)


@pytest.mark.parametrize("name", COMPUTED)
def test_numbers(name: str) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(4, 3, 2), torch.randn(4, 3, 2)
    exported = torch.export.export(Of(COMPUTED[name]), (a, b))
    split_complex(exported)
    for node in exported.graph.nodes:
        found = node.meta.get("val")
        assert not isinstance(found, Tensor) or not found.is_complex(), node
    exported.graph_module.recompile()
    expected = COMPUTED[name](a, b)
    found = exported.module(check_guards=False)(a, b)
    torch.testing.assert_close(found, expected)


def test_sizes_stay_symbols() -> None:
    sizes = {0: torch.export.Dim.DYNAMIC}
    exported = torch.export.export(
        Of(COMPUTED["moved about"]),
        (torch.randn(4, 3, 2), torch.randn(4, 3, 2)),
        dynamic_shapes={"a": sizes, "b": sizes},
    )
    split_complex(exported)
    exported.graph_module.recompile()
    a, b = torch.randn(7, 3, 2), torch.randn(7, 3, 2)
    torch.testing.assert_close(exported.module(check_guards=False)(a, b), COMPUTED["moved about"](a, b))


class Inner(nn.Module):
    def forward(self, a: Tensor) -> Tensor:
        return Y(X(a).exp())


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rotary = Inner()

    def forward(self, a: Tensor) -> Tensor:
        return self.rotary(a)  # type: ignore[no-any-return]


def test_an_unknown_operator_is_named_with_its_module() -> None:
    exported = torch.export.export(Outer(), (torch.randn(3, 2),))
    with pytest.raises(dsmoe.ExportError, match=r"^ONNX .*complex numbers: aten.exp.default in rotary$"):
        split_complex(exported)


@pytest.mark.parametrize("function", [lambda a: a.real, lambda a: torch.complex(a, a)])
def test_complex_ends_are_refused(function: Callable[[Tensor], Tensor]) -> None:
    class Ends(nn.Module):
        def forward(self, a: Tensor) -> Tensor:
            return function(a)

    given = (
        torch.randn(3, dtype=torch.complex64)
        if function(torch.ones(1)).is_floating_point()
        else torch.randn(3)
    )
    with pytest.raises(dsmoe.ExportError, match="complex"):
        split_complex(torch.export.export(Ends(), (given,)))


class Rotated(nn.Module):
    """Tokens (T, 16) through a layer, each then turned by a table of the model's."""

    turns: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = Experts()
        angles = torch.outer(torch.arange(64.0), 10 ** -torch.arange(8.0))
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(self.layer(x).reshape(x.shape[0], -1, 2))
        return torch.view_as_real(pairs * self.turns[: x.shape[0]]).flatten(-2)


def test_a_complex_table_in_onnxruntime(tmp_path: Path) -> None:
    model = Rotated()
    program = dsmoe.compile(model, (torch.randn(5, 16),))
    exported = dsmoe.export_onnx(program, path=tmp_path / "rotated.onnx")
    assert [layer.form for layer in exported.layers] == ["Split"]
    assert model.turns.is_complex()
    x = torch.randn(9, 16)
    with torch.no_grad():
        expected = program(x)  # the program is as it was
    (found,) = onnxruntime.InferenceSession(exported.path).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(expected, model(x).detach(), rtol=2e-5, atol=2e-5)
