"""Counting loads: by hand, off, in threads, nested, with gradients, with drops, saved and loaded."""

from __future__ import annotations

import json
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import dsmoe_compiler as dsmoe
from dsmoe_compiler.load_counter import LoadCounter
from dsmoe_compiler.report.load import LayerLoad, Load
from dsmoe_compiler.runtime import counting_form
from tests.cli.small_model import Layer as SmallLayer
from tests.cli.small_model import build
from tests.codegen.interpreted import interpreter
from tests.passes.capacity import CAPACITY, EXPERTS, WIDTH, choices_first
from tests.passes.capacity import Layer as CapacityLayer
from tests.passes.test_zero_experts import Layer as SomeWithoutTensors
from tests.passes.test_zero_experts import identity
from tests.tiny_models import Experts, tiny, tokens

E = 8


@pytest.fixture(scope="module")
def program() -> dsmoe.Program:
    return dsmoe.compile(Experts(), (torch.randn(5, 16),), require_fused=True)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return Experts()


def by_hand(model: nn.Module, *inputs: Tensor) -> tuple[int, ...]:
    """Each expert's pairs, counted one by one."""
    gate = model.gate
    assert isinstance(gate, Tensor)
    chosen = Counter(e for x in inputs for row in x @ gate.T for e in row.topk(2).indices.tolist())
    return tuple(chosen[e] for e in range(E))


def only(load: Load) -> LayerLoad:
    (layer,) = load.layers
    return layer


def test_counts_are_those_made_by_hand(program: dsmoe.Program, model: nn.Module) -> None:
    first, second = torch.randn(7, 16), torch.randn(40, 16)
    with torch.no_grad(), program.count_load() as counter:
        program(first)
        assert only(counter.counted).counts == by_hand(model, first), "it may be read while it grows"
        program(second)
    found = only(counter.counted)
    assert found.counts == by_hand(model, first, second)
    assert (found.top_k, found.tokens, found.dropped) == (2, 47, 0)


def test_routing_that_is_known() -> None:
    """Token t has its two largest logits at t and t + 1, by construction."""
    layer = Experts(width=E)
    with torch.no_grad():
        layer.gate.copy_(torch.eye(E) * 2 + torch.eye(E).roll(1, 0))
    program = dsmoe.compile(layer, (torch.eye(E),), require_fused=True)
    with torch.no_grad(), program.count_load() as counter:
        program(torch.eye(E)[[0, 0, 0, 4]])
    assert only(counter.counted).counts == (3, 3, 0, 0, 1, 1, 0, 0)


def test_off_it_is_the_program_that_it_was(program: dsmoe.Program) -> None:
    x = torch.randn(3, 16)
    program(x)
    run, module = program._run, program.module
    code = module.code
    with program.count_load():
        assert program._run is not run
    assert program._run is run
    assert program.module is module and module.code == code
    assert not [n for n in module.graph.nodes if n.target in _COUNTS]


_COUNTS = (counting_form.count_ids, counting_form.count_routed)


