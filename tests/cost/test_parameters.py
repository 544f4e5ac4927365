"""Parameters are the model's own, tied ones once; what a step reads of them is what it uses."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dsmoe_compiler as dsmoe
from dsmoe_compiler import api
from dsmoe_compiler.cost_model.held import Routing, held
from tests.cost.models import HIDDEN, D, E, K, MoE, Refused, Tied
from tests.tiny_models import SeparateExperts


def own(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tied_parameters_count_once_and_unused_ones_too(device: str) -> None:
    with torch.device(device):
        model, ids = Tied(), torch.zeros(3, 5, dtype=torch.int64)
    cost = dsmoe.cost(model, (ids,), seq=6)
    assert cost.parameters.total == cost.parameters.activated == own(model) == 20 * 8 + 8 * 9 + 3 * 4
    assert cost.parameters.lookup == 0  # the head reads the whole table
    read = 20 * 8 + 8 * 9 + 8  # with the buffer, without the layer that is never called
    assert [step.weight_bytes for step in cost.steps] == [4 * read, 4 * read]


class Untied(Tied):
    def __init__(self) -> None:
        super().__init__()
        self.head.weight = nn.Parameter(torch.randn(20, 8))


def test_a_table_is_read_by_rows() -> None:
    cost = dsmoe.cost(Untied(), (torch.zeros(3, 5, dtype=torch.int64),), batch=1, seq=6)
    assert cost.parameters.lookup == 20 * 8
    dense = 20 * 8 + 8 * 9 + 8
    assert [step.weight_bytes for step in cost.steps] == [4 * (dense + 1 * 8), 4 * (dense + 6 * 8)]
    many = dsmoe.cost(Untied(), (torch.zeros(3, 5, dtype=torch.int64),), seq=600)
    assert many.steps[-1].weight_bytes == 4 * (dense + 20 * 8)


@pytest.mark.parametrize("model", [MoE(), SeparateExperts()], ids=["stacked", "packed"])
def test_a_token_activates_k_of_e_experts(model: nn.Module) -> None:
    cost = dsmoe.cost(model, (torch.randn(5, D),), seq=1)
    routed = E * (3 * D * HIDDEN if isinstance(model, MoE) else 2 * D * 32)
    assert cost.parameters.total == own(model)
    assert cost.parameters.activated == own(model) - routed * (E - K) // E
    (step,) = cost.steps
    assert step.weight_bytes == pytest.approx(4 * cost.parameters.activated)


def test_all_experts_of_a_refused_layer_are_activated() -> None:
    model = Refused()
    cost = dsmoe.cost(model, (torch.randn(5, D),))
    assert cost.parameters.activated == own(model)


class ReadElsewhere(MoE):
    """One expert is applied to every token as well."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.down[0] @ self.down[0].T


def test_experts_that_something_else_reads_are_no_longer_routed() -> None:
    done = api.optimize(ReadElsewhere(), (torch.randn(5, D),), verify="off")
    routed = {name: tensor.routing for tensor in held(done.graph) for name in tensor.names}
    assert done.report.fused == 1
    assert routed["down"] is None and routed["gate_up"] == Routing(E, K)


def test_a_program_costs_what_its_model_costs() -> None:
    model = MoE()
    program = dsmoe.compile(model, (torch.randn(5, D),))
    assert dsmoe.cost(program, seq=9) == dsmoe.cost(model, (torch.randn(5, D),), seq=9)


def test_tied_parameters_of_a_file_count_once(tmp_path: Path) -> None:
    ids = torch.zeros(3, 5, dtype=torch.int64)
    dsmoe.compile(Tied(), (ids,)).save(tmp_path / "tied.pt2")
    cost = dsmoe.cost(dsmoe.load(tmp_path / "tied.pt2"), seq=6)
    assert cost.parameters == dsmoe.cost(Tied(), (ids,), seq=6).parameters


def test_the_function_stays_what_the_package_gives() -> None:
    """Importing the modules behind it must not put one of them in its place."""
    import dsmoe_compiler.cost_model.cost  # noqa: F401

    assert dsmoe.cost is api.cost
