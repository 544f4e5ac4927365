"""Separate experts' tensors become one, and the module does not notice."""

import copy

import pytest
import torch
from torch import Tensor, nn

import dsmoe_compiler as dsmoe
from dsmoe_compiler.packing import Packed, pack, packed
from tests.tiny_models import relative

D, E = 16, 4


class _Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(D, E)
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return out


def parts() -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(3, 5)) for _ in range(E)]


def storages(tensors: list[Tensor]) -> int:
    return len({t.untyped_storage().data_ptr() for t in tensors})


def test_parts_become_views_of_one_tensor() -> None:
    tensors = parts()
    values = [t.detach().clone() for t in tensors]
    whole = pack(tensors)
    assert whole is not None and storages([whole, *tensors]) == 1
    assert torch.equal(whole, torch.stack(values))
    assert all(torch.equal(t, v) for t, v in zip(tensors, values, strict=True))
    again = pack(tensors)
    assert again is not None and again.data_ptr() == whole.data_ptr()


def test_another_order_is_another_tensor() -> None:
    tensors = parts()
    pack(tensors)
    assert packed(tensors[::-1]) is None
    assert packed(tensors[1:]) is not None


def test_one_tensor_shared_by_all_is_read_where_it_lies() -> None:
    (tensor,) = parts()[:1]
    whole = pack([tensor] * 3)
    assert whole is not None and whole.shape == (3, 3, 5) and storages([whole, tensor]) == 1


@pytest.mark.parametrize("how", ["tied twice", "a view", "shared with another", "not contiguous"])
def test_memory_that_others_share_is_left_alone(how: str) -> None:
    tensors: list[Tensor] = list(parts())
    others: list[Tensor] = []
    if how == "tied twice":
        tensors[1] = tensors[0]
    elif how == "a view":
        tensors[2] = torch.randn(9, 5)[3:6]
    elif how == "shared with another":
        others = [nn.Parameter(tensors[0].detach())]
    else:
        tensors[3] = torch.randn(5, 3).t()
    before = [t.data_ptr() for t in tensors]
    assert pack(tensors, others) is None
    assert [t.data_ptr() for t in tensors] == before
    assert torch.equal(Packed(tensors, others)(), torch.stack(tensors))


def test_the_module_keeps_its_parameters_and_sees_what_happens_to_them() -> None:
    model = _Loop()
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    x = torch.randn(9, D)
    program = dsmoe.compile(model, (x,))
    assert {n: id(p) for n, p in model.named_parameters()} == {n: i for n, (i, _) in before.items()}
    assert all(torch.equal(p, before[n][1]) for n, p in model.named_parameters())
    assert storages([expert.weight for expert in model.experts]) == 1  # type: ignore[misc]
    with torch.no_grad():
        parameters = dict(model.named_parameters())
        parameters["experts.2.weight"].mul_(3.0)
        assert relative(program(x), model(x)) < 1e-6
        model.load_state_dict({n: torch.randn_like(p) for n, p in parameters.items()})
        assert relative(program(x), model(x)) < 1e-6
        parameters["experts.0.weight"].data = torch.randn(D, D)
        parameters[f"experts.{E - 1}.bias"].data = torch.randn(D)
        assert relative(program(x), model(x)) < 1e-6
    other = copy.deepcopy(model)
    assert relative(other(x), model(x)) == 0


def test_an_inspection_moves_nothing() -> None:
    model = _Loop()
    before = [p.data_ptr() for p in model.parameters()]
    dsmoe.inspect(model, (torch.randn(9, D),))
    assert [p.data_ptr() for p in model.parameters()] == before


def test_gradients_reach_every_expert() -> None:
    model, x = _Loop(), torch.randn(9, D)
    program = dsmoe.compile(model, (x,))
    program(x).square().sum().backward()
    ours = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model(x).square().sum().backward()
    theirs = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(ours) == len(theirs) == 2 + 2 * E
    assert all(relative(a, b) < 1e-5 for a, b in zip(ours, theirs, strict=True))


def test_experts_that_share_memory_still_fuse() -> None:
    model = _Loop()
    stacked = torch.randn(E, D, D)
    for e, expert in enumerate(model.experts):
        expert.weight = nn.Parameter(stacked[e].t())
    x = torch.randn(9, D)
    program = dsmoe.compile(model, (x,))
    assert program.report.fused == 1
    with torch.no_grad():
        dict(model.named_parameters())["experts.1.weight"].mul_(2.0)
        assert relative(program(x), model(x)) < 1e-6
