"""Models whose names, routing or arguments could be mistaken for others."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx_ir")

import onnx

import dsmoe_compiler as dsmoe
from tests.tiny_models import Experts

Choose = Callable[[Tensor], tuple[Tensor, Tensor]]


def _normal(*size: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(size, generator=torch.Generator().manual_seed(sum(size))) * 0.3)


class _Layer(nn.Module):
    """A layer (T, 16) -> (T, 16) routed by what `choose` makes of 8 experts' scores; matrices (in, out)."""

    def __init__(self, choose: Choose = lambda scores: scores.softmax(-1).topk(2), hidden: int = 16) -> None:
        super().__init__()
        self.choose, self.gate = choose, _normal(8, 16)
        self.fc1, self.fc2 = _normal(8, 16, hidden), _normal(8, hidden, 16)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.choose(F.linear(x, self.gate))
        pairs, rows = ids.reshape(-1), x.repeat_interleave(ids.shape[1], 0)
        h = torch.bmm(rows.unsqueeze(1), self.fc1[pairs]).squeeze(1).relu()
        y = torch.bmm(h.unsqueeze(1), self.fc2[pairs]).squeeze(1)
        return (y * weights.reshape(-1, 1)).view(*ids.shape, y.shape[-1]).sum(1)


def _x(rows: int = 9) -> Tensor:
    return torch.randn(rows, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("hidden", [16, 24])
def test_a_layer_whose_own_weights_have_the_names_of_products(tmp_path: Path, hidden: int) -> None:
    exported = dsmoe.export_onnx(_Layer(hidden=hidden), (_x(),), path=tmp_path / "m.onnx", target="ort")
    assert [layer.form for layer in exported.layers] == ["MoE"]


def _added_below_zero(scores: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = scores.softmax(-1).topk(2)
    return torch.add(weights, weights.sigmoid(), alpha=-3), ids


def _clamped_below_zero(scores: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = scores.softmax(-1).topk(2)
    return weights.clamp(min=0.0, max=-1.0) * weights, ids


def _softplus_below_zero(scores: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = scores.topk(2)
    return F.softplus(weights, beta=-1.0), ids


def _wrapped_below_zero(scores: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = scores.softmax(-1).topk(2)
    return (weights * 1000).to(torch.uint8).to(torch.int8).float(), ids


_BELOW_ZERO = (_added_below_zero, _clamped_below_zero, _softplus_below_zero, _wrapped_below_zero)


@pytest.mark.parametrize("choose", _BELOW_ZERO)
def test_weights_that_may_be_negative_take_the_standard_form(tmp_path: Path, choose: Choose) -> None:
    exported = dsmoe.export_onnx(_Layer(choose), (_x(),), path=tmp_path / "m.onnx", target="ort")
    (layer,) = exported.layers
    assert (layer.form, layer.remark) == ("Split", "not com.microsoft::MoE: routing weights may be negative")


def _ids_of_one_bit(scores: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = scores.softmax(-1).topk(3)
    return weights, ids.bool().long()


def _normalised_often(scores: Tensor) -> tuple[Tensor, Tensor]:
    scores = scores.exp()
    for _ in range(60):
        scores = scores / scores.sum(1, keepdim=True)
    return scores.topk(2)


def test_ids_in_fewer_bits_may_be_the_same(tmp_path: Path) -> None:
    exported = dsmoe.export_onnx(_Layer(_ids_of_one_bit), (_x(),), path=tmp_path / "m.onnx", target="ort")
    assert [layer.form for layer in exported.layers] == ["Split"]


def test_weights_normalised_many_times_are_judged_in_one_walk(tmp_path: Path) -> None:
    exported = dsmoe.export_onnx(_Layer(_normalised_often), (_x(),), path=tmp_path / "m.onnx", target="ort")
    assert [layer.form for layer in exported.layers] == ["MoE"]


def _tiny(scores: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = scores.softmax(-1).topk(2)
    return weights * 1e-32, ids


def test_tiny_weights_keep_their_ratios(tmp_path: Path) -> None:
    exported = dsmoe.export_onnx(_Layer(_tiny), (_x(),), path=tmp_path / "m.onnx", target="ort")
    assert [layer.form for layer in exported.layers] == ["MoE"]


class _Before(nn.Module):
    """A product with a matrix of the model, by its name, then a layer."""

    def __init__(self, read: Callable[[Tensor], Tensor], name: str = "matrix") -> None:
        super().__init__()
        self.read, self.name, self.layer = read, name, Experts()
        self.register_parameter(name, _normal(16, 16))

    def forward(self, given: Tensor) -> Tensor:
        matrix = self.get_parameter(self.name)
        return self.layer(given @ self.read(matrix))  # type: ignore[no-any-return]


class _Beside(_Before):
    """With the matrix's own product added."""

    def forward(self, given: Tensor) -> Tensor:
        return super().forward(given) + given @ self.get_parameter(self.name)


# An input, an output, and a value of torch's.
@pytest.mark.parametrize("name", ["given", "output", "t"])
def test_a_matrix_called_as_something_else_is(tmp_path: Path, name: str) -> None:
    exported = dsmoe.export_onnx(_Beside(Tensor.t, name), (_x(),), path=tmp_path / "m.onnx")
    graph = onnx.load(exported.path, load_external_data=False).graph
    (result,) = graph.output
    assert [d.dim_param or d.dim_value for d in result.type.tensor_type.shape.dim] == ["tokens", 16]
    assert [v.name for v in (*graph.input, *graph.output)] == ["given", "output"]


def test_a_permutation_that_exchanges_nothing_is_no_transpose(tmp_path: Path) -> None:
    exported = dsmoe.export_onnx(_Before(lambda w: w.permute(0, 1)), (_x(),), path=tmp_path / "m.onnx")
    assert exported.error is not None and exported.error < 1e-5


def test_a_layer_of_one_product_called_weight(tmp_path: Path) -> None:
    class OneProduct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.weight = _normal(8, 16), _normal(8, 16, 16)

        def forward(self, x: Tensor) -> Tensor:
            weights, ids = F.linear(x, self.gate).softmax(-1).topk(2)
            rows = x.repeat_interleave(2, 0).unsqueeze(-1)
            y = torch.bmm(self.weight[ids.reshape(-1)], rows).squeeze(-1)
            return (y * weights.reshape(-1, 1)).view(*ids.shape, 16).sum(1)

    exported = dsmoe.export_onnx(OneProduct(), (_x(),), path=tmp_path / "m.onnx")
    assert [layer.form for layer in exported.layers] == ["Split"]


class _OneMatrix(nn.Module):
    """A layer whose second product is its first one's matrix, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.matrix = _normal(8, 16), _normal(8, 16, 16)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = F.linear(x, self.gate).softmax(-1).topk(2)
        matrices, rows = self.matrix[ids.reshape(-1)], x.repeat_interleave(2, 0).unsqueeze(-1)
        y = torch.bmm(matrices.transpose(1, 2), torch.bmm(matrices, rows).relu()).squeeze(-1)
        return (y * weights.reshape(-1, 1)).view(*ids.shape, 16).sum(1)


def test_a_matrix_of_two_products_is_refused_when_quantised(tmp_path: Path) -> None:
    with pytest.raises(dsmoe.InputError, match=r"matrix\.0: read both as it is and transposed"):
        dsmoe.export_onnx(_OneMatrix(), (_x(),), path=tmp_path / "m.onnx", weights="int8", verify=False)
    assert dsmoe.export_onnx(_OneMatrix(), (_x(),), path=tmp_path / "m.onnx").error is not None


def test_a_program_s_example_is_held_to_be_a_tuple(tmp_path: Path) -> None:
    program = dsmoe.compile(Experts(), (_x(),))
    wrong: Any = _x()
    with pytest.raises(dsmoe.InputError, match=r"args is a Tensor: .* args=\(x,\)"):
        dsmoe.export_onnx(program, wrong, path=tmp_path / "m.onnx")


@pytest.mark.parametrize("hidden", [16, 128])  # matrices in the model's own file, and beside it
def test_an_infinite_weight_that_is_to_be_quantised_is_named(tmp_path: Path, hidden: int) -> None:
    layer = _Layer(hidden=hidden)
    layer.fc2.data[1, 2, 3] = math.inf
    with pytest.raises(dsmoe.InputError, match=r"^fc2\.1: weights to quantise are finite"):
        dsmoe.export_onnx(layer, (_x(),), path=tmp_path / "m.onnx", weights="int8")
    assert not list(tmp_path.iterdir())


def test_a_model_without_weights_has_no_file_of_them(tmp_path: Path) -> None:
    exported = dsmoe.export_onnx(nn.Identity(), (_x(),), path=tmp_path / "m.onnx")
    assert exported.data is None and [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_a_link_is_followed_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link, there = tmp_path / "link.onnx", tmp_path / "there" / "m.onnx"
    os.symlink(there, link)
    exported = dsmoe.export_onnx(Experts(), (_x(),), path=link)
    assert link.is_symlink() and exported.path == there
    assert exported.data == there.with_name("m.onnx.data") and exported.data.exists()


def test_a_model_that_is_one_layer_is_named_where_it_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dsmoe_compiler.export.onnx import model as making
    from dsmoe_compiler.export.onnx.lower import plain

    monkeypatch.setattr(making, "plain", lambda to, stack, e, t: plain(to, stack, (e + 1) % 8, t))
    with pytest.raises(dsmoe.ExportError, match="first layer that differs is the model itself"):
        dsmoe.export_onnx(Experts(), (_x(),), path=tmp_path / "m.onnx")


def _above_a_threshold(scores: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = scores.softmax(-1).topk(2)
    return weights * (weights > 0.1), ids


def test_comparisons_are_never_negative(tmp_path: Path) -> None:
    exported = dsmoe.export_onnx(_Layer(_above_a_threshold), (_x(),), path=tmp_path / "m.onnx", target="ort")
    assert [layer.form for layer in exported.layers] == ["MoE"]
