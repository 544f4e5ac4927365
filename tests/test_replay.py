"""The whole program against the model: what is wrong is refused, what is right is not."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

import dsmoe_compiler as dsmoe
from dsmoe_compiler import program as program_room
from dsmoe_compiler import replay as room
from dsmoe_compiler.runtime.lower import Backend, lower
from tests.tiny_models import Experts, relative, tiny, tokens
from tests.transformers_models import VOCABULARY, family


class _Scaled(nn.Module):
    """A lowered layer whose answer is changed."""

    def __init__(self, layer: nn.Module, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.change = layer, change

    def forward(self, x: Tensor, *operands: Any) -> Tensor:
        return self.change(x, self.layer(x, *operands))


def _one_expert(x: Tensor, out: Tensor) -> Tensor:
    """About what one of eight experts scaled by 1.05 does to the rows it is chosen for with half the
    weight.
    """
    chosen = (torch.arange(len(out)) % 4 == 0).to(out.dtype)
    return out * (1 + 0.025 * chosen.unsqueeze(-1))


class _TwoLayers(nn.Module):
    """ids (B, S) -> (B, S, 64): two MoE layers in a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding, self.head = nn.Embedding(512, 16), nn.Linear(16, 64, bias=False)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)
        self.layers = nn.ModuleList([Experts(), Experts()])

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.embedding(ids).flatten(0, 1)
        for layer in self.layers:
            x = x + layer(nn.functional.layer_norm(x, (16,)))
        return self.head(x).view(*ids.shape, 64)  # type: ignore[no-any-return]


CHANGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "one expert of eight off by 5 %": _one_expert,
    "weights not renormalised": lambda x, out: out * 0.4,
    "wrong at one token only": lambda x, out: out * 2 if len(out) == 1 else out,
    "wrong past one token": lambda x, out: out if len(out) == 1 else out * 1.01,
    "NaN somewhere": lambda x, out: torch.where(out == out.max(), float("nan"), out),
    "rows in another order": lambda x, out: out.flip(0),
}


