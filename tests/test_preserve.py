"""The user's objects behave and hold the same values afterwards, whatever way compiling ends."""

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as shapes_config

import dsmoe_compiler as dsmoe
from tests.tiny_models import Experts

x_TD = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", autouse=True)
def _torch_has_set_itself_up() -> None:
    """What torch and sympy do to the process when they are first used is not ours."""
    torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),))


class _Memory:
    def __init__(self) -> None:
        self.last: Tensor | None = None


class _Untidy(nn.Module):
    """Leaves traces of every call wherever a module can."""

    def __init__(self, end: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.layer, self.end = Experts(), end
        self.calls: Tensor
        self.mask: Tensor | None
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mask", None)
        self.seen: list[Tensor] = []
        self.by_size: dict[int, Tensor] = {}
        self.nested = OrderedDict(deep=[{"x": 1}])
        self.memory = _Memory()
        self.cached: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        self.by_size[len(self.by_size)] = x
        self.nested["deep"][0]["x"] = x  # type: ignore[assignment]
        self.memory.last = self.cached = x
        self.new = x
        self.calls += 1
        self.mask = torch.ones(16)
        self._parameters["layer_gate"] = self._parameters.pop("layer_gate", None)
        self.layer.gate.requires_grad_(False)
        torch.set_default_dtype(torch.float64)
        torch.rand(3)
        self.end()
        assert self.mask is not None
        return self.layer(x) * self.mask  # type: ignore[no-any-return]


def _state(model: nn.Module) -> dict[str, Any]:
    assert isinstance(model, _Untidy)
    return {
        "attributes": {k: id(v) for k, v in vars(model).items()},
        "order": [list(m._parameters) for m in model.modules()],
        "seen": list(model.seen),
        "by_size": dict(model.by_size),
        "nested": repr(model.nested),
        "memory": model.memory.last,
        "calls": model.calls.item(),
        "mask": model.mask,
        "trainable": [p.requires_grad for p in model.parameters()],
        "values": [p.sum().item() for p in model.parameters()],
        "training": model.training,
        "hooks": [len(m._forward_hooks) for m in model.modules()],
        "dtype": torch.get_default_dtype(),
        "random": torch.get_rng_state().tolist(),
        "gradients": torch.is_grad_enabled(),
        "shapes": shapes_config.save_config(),  # type: ignore[attr-defined]
        "exporting": torch.compiler.is_exporting(),
        "filters": list(warnings.filters),
    }


def _raise(error: BaseException) -> Callable[[], None]:
    def end() -> None:
        torch.set_default_dtype(torch.float32)
        raise error

    return end


ENDS: dict[str, tuple[Callable[[], None], type[BaseException] | None]] = {
    "well": (lambda: torch.set_default_dtype(torch.float32), None),
    "an exception": (_raise(ValueError("no")), dsmoe.InputError),
    "an interruption": (_raise(KeyboardInterrupt()), KeyboardInterrupt),
    "an exit": (_raise(SystemExit(3)), SystemExit),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("gradients", [True, False])
def test_everything_is_as_before(end: str, gradients: bool) -> None:
    action, expected = ENDS[end]
    model = _Untidy(action).train(gradients)
    with torch.set_grad_enabled(gradients):
        before = _state(model)
        if expected is None:
            dsmoe.compile(model, (x_TD,))
        else:
            with pytest.raises(expected):
                dsmoe.compile(model, (x_TD,))
        assert _state(model) == before
    assert relative_to_eager(model.layer)


def relative_to_eager(layer: nn.Module) -> bool:
    """Whether the layer still computes on real tensors."""
    return bool(layer(x_TD).isfinite().all())


def test_the_default_dtype_is_put_back_after_an_exception() -> None:
    def end() -> None:
        raise ValueError

    with pytest.raises(dsmoe.DsmoeError):
        dsmoe.compile(_Untidy(end), (x_TD,))
    assert torch.get_default_dtype() == torch.float32


def test_objects_a_function_closes_over_are_put_back() -> None:
    layer, memory, log = Experts(), _Memory(), list[Tensor]()

    def run(x: Tensor) -> Tensor:
        memory.last = x
        log.append(x)
        return layer(x)  # type: ignore[no-any-return]

    dsmoe.compile(run, (x_TD,))
    assert memory.last is None and log == []


def test_inputs_written_in_place_keep_their_values() -> None:
    example, before = x_TD.clone(), x_TD.clone()
    program = dsmoe.compile(lambda x: x.add_(1), (example,))
    assert example.equal(before)
    assert program(example).equal(before + 1)
    assert example.equal(before + 1)


def test_a_model_in_training_mode_keeps_its_dropout_and_its_statistics() -> None:
    model = nn.Sequential(Experts(), nn.BatchNorm1d(16), nn.Dropout(0.5)).train()
    statistics = model.state_dict(keep_vars=False)["1.running_mean"].clone()
    program = dsmoe.compile(model, (x_TD,))
    assert model.training and model[2].training
    assert model.state_dict()["1.running_mean"].equal(statistics)
    assert program.report.program_error is None, "two runs with dropout cannot be compared"
    assert (program(x_TD) == 0).any()
    assert not model.state_dict()["1.running_mean"].equal(statistics), (
        "the program updates the model's own buffer"
    )


class _Counting(nn.Module):
    """Writes into a parameter in every call, and into one that shares its memory."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Experts()
        self.load = nn.Parameter(torch.zeros(4), requires_grad=False)
        self.first = nn.Parameter(self.load.data[:1], requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        self.load.add_(1)
        y: Tensor = self.layer(x) * self.load.sum()
        return y


def test_a_model_that_writes_into_its_parameters() -> None:
    model = _Counting()
    with torch.no_grad():
        expected = [_Counting.forward(copied, x_TD) for copied in [copy.deepcopy(model)] for _ in "ab"]
    program = dsmoe.compile(model, (x_TD,))
    assert model.load.sum() == 0 and model.first.sum() == 0
    with torch.no_grad():
        for each in expected:
            torch.testing.assert_close(program(x_TD), each)
    assert model.load.sum() == 8, "the program writes into the model's own parameter"