def test_nothing_is_counted_when_nobody_counts(
    program: dsmoe.Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    with program.count_load() as counter:
        pass
    monkeypatch.setattr(counter, "add", None)
    program(torch.randn(3, 16))
    assert only(counter.counted).pairs == 0


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_outputs_and_gradients_are_the_same_bits(backend: Literal["cpu", "reference"]) -> None:
    model, ids = tiny().requires_grad_(True), tokens(3, 11)
    program = dsmoe.compile(model, (ids,), backend=backend, verify="off", require_fused=True)
    plain, (counted, counter) = program(ids), _counted(program, ids)
    assert torch.equal(counted, plain)
    assert [(layer.name, layer.tokens) for layer in counter.counted.layers] == [
        ("model.layers.1.mlp", 33),
        ("model.layers.2.mlp", 33),
    ]
    weights = list(model.parameters())
    for a, b in zip(*(torch.autograd.grad(y.sum(), weights) for y in (plain, counted)), strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        assert torch.equal(_counted(program, ids)[0], program(ids))


def _counted(program: dsmoe.Program, ids: Tensor) -> tuple[Tensor, LoadCounter]:
    with program.count_load() as counter:
        return program(ids), counter


def test_the_generated_kernels(program: dsmoe.Program, model: nn.Module) -> None:
    pytest.importorskip("triton")
    x = torch.randn(6, 16)
    with interpreter(), torch.no_grad():
        generated = dsmoe.compile(Experts(), (x,), backend="triton", verify="off", require_fused=True)
        plain = generated(x)
        with generated.count_load() as counter:
            counted = generated(x)
    assert torch.equal(counted, plain)
    assert only(counter.counted).counts == by_hand(model, x)


def test_no_tokens(program: dsmoe.Program) -> None:
    with program.count_load() as counter:
        program(torch.empty(0, 16))
    found = only(counter.counted)
    assert (found.tokens, found.counts, found.max_violation, found.entropy) == (0, (0,) * E, None, None)
    assert str(counter)


def test_counters_within_counters(program: dsmoe.Program) -> None:
    run = program._run
    with program.count_load() as outer:
        program(torch.randn(1, 16))
        with program.count_load() as inner:
            program(torch.randn(2, 16))
        program(torch.randn(4, 16))
    assert (only(outer.counted).tokens, only(inner.counted).tokens) == (7, 2)
    assert program._run is run


def test_an_exception_ends_the_counting(program: dsmoe.Program) -> None:
    run = program._run
    with pytest.raises(ZeroDivisionError), program.count_load() as counter:
        program(torch.randn(3, 16))
        raise ZeroDivisionError
    program(torch.randn(3, 16))
    assert program._run is run
    assert only(counter.counted).tokens == 3


def test_a_call_that_raises_counts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layer has run by then."""
    ids = tokens(1, 5)
    program = dsmoe.compile(tiny(), (ids,), verify="off", require_fused=True)
    last = [m for name, m in program.module.named_modules() if name.startswith("dsmoe_")][-1]

    def fail(*operands: object) -> Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(last, "forward", fail)
    with program.count_load() as counter:
        with pytest.raises(RuntimeError, match="out of memory"):
            program(ids)
        with pytest.raises(dsmoe.ShapeError):
            program(ids.view(5))
    assert [layer.pairs for layer in counter.counted.layers] == [0, 0]


def test_calls_in_many_threads(program: dsmoe.Program, model: nn.Module) -> None:
    inputs = [torch.randn(n, 16) for n in range(1, 9)]
    with program.count_load() as counter:
        _in_threads([lambda x=x: [program(x) for _ in range(5)] for x in inputs])  # type: ignore[misc]
    assert only(counter.counted).counts == by_hand(model, *inputs * 5)


def test_counters_opened_in_many_threads(program: dsmoe.Program) -> None:
    run, seen = program._run, list[int]()

    def count(tokens: int) -> None:
        with torch.no_grad(), program.count_load() as counter:
            program(torch.randn(tokens, 16))
        seen.append(only(counter.counted).tokens)

    _in_threads([lambda n=n: count(n) for n in range(1, 9)])  # type: ignore[misc]
    assert len(seen) == 8 and sum(seen) >= sum(range(1, 9)), "each sees its own call, and perhaps others'"
    assert program._run is run


def _in_threads(work: list[Callable[[], object]]) -> None:
    threads = [threading.Thread(target=each) for each in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_sums_lose_nothing(program: dsmoe.Program) -> None:
    """Threads add at once, the interpreter changing between them as often as it can."""
    one, interval = (torch.ones(E + 1, dtype=torch.int64),), sys.getswitchinterval()
    with program.count_load() as counter:

        def add_often() -> None:
            for _ in range(500):
                counter.add(one)

        sys.setswitchinterval(1e-6)
        try:
            _in_threads([add_often] * 8)
        finally:
            sys.setswitchinterval(interval)
    assert only(counter.counted).pairs == 8 * 500 * (E + 1)


def test_a_call_counts_where_it_begins_and_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    """It hangs in its layer while one counter opens and another closes."""
    program = dsmoe.compile(Experts(), (torch.randn(5, 16),), verify="off", require_fused=True)
    (layer,) = (m for name, m in program.module.named_modules() if name == "dsmoe_0")
    forward, begun, on = layer.forward, threading.Event(), threading.Event()

    def hang(*operands: object) -> Tensor:
        begun.set()
        on.wait()
        return forward(*operands)  # type: ignore[no-any-return]

    monkeypatch.setattr(layer, "forward", hang)
    call = threading.Thread(target=lambda: program(torch.randn(3, 16)), daemon=True)
    with program.count_load() as outer:
        with program.count_load() as early:
            call.start()
            begun.wait()
        with program.count_load() as late:
            on.set()
            call.join()
    assert [only(each.counted).tokens for each in (outer, early, late)] == [3, 0, 0]


def test_counting_keeps_nothing_for_gradients(program: dsmoe.Program, model: nn.Module) -> None:
    def keep(tensor: Tensor) -> Tensor:
        raise AssertionError("something is saved for a backward pass")

    spec, gate = program.report.layers[0].spec, model.gate
    assert spec is not None and isinstance(gate, Tensor) and gate.requires_grad
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        counts = counting_form.count_routed(torch.randn(3, 16), (gate,), spec.text)
    assert int(counts.sum()) == 6


def test_in_inference_mode_and_out_of_it(program: dsmoe.Program) -> None:
    with torch.inference_mode(), program.count_load() as counter:
        program(torch.randn(3, 16))
        with torch.inference_mode(False):
            program(torch.randn(4, 16))
        program(torch.randn(5, 16))
    assert only(counter.counted).tokens == 12


def test_pairs_over_capacity_are_dropped() -> None:
    """All thirty tokens are alike: two experts are chosen by each and have three places."""
    layer = CapacityLayer(choices_first)
    crowd = torch.randn(1, WIDTH).expand(30, WIDTH).reshape(1, 30, WIDTH).contiguous()
    program = dsmoe.compile(layer, (torch.randn(2, 5, WIDTH),), require_fused=True)
    with program.count_load() as counter:
        program(crowd)
    found = only(counter.counted)
    assert sorted(found.counts) == [0] * (EXPERTS - 2) + [CAPACITY] * 2
    assert (found.dropped, found.tokens) == (60 - 2 * CAPACITY, 30)


def test_pairs_of_experts_without_tensors_are_dropped() -> None:
    torch.manual_seed(0)
    layer, x = SomeWithoutTensors(identity), torch.randn(2, 5, 16)
    program = dsmoe.compile(layer, (x,), verify="off", require_fused=True)
    ids = layer.gate(x.reshape(-1, 16)).softmax(-1).topk(3).indices
    with program.count_load() as counter:
        program(x)
    found = only(counter.counted)
    assert found.counts == tuple(int((ids == e).sum()) for e in range(6))
    assert found.dropped == int((ids >= 6).sum()) > 0


def test_a_router_as_written_and_a_layer_as_written() -> None:
    model, args, _ = build()
    program = dsmoe.compile(model, args)
    first, second, _ = model.children()
    x = torch.randn(9, 16)
    with torch.no_grad(), program.count_load() as counter:
        program(x)
        between = first(x)
    routed, as_written = counter.counted.layers
    assert isinstance(second, SmallLayer) and second.kind.score is torch.tanh
    ids = (between @ second.gate.T).tanh().topk(2).indices
    assert as_written.counts == tuple(int((ids == e).sum()) for e in range(E))
    assert (routed.name, as_written.name, counter.counted.not_counted) == ("0", "1", ("2",))


def test_layers_whose_ops_stand_in_another_order() -> None:
    """The first layer's shared expert is added last, so that its op comes second."""

    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Experts(), Experts()
            self.shared = nn.ModuleList(
                nn.Sequential(nn.Linear(16, 12), nn.SiLU(), nn.Linear(12, 16)) for _ in range(2)
            )
            with torch.no_grad():
                self.second.gate.copy_(self.second.gate.flip(0))

        def forward(self, x: Tensor) -> Tensor:
            first, second = self.first(x), self.second(x)
            second = second + self.shared[1](x)
            return second * (first + self.shared[0](x))  # type: ignore[no-any-return]

    model, x = Parallel(), torch.randn(9, 16)
    program = dsmoe.compile(model, (x,), verify="off", require_fused=True)
    assert all(layer.spec and layer.spec.shared for layer in program.report.layers)
    order = [node.name for node in program.exported.graph.nodes]
    first, second = (order.index(layer.op) for layer in program.report.layers)
    assert first > second
    with torch.no_grad(), program.count_load() as counter:
        program(x)
    found = {layer.name: layer.counts for layer in counter.counted.layers}
    assert found == {"first": by_hand(model.first, x), "second": by_hand(model.second, x)}


def test_a_saved_program(program: dsmoe.Program, model: nn.Module, tmp_path: Path) -> None:
    program.save(tmp_path / "experts.pt2")
    loaded, x = dsmoe.load(tmp_path / "experts.pt2"), torch.randn(9, 16)
    with loaded.count_load() as counter:
        loaded(x)
    assert only(counter.counted).counts == by_hand(model, x)


def test_a_program_that_does_not_name_its_ops(program: dsmoe.Program) -> None:
    record = json.loads(program.report.to_json())
    del record["layers"][0]["op"]
    old = program.with_report(dsmoe.Report.from_json(json.dumps(record)))
    with pytest.raises(dsmoe.InputError, match="compile it again"), old.count_load():
        pass


def test_a_copy_made_while_counting_is_not_counted(program: dsmoe.Program) -> None:
    program.prepare()
    run = program._run
    with program.count_load() as counter:
        copy = program.with_report(program.report)
        copy(torch.randn(3, 16))
    assert copy._run is run
    assert only(counter.counted).tokens == 0


def test_a_model_without_layers() -> None:
    program = dsmoe.compile(nn.Linear(4, 4), (torch.randn(2, 4),))
    with program.count_load() as counter:
        program(torch.randn(2, 4))
    assert counter.counted == Load("Linear", ())
    assert str(counter) == "Linear: no layer was counted"


def test_the_counting_form_is_made_once(program: dsmoe.Program, monkeypatch: pytest.MonkeyPatch) -> None:
    with program.count_load():
        pass
    monkeypatch.setattr(GraphModule, "__init__", None)
    with program.count_load() as counter:
        program(torch.randn(2, 16))
    assert only(counter.counted).tokens == 2
