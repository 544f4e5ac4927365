"""Memory that tensors share is written once and is shared again after loading."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dsmoe_compiler as dsmoe
from dsmoe_compiler.storages import Plan, content, memory
from tests.tiny_models import SeparateExperts


def _again(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """The tensors through a plan and bytes, and how many bytes these were."""
    plan, storages = Plan.of(tensors)
    spans = [torch.empty(span.size, dtype=torch.uint8) for span in plan.spans]
    for span, storage, t in zip(plan.spans, storages, spans, strict=True):
        memory(t)[:] = b"".join(bytes(piece) for piece in content(span, storage))
    return plan.tensors(spans), sum(len(memory(t)) for t in spans)


def _storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


packed = torch.arange(24.0).view(2, 3, 4)
SHARED: dict[str, tuple[dict[str, Tensor], int]] = {
    "views of one": ({"a": packed[0], "b": packed[1], "whole": packed}, 96),
    "views alone": ({"a": packed[0], "b": packed[1]}, 96),
    "overlapping and transposed": ({"a": packed[0].t(), "b": packed.flatten()[6:20]}, 80),
    "expanded": ({"a": packed[0, 0, :1].expand(5), "b": packed[0]}, 48),
    "of two types": ({"a": packed, "b": packed.view(torch.int32), "c": packed.view(torch.uint8)}, 96),
}


@pytest.mark.parametrize("kind", SHARED)
def test_one_storage_comes_back_as_one(kind: str) -> None:
    tensors, size = SHARED[kind]
    found, written = _again(tensors)
    assert written == size and len({_storage(t) for t in found.values()}) == 1
    for name, t in tensors.items():
        again = found[name]
        assert again.equal(t) and again.stride() == t.stride() and again.dtype == t.dtype
    found[min(tensors)].untyped_storage().fill_(0)  # type: ignore[attr-defined]
    assert not any(t.any() for t in found.values()), "all see the change"


ALONE: dict[str, tuple[Tensor, int]] = {
    "a part of much": (torch.zeros(10_000)[5000:5016], 96),
    "a row of a matrix": (torch.randn(64, 64).t()[3], 4 * 63 * 64 + 4 + 12),
    "empty": (torch.zeros(0, 5), 0),
    "an empty part": (torch.zeros(8)[8:], 0),
    "a number": (torch.tensor(3.5), 4),
    "bf16": (torch.randn(7).bfloat16(), 14),
    "bool": (torch.tensor([True, False]), 2),
    "complex": (torch.randn(3, dtype=torch.complex128), 48),
    "conjugated": (torch.randn(3, 2, dtype=torch.complex64).conj(), 48),
    "negated": (torch.randn(3, dtype=torch.complex64).conj().imag, 12),
    "channels last": (torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), 480),
}


@pytest.mark.parametrize("kind", ALONE)
def test_what_is_written_is_what_is_seen(kind: str) -> None:
    tensor, size = ALONE[kind]
    found, written = _again({"t": tensor})
    assert found["t"].equal(tensor) and found["t"].dtype == tensor.dtype and written == size
    assert found["t"].is_contiguous(memory_format=torch.channels_last) == (kind == "channels last")


def test_an_empty_tensor_beside_others() -> None:
    whole = torch.arange(100.0)
    found, written = _again({"part": whole[64:80], "none": whole[100:]})
    assert written == 64 and found["part"].equal(whole[64:80]) and found["none"].shape == (0,)


def test_one_tensor_of_two_names_is_one_again() -> None:
    weight, fixed = nn.Parameter(torch.randn(3)), nn.Parameter(torch.arange(3), requires_grad=False)
    found, _ = _again({"a": weight, "b": weight, "c": fixed, "d": weight.data})
    assert found["a"] is found["b"] and isinstance(found["a"], nn.Parameter) and found["a"].requires_grad
    assert isinstance(found["c"], nn.Parameter) and not found["c"].requires_grad
    assert type(found["d"]) is Tensor and _storage(found["d"]) == _storage(found["a"])


class _Packed(nn.Module):
    """Experts that are windows on one storage, tied embeddings, and buffers on the same memory."""

    def __init__(self, experts: int = 8, width: int = 64) -> None:
        super().__init__()
        whole = torch.randn(experts, width, width) / width**0.5
        self.experts = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(experts))
        for i, expert in enumerate(self.experts):
            assert isinstance(expert, nn.Linear)
            expert.weight.data = whole[i]
        self.embed, self.head = nn.Linear(width, 32, bias=False), nn.Linear(32, width, bias=False)
        self.tied = nn.Linear(width, 32, bias=False)
        self.tied.weight = self.embed.weight
        self.register_buffer("kept", whole[0].t())
        self.register_buffer("lost", whole[1].t(), persistent=False)
        self.lost: Tensor
        self.kept: Tensor

    def forward(self, x: Tensor) -> Tensor:
        for expert in self.experts:
            x = expert(x)
        return self.head(self.embed(x) + self.tied(x)) @ self.kept @ self.lost  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def packed_program() -> dsmoe.Program:
    return dsmoe.compile(_Packed(), (torch.randn(3, 64),), verify="off", pipeline=())


def test_a_packed_model_is_written_once(
    packed_program: dsmoe.Program, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    packed_program.save(tmp_path / "p.pt2")
    size = 4 * (8 * 64 * 64 + 2 * 64 * 32)
    assert size < (tmp_path / "p.pt2").stat().st_size < 1.1 * size
    loaded, x = dsmoe.load(tmp_path / "p.pt2"), torch.randn(5, 64)
    assert loaded(x).equal(packed_program(x)) and not recwarn.list
    state = loaded.exported.state_dict
    experts = [state[f"experts.{i}.weight"] for i in range(8)]
    assert len({_storage(t) for t in (*experts, state["kept"], loaded.exported.constants["lost"])}) == 1
    assert experts[0].untyped_storage().nbytes() == 4 * 8 * 64 * 64
    assert state["embed.weight"] is state["tied.weight"]
    assert list(state) == list(packed_program.exported.state_dict)


def test_a_change_shows_wherever_the_memory_is_shared(packed_program: dsmoe.Program, tmp_path: Path) -> None:
    packed_program.save(tmp_path / "p.pt2")
    loaded, x = dsmoe.load(tmp_path / "p.pt2"), torch.randn(5, 64)
    before = loaded(x)
    with torch.no_grad():
        loaded.exported.state_dict["experts.0.weight"].zero_()
    assert not loaded.exported.state_dict["kept"].any()
    assert not loaded(x).any() and before.any()


def test_a_tied_weight_has_one_gradient_after_loading(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    program, x = dsmoe.compile(model, (torch.randn(3, 4),), verify="off", pipeline=()), torch.randn(3, 4)
    program.save(tmp_path / "p.pt2")
    loaded = dsmoe.load(tmp_path / "p.pt2")
    torch.autograd.backward(loaded(x).sum())
    torch.autograd.backward(model(x).sum())
    (gradient,) = {p.grad for p in loaded.exported.state_dict.values()}
    (expected,) = (p.grad for p in model.parameters())
    assert gradient is not None and expected is not None
    assert torch.allclose(gradient, expected, atol=1e-6)


def test_it_loads_where_the_models_class_does_not_exist(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "gone.py").write_text(
        "import torch\n"
        "class Out(dict):\n    pass\n"
        "class Gone(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.inner = torch.nn.Linear(4, 4)\n"
        "    def forward(self, x, scale=2):\n"
        "        return {'y': self.inner(x) * scale}\n"
    )
    save = (
        "import sys, torch, gone, dsmoe_compiler as dsmoe; torch.manual_seed(0)\n"
        "program = dsmoe.compile(gone.Gone(), (torch.ones(2, 4),))\n"
        "program.save(sys.argv[1]); print(program(torch.ones(3, 4))['y'].sum().item())"
    )
    load = (
        "import sys, torch, dsmoe_compiler as dsmoe\n"
        "program = dsmoe.load(sys.argv[1]); assert 'gone' not in sys.modules\n"
        "print(program(torch.ones(3, 4))['y'].sum().item())"
    )

    def run(script: str, folder: Path) -> str:
        path = f"import sys; sys.path.insert(0, {str(folder)!r})\n"
        command = [sys.executable, "-c", path + script, str(tmp_path / "p.pt2")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert run(save, tmp_path / "there") == run(load, tmp_path)


def test_experts_that_were_packed_stay_packed(tmp_path: Path) -> None:
    model, x = SeparateExperts(), torch.randn(9, 16)
    program = dsmoe.compile(model, (x,), require_fused=True)
    program.save(tmp_path / "p.pt2")
    loaded = dsmoe.load(tmp_path / "p.pt2")
    state = loaded.exported.state_dict

    def storages() -> list[int]:
        return [len({_storage(state[f"experts.{e}.{w}.weight"]) for e in range(8)}) for w in ("up", "down")]

    assert storages() == [1, 1]
    assert loaded(x).equal(program(x)) and storages() == [1, 1], "running moves nothing"
