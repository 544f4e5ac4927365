"""What is read of a captured graph."""

import copy

import torch
from torch import Tensor, nn

from dsmoe_compiler.graph_diff.compare import compare
from dsmoe_compiler.graph_diff.facts import GraphFacts
from dsmoe_compiler.graph_diff.program_facts import program_facts
from dsmoe_compiler.ir.graph import ProgramGraph


class Small(nn.Module):
    """Tied weights, a buffer, and a view of the same memory."""

    weight: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.row = nn.Parameter(self.first.weight.detach()[0])
        self.register_buffer("scale", torch.ones(4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x).relu())
        return (y + self.row) * self.scale


def facts_of(module: nn.Module, source: str = "model", rows: int = 3) -> GraphFacts:
    shapes = {"x": {0: torch.export.Dim.DYNAMIC}}
    exported = torch.export.export(module, (torch.ones(rows, 4),), dynamic_shapes=shapes)
    return program_facts(source, "captured graph", ProgramGraph(exported))


def test_a_captured_graph_in_numbers() -> None:
    facts = facts_of(Small())
    assert facts.operators == {"linear": 2, "relu": 1, "add": 1, "mul": 1}
    assert (facts.size.nodes, facts.size.graph_bytes) == (5, None)
    assert [(v.name, str(v.type)) for v in (*facts.inputs, *facts.outputs)] == [
        ("x", "f32[s0, 4]"),
        ("output 0", "f64[s0, 4]"),
    ]
    types = {t.name: (str(t.type), t.bytes) for t in facts.tensors}
    assert types["first.bias"] == ("f32[4]", 16) and types["scale"] == ("f64[4]", 32)
    assert types["row"] == ("f32[4]", 16) and types["first.weight"] == ("f32[4, 4]", 64)
    assert facts.size.data_bytes == 64 + 16 + 32, "what tied weights and views share counts once"


def test_a_copy_is_the_same_and_another_start_is_not() -> None:
    torch.manual_seed(0)
    model = Small()
    assert compare(facts_of(model), facts_of(copy.deepcopy(model), rows=5), None).same
    found = compare(facts_of(model), facts_of(Small()), None)
    assert found.operators == () and found.rewired is None
    assert {t.name for t in found.tensors.rewritten} >= {"first.weight", "first.bias", "row"}


def test_numbers_of_any_layout_are_read_in_order() -> None:
    model = Small()
    other = copy.deepcopy(model)
    turned = model.first.weight.detach().t().contiguous().t()
    other.first.weight = other.second.weight = nn.Parameter(turned)
    assert not other.first.weight.is_contiguous()
    assert compare(facts_of(model), facts_of(other), None).same


def test_models_without_storage_are_the_same_as_themselves_alone() -> None:
    model = Small().to("meta")
    shapes = {"x": {0: torch.export.Dim.DYNAMIC}}
    exported = torch.export.export(model, (torch.ones(3, 4, device="meta"),), dynamic_shapes=shapes)
    first, again = (program_facts("m", "captured graph", ProgramGraph(exported)) for _ in range(2))
    assert compare(first, again, None).tensors.unread == ()
    assert first.size.data_bytes == sum(t.bytes for t in first.tensors), "moved, they share nothing"
    (unread,) = compare(first, facts_of(Small()), None).tensors.unread
    assert (unread.count, unread.why) == (len(first.tensors), "A has none")


class Branching(nn.Module):
    """A graph in a graph."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: x.sin() + 1, lambda x: x.cos(), (x,))  # type: ignore[no-any-return]


def test_branches_are_counted() -> None:
    facts = facts_of(Branching())
    assert facts.size.in_subgraphs == 3
    assert {"sin": 1, "cos": 1, "add": 1}.items() <= facts.operators.items()