def _break(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Have the first fused layer of every program from now on lowered to something else."""

    def wrong(exported: ExportedProgram, backend: Backend) -> GraphModule:
        module = lower(exported, backend)
        name = next((n for n, _ in module.named_children() if n.startswith("dsmoe_")), None)
        if name is not None:
            setattr(module, name, _Scaled(getattr(module, name), change))
        return module

    monkeypatch.setattr(program_room, "lower", wrong)


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("size", [(1, 1), (4, 6)])
def test_a_program_that_differs_is_refused_as_a_whole(
    what: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    _break(monkeypatch, CHANGES[what])
    model, ids = _TwoLayers(), tokens(*size, seed=3)
    program = dsmoe.compile(model, (ids,))
    assert [layer.fused for layer in program.report.layers] == [False, False]
    assert {layer.refusal.code for layer in program.report.layers if layer.refusal} == {"R501"}
    assert program.report.passes[-1].name == "check"
    assert program.report.program_error is not None and program.report.program_error < 1e-5
    with torch.no_grad():
        assert relative(program(tokens(3, 9)), model(tokens(3, 9))) < 1e-5


def test_a_program_refused_as_a_whole_is_not_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    _break(monkeypatch, CHANGES["weights not renormalised"])
    with pytest.raises(dsmoe.NotFused, match="2 layer.s. not fused: layers.0: R501.*; layers.1: R501"):
        dsmoe.compile(_TwoLayers(), (tokens(4, 6),), require_fused=True)


def test_verification_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    _break(monkeypatch, CHANGES["weights not renormalised"])
    report = dsmoe.compile(_TwoLayers(), (tokens(4, 6),), verify="off").report
    assert report.fused == 2 and report.program_error is None
    assert "check" not in [step.name for step in report.passes]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dropped_renormalisation_shows_in_low_precision(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    _break(monkeypatch, CHANGES["weights not renormalised"])
    report = dsmoe.compile(_TwoLayers().to(dtype), (tokens(4, 6),)).report
    assert {layer.refusal.code for layer in report.layers if layer.refusal} == {"R501"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_a_right_program_passes_in_any_precision(name: str, dtype: torch.dtype) -> None:
    ids = tokens(3, 12, vocabulary=VOCABULARY)
    report = dsmoe.compile(family(name, dtype), (), {"input_ids": ids}).report
    assert [str(layer.refusal) for layer in report.layers if not layer.fused] == []


def test_near_ties_are_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that picks the other expert for single tokens, as a near tie would, in one call of two."""
    calls = iter(range(100))

    def flip(x: Tensor, out: Tensor) -> Tensor:
        if next(calls) % 3 == 0:
            return torch.cat([out[:1] * 2, out[1:]])
        return out

    _break(monkeypatch, flip)
    assert dsmoe.compile(_TwoLayers(), (tokens(4, 6),)).report.fused == 2


def test_scores_that_tie_exactly() -> None:
    layer = Experts()
    with torch.no_grad():
        layer.gate.zero_()
    assert dsmoe.compile(layer, (torch.randn(5, 16),)).report.fused == 1


class _Baked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.factor = Experts(), 1.0

    def forward(self, x: Tensor) -> Tensor:
        self.factor += 1
        return self.layer(x) * self.factor  # type: ignore[no-any-return]


class _ByValue(nn.Module):
    """Decides on values where tracing cannot see it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Experts()

    def forward(self, x: Tensor) -> Tensor:
        fake = type(x) is not Tensor
        return self.layer(x) * (2 if fake else 1)  # type: ignore[no-any-return]


@pytest.mark.parametrize("model", [_Baked(), _ByValue()])
def test_a_capture_that_differs_from_the_model(model: nn.Module) -> None:
    with pytest.raises(dsmoe.CaptureError, match="gives other numbers than the model on") as caught:
        dsmoe.compile(model, (torch.randn(5, 16),))
    assert "\n" not in str(caught.value)


class _Counting(nn.Module):
    """Buffers that every call changes are state the program shares, not a difference."""

    def __init__(self, rebind: bool) -> None:
        super().__init__()
        self.layer, self.rebind = Experts(), rebind
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.rebind:
            self.calls = self.calls + 1
        else:
            self.calls += 1
        return self.layer(x) + self.calls  # type: ignore[no-any-return]


@pytest.mark.parametrize("rebind", [False, True])
def test_a_buffer_that_counts(rebind: bool) -> None:
    model, x = _Counting(rebind), torch.randn(5, 16)
    program = dsmoe.compile(model, (x,), require_fused=True)
    assert model.calls == 0
    first, second = program(x), program(x)
    assert (second - first).allclose(torch.ones(5, 16), atol=1e-5)


def test_nan_in_the_weights_is_the_models_own_answer() -> None:
    model, ids = tiny(), tokens(3, 9)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[0, 0, 0] = float("nan")  # type: ignore[union-attr, index]
        program = dsmoe.compile(model, (ids,))
        expected, found = model(ids), program(ids)
    refused, fused = program.report.layers
    assert refused.refusal is not None and refused.refusal.code == "R305" and fused.fused
    assert expected.isnan().any() and found.isnan().equal(expected.isnan())
    assert found.nan_to_num().allclose(expected.nan_to_num(), rtol=1e-4, atol=1e-5)


def _verdict(change: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float32) -> bool:
    """Whether the rows of a changed output pass."""
    generator = torch.Generator().manual_seed(0)
    expected = torch.randn(64, 33, generator=generator).to(dtype)
    return not room._rows(change(expected.clone()), expected).wrong


def test_what_the_comparison_of_rows_allows() -> None:
    noise = torch.randn(64, 33, generator=torch.Generator().manual_seed(1))
    assert _verdict(lambda y: y * (1 + 1e-5 * noise))
    assert _verdict(lambda y: y + 1e-4 * noise * (torch.arange(64) == 3).unsqueeze(-1))
    assert not _verdict(lambda y: y * 1.001)
    assert not _verdict(lambda y: torch.cat([y[:1] * 1.001, y[1:]]))
    assert not _verdict(lambda y: torch.cat([y[:1] * float("inf"), y[1:]]))
    assert _verdict(lambda y: y * (1 + 0.01 * noise.bfloat16()), torch.bfloat16)
    assert not _verdict(lambda y: y * 1.05, torch.bfloat16)
    assert _verdict(lambda y: torch.cat([-y[:9], y[9:]]), torch.bfloat16)
    assert not _verdict(lambda y: torch.cat([-y[:30], y[30:]]), torch.bfloat16)


def test_values_made_up_for_a_replay_keep_masks_and_stay_valid() -> None:
    program = dsmoe.compile(
        lambda ids, mask, bias: ids * mask + bias, (tokens(4, 6), torch.ones(4, 6).long(), torch.zeros(4, 6))
    )
    bias = torch.full((4, 6), -torch.inf).triu(1)
    call: room.Call = ((tokens(4, 6), torch.ones(4, 6).long(), bias), {})
    (ids, mask, other), _ = room._other_values(program.inputs, call, 1)
    assert mask.equal(call[0][1]) and other.equal(bias)
    assert not ids.equal(call[0][0]) and ids.min() >= 0 and ids.max() <= call[0][0].max()


def test_a_report_of_a_refused_program_survives() -> None:
    report = dsmoe.compile(Experts(), (torch.randn(3, 16),)).report
    assert dsmoe.Report.from_json(replace(report, program_error=0.5).to_json()).program_error == 0.5
