"""Inputs and outputs of unusual kinds, values that a model keeps, and what cannot be translated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx_ir")

import onnxruntime
from torch.utils import _pytree as pytree

import dsmoe_compiler as dsmoe
from dsmoe_compiler.export.onnx.carry import carry
from dsmoe_compiler.export.onnx.state import refuse_state
from tests.tiny_models import Experts


class Embedded(nn.Module):
    """The arguments of a transformer, any of which may be missing."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer = nn.Embedding(50, 16), Experts()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        x = inputs_embeds
        if x is None:
            x = self.embed(input_ids)
        if position_ids is not None:
            x = x + 0.01 * position_ids[..., None]
        if attention_mask is not None:
            x = x * attention_mask[..., None]
        return self.layer(x.reshape(-1, 16)).view(x.shape)  # type: ignore[no-any-return]


def _int32(*size: int) -> dict[str, Any]:
    return {"input_ids": torch.randint(50, size, dtype=torch.int32)}


def _masked(*size: int) -> dict[str, Any]:
    return _int32(*size) | {"attention_mask": torch.rand(size) > 0.3}


def _placed(*size: int) -> dict[str, Any]:
    return {"inputs_embeds": torch.randn(*size, 16), "position_ids": torch.arange(size[1]).expand(size)}


@pytest.mark.parametrize("call", [_masked, _placed])
def test_arguments_of_a_transformer(call: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    model = Embedded()
    exported = dsmoe.export_onnx(model, (), call(2, 7), path=tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(exported.path)
    given = call(3, 5)
    assert {i.name for i in session.get_inputs()} == set(given)
    (found,) = session.run(None, {name: value.numpy() for name, value in given.items()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), model(**given), rtol=2e-5, atol=2e-5)


class Nested(nn.Module):
    """Containers of tensors in, and out: an input, a weight, the same twice, its size, other dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Experts()

    def forward(self, batch: dict[str, Tensor], pair: tuple[Tensor, Tensor]) -> dict[str, Any]:
        y = self.layer(batch["x"] * pair[0])
        return {
            "same": [y, y],
            "input": pair[1],
            "view": batch["x"].view(-1),
            "weight": self.layer.gate,
            "constant": torch.tensor([1.0, 2.0]),
            "kinds": (y > 0, y.argmax(-1), y.argmax(-1).int(), y.half(), y.double(), y.sum()),
            "size": batch["x"].shape[0],
            "nothing": None,
        }


def test_containers_and_kinds(tmp_path: Path) -> None:
    model = Nested()
    example = ({"x": torch.randn(5, 16)}, (torch.randn(1, 16), torch.randn(3)))
    exported = dsmoe.export_onnx(model, example, path=tmp_path / "m.onnx")
    assert [layer.form for layer in exported.layers] == ["Split"]
    session = onnxruntime.InferenceSession(exported.path)
    other = ({"x": torch.randn(8, 16)}, (torch.randn(1, 16), torch.randn(3)))
    flat = dict(zip((i.name for i in session.get_inputs()), pytree.tree_leaves(other), strict=True))
    assert list(flat) == ["batch.x", "pair.0", "pair.1"]
    names = [o.name for o in session.get_outputs()]
    assert names == [
        *("same.0", "same.1", "input", "view", "weight", "constant"),
        *(f"kinds.{i}" for i in range(6)),
        "size",
    ]
    found = session.run(None, {name: value.numpy() for name, value in flat.items()})
    with torch.no_grad():
        wanted = [v for v in pytree.tree_leaves(model(*other)) if v is not None]
    for name, ours, theirs in zip(names, found, wanted, strict=True):
        tolerance = 1e-3 if ours.dtype == "float16" else 2e-5
        torch.testing.assert_close(
            torch.as_tensor(ours), torch.as_tensor(theirs), rtol=tolerance, atol=tolerance, msg=name
        )


class Recurrent(nn.Module):
    """A layer on what a loop makes of the tokens of x (batch, tokens, 16): it fixes their number."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Experts()

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros_like(x[:, 0])
        for token in range(x.shape[1]):
            state = 0.5 * state + x[:, token]
        return self.layer(state)  # type: ignore[no-any-return]


def test_a_size_that_the_code_fixes_is_a_number(tmp_path: Path) -> None:
    exported = dsmoe.export_onnx(Recurrent(), (torch.randn(3, 4, 16),), path=tmp_path / "m.onnx")
    (given,) = onnxruntime.InferenceSession(exported.path).get_inputs()
    assert given.shape == ["batch", 4, 16]


class Written(nn.Module):
    """A function of x and of a buffer that it may write."""

    kept: Tensor

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("kept", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.kept)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, kept: x * kept.add_(1),
        lambda x, kept: (x + kept, kept.view(2, 2).mul_(2))[0],
        lambda x, kept: (kept.copy_(kept + x.sum(0)), x + kept)[1],
    ],
)
def test_what_a_model_keeps_is_refused(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    exported = torch.export.export(Written(function), (torch.randn(3, 4),))
    with pytest.raises(dsmoe.ExportError, match="keeps nothing .* writes to its kept,"):
        refuse_state(exported)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, kept: x * kept,
        lambda x, kept: (x * 2, kept.add_(1))[0],
        lambda x, kept: (kept.copy_(x[0]), x + kept)[1],
        lambda x, kept: x.clone().add_(kept),
    ],
)
def test_what_it_does_not_depend_on_is_not(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    refuse_state(torch.export.export(Written(function), (torch.randn(3, 4),)))


def _untranslatable(function: Callable[[Tensor, Tensor], Tensor]) -> str:
    model = nn.Sequential(nn.Sequential(nn.ReLU(), Written(function)))
    exported = torch.export.export(model, (torch.randn(4, 4),))
    with pytest.raises(dsmoe.ExportError) as raised:
        carry(exported, 20, {}, lambda layer: pytest.fail("no layer"))
    return str(raised.value)


def test_an_operator_that_onnx_lacks_is_named() -> None:
    said = _untranslatable(lambda x, kept: torch.linalg.svdvals(x) + kept)
    because = "aten._linalg_svd.default: no ONNX function does what it does"
    assert said == f"torch.onnx cannot translate the model: {because}"


def test_and_its_module() -> None:
    said = _untranslatable(lambda x, kept: torch.histc(x, 4) + kept)
    assert said.startswith("torch.onnx cannot translate the model: aten.histc.default in 0.1: ")
    assert "\n" not in said


def test_bfloat16_that_numpy_lacks(tmp_path: Path) -> None:
    layer = Experts()

    def model(x: Tensor) -> Tensor:
        return layer(x).bfloat16()  # type: ignore[no-any-return]

    example = (torch.randn(3, 16),)
    with pytest.raises(dsmoe.ExportError, match="was written, but cannot be checked"):
        dsmoe.export_onnx(model, example, path=tmp_path / "m.onnx")
