"""What a call may bring: tensors that lie anyhow or change, ids of no expert, and those who watch."""

from __future__ import annotations

import weakref
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import dsmoe_compiler as dsmoe
from dsmoe_compiler.ir.spec import ExpertsSpec, MoESpec, to_text
from dsmoe_compiler.runtime import cpu
from dsmoe_compiler.runtime.cpu import CpuExperts, CpuMoE
from dsmoe_compiler.runtime.native.bound import Bound
from dsmoe_compiler.runtime.native.levels import VARIABLE
from dsmoe_compiler.runtime.native.library import LEVELS, Library, native
from dsmoe_compiler.runtime.native.structs import MAX_LINES
from tests.codegen.layers import Made, make
from tests.runtime.native_levels import assert_close, at, best, levels, rounding, run
from tests.tiny_models import Experts, relative

at_each_level = pytest.mark.parametrize("level", LEVELS)
both_dtypes = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
D, F = 32, 48  # of what `make` makes


def close(got: Tensor, made: Made) -> None:
    assert_close(got, made.expected(), rounding(made.x.dtype, D, F, gated=True))


@pytest.fixture
def only_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs by torch's operators fails."""
    best()
    monkeypatch.delenv(VARIABLE, raising=False)

    def refuse(*_: object) -> Tensor:
        raise AssertionError("the kernels did not run it")

    monkeypatch.setattr(cpu, "run_experts", refuse)


@at_each_level
@both_dtypes
def test_tokens_ids_and_weights_that_are_views(dtype: str, level: str) -> None:
    for tokens in (2, 50):
        made = make(tokens=tokens, dtype=dtype)
        assert isinstance(made.spec, ExpertsSpec)
        layer = Bound(at(level), made.spec)
        wide = torch.full((2 * tokens, D + 9), torch.nan, dtype=made.x.dtype)
        for view in (
            wide[::2, 4 : 4 + D],
            wide.new_empty(D, tokens).t(),
            wide.new_empty(tokens, 2 * D)[:, ::2],
        ):
            ids = made.ids.t().contiguous().t()
            weights = torch.stack([made.weights, made.weights + 1], dim=2)[..., 0]
            assert not (view.copy_(made.x).is_contiguous() or weights.is_contiguous())
            got = layer(view, ids, weights, made.params)
            assert got is not None and got.is_contiguous()
            close(got, made)
        got = layer(made.x[:1].expand(tokens, D), made.ids, made.weights, made.params)
        assert got is not None
        close(got, replace(made, x=made.x[:1].expand(tokens, D)))


@at_each_level
@pytest.mark.parametrize("ids", [torch.int32, torch.int16, torch.uint8], ids=str)
def test_ids_of_other_widths(ids: torch.dtype, level: str) -> None:
    made = make(tokens=9, load="dropped" if ids.is_signed else "random")
    close(run(replace(made, ids=made.ids.to(ids)), level), made)


@at_each_level
@both_dtypes
@pytest.mark.parametrize("shared", ["", "plain", "gated"])
def test_tokens_that_no_expert_takes(shared: str, dtype: str, level: str) -> None:
    """Zeros, and what the shared experts give."""
    made = make(tokens=9, dtype=dtype, router="softmax", shared=shared)
    assert isinstance(made.spec, MoESpec)
    ids, weights = torch.full((9, 2), -1), torch.full((9, 2), torch.nan)
    got = Bound(at(level), made.spec.experts, made.spec.shared)(
        made.x, ids, weights, made.params, made.shared
    )
    assert got is not None
    if not shared:
        assert not got.any()
        return
    alone = replace(made, params=[torch.zeros_like(p) for p in made.params])
    close(got, alone)


@at_each_level
def test_an_expert_twice_in_a_token(level: str) -> None:
    for tokens in (1, 30):
        made = make(tokens=tokens, top_k=3, experts=3)
        close(
            run(replace(made, ids=torch.full_like(made.ids, 2)), level), replace(made, ids=made.ids * 0 + 2)
        )


@at_each_level
@pytest.mark.parametrize("id_", [4, -2, 2**31, 2**32, -(2**63), 2**63 - 1])
def test_an_id_of_no_expert(id_: int, level: str) -> None:
    for tokens in (1, 40):
        made = make(tokens=tokens)
        made.ids[-1, 1] = id_
        with pytest.raises(IndexError, match=r"an expert id is not in \[0, 4\), nor −1 for none"):
            run(made, level)


@at_each_level
def test_shapes_that_do_not_fit(level: str) -> None:
    made = make(tokens=6)
    for wrong in (
        replace(made, x=made.x[:, :-1]),
        replace(made, x=made.x[:5]),
        replace(made, weights=made.weights[:, :1]),
        replace(made, weights=made.weights[:3]),
        replace(made, ids=made.ids[:4]),
    ):
        with pytest.raises((ValueError, RuntimeError)):
            run(wrong, level)
    fewer = [p[:3] for p in made.params]
    assert isinstance(made.spec, ExpertsSpec)
    layer = Bound(at(level), made.spec)
    assert layer(made.x, made.ids, made.weights, made.params) is not None
    assert layer(made.x, made.ids, made.weights, fewer) is None, "they have no fourth expert"


def test_tensors_elsewhere_are_not_the_kernels() -> None:
    made = make(tokens=6)
    assert isinstance(made.spec, ExpertsSpec)
    layer = Bound(best(), made.spec)
    away = [p.to("meta") for p in made.params]
    assert layer(made.x, made.ids, made.weights, away) is None
    wanted = layer(made.x, made.ids, made.weights, made.params)
    with torch.device("meta"):  # where the caller makes its own tensors says nothing of ours
        got = layer(made.x, made.ids, made.weights, made.params)
    assert wanted is not None and got is not None and got.equal(wanted)


def test_nothing_of_a_call_is_kept() -> None:
    """Parameters may be made for one call; what is bound to them does not keep them alive."""
    made = make(tokens=6)
    assert isinstance(made.spec, ExpertsSpec)
    layer, params = Bound(best(), made.spec), [p.clone() for p in made.params]
    kept = [weakref.ref(p) for p in params]
    assert layer(made.x, made.ids, made.weights, params) is not None
    del params
    assert [each() for each in kept] == [None] * len(kept)


def test_a_copy_is_bound_to_its_own_tensors() -> None:
    made = make(tokens=6)
    assert isinstance(made.spec, ExpertsSpec)
    layer = Bound(best(), made.spec)
    wanted = layer(made.x, made.ids, made.weights, made.params)
    doubled = deepcopy(layer)(made.x, made.ids, made.weights, [*made.params[:-1], 2 * made.params[-1]])
    assert wanted is not None and doubled is not None and doubled.equal(2 * wanted)


def test_a_bias_with_a_row_of_its_own() -> None:
    """(E, 1, F) is a vector of each expert, too."""
    made = make(tokens=6, biased=True)
    assert isinstance(made.spec, ExpertsSpec)
    rows = [p.unsqueeze(1) if p.dim() == 2 else p for p in made.params]
    assert any(a is not b for a, b in zip(rows, made.params, strict=True))
    assert run(replace(made, params=rows), best().level).equal(run(made, best().level))


def test_the_longest_term_is_the_same_on_both_sides() -> None:
    assert best().handle.dsmoe_max_lines() == MAX_LINES


@at_each_level
@pytest.mark.parametrize("shared", [False, True])
def test_nothing_to_compute(shared: bool, level: str) -> None:
    """No tokens, no slots, no hidden numbers."""
    made = make(tokens=5, router="softmax", shared="plain" if shared else "")
    assert isinstance(made.spec, MoESpec)
    layer = Bound(at(level), made.spec.experts, made.spec.shared)
    for tokens, slots in ((0, 2), (5, 0), (0, 0)):
        x, ids = made.x[:tokens], torch.zeros(tokens, slots, dtype=torch.int64)
        got = layer(x, ids, torch.ones(tokens, slots), made.params, made.shared)
        assert got is not None and got.shape == (tokens, D)
        assert bool(got.any()) == (shared and tokens > 0)
    narrow = replace(
        make(body="relu", tokens=5, weighs="no"), params=[torch.ones(4, 0, D), torch.ones(4, D, 0)]
    )
    assert run(narrow, level).equal(torch.zeros(5, D))


def test_a_number_in_place_and_a_tensor_in_its_place(only_kernels: None) -> None:
    """Training and loading change weights between calls, and move them."""
    layer, x_TD = Experts(), torch.randn(6, 16)
    program = dsmoe.compile(layer, (x_TD,), require_fused=True)
    with torch.no_grad():

        def check() -> None:
            assert relative(program(x_TD), layer(x_TD)) < 1e-5

        check()
        layer.down.mul_(2)
        check()
        layer.gate_up[3:].zero_()
        check()
        before = program(x_TD)
        for _ in range(3):  # the last tensor's memory is free again, and may be the next one's
            layer.down.data = torch.randn_like(layer.down)
            check()
        layer.gate_up.data = torch.randn(8, 24, 40)[:, :, 8:24]
        check()
        assert relative(program(x_TD), before) > 0.01
        layer.load_state_dict(Experts().state_dict())
        check()


def test_a_training_step_between_calls(only_kernels: None) -> None:
    layer, x_TD = Experts(), torch.randn(6, 16)
    program = dsmoe.compile(layer, (x_TD,), require_fused=True)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(2):
        with torch.no_grad():
            before = program(x_TD)
        program(x_TD).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            assert relative(program(x_TD), layer(x_TD)) < 1e-5
            assert relative(program(x_TD), before) > 1e-4


def test_a_saved_program(only_kernels: None, tmp_path: Path) -> None:
    x_TD = torch.randn(6, 16)
    program = dsmoe.compile(Experts(), (x_TD,), require_fused=True)
    program.save(tmp_path / "program.pt2")
    with torch.no_grad():
        assert dsmoe.load(tmp_path / "program.pt2")(x_TD).equal(program(x_TD))


def test_the_variable_chooses_the_level(only_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which kernels ran is seen in the last bits: they sum in different orders, and round or not."""
    made = make(tokens=300, dtype="bfloat16", router="softmax", shared="gated", sizes=(96, 160))
    assert isinstance(made.spec, MoESpec)
    seen = list[Tensor]()
    for level in levels():
        monkeypatch.setenv(VARIABLE, level)
        library = native()
        assert isinstance(library, Library) and library.level == level
        seen.append(CpuMoE(to_text(made.spec))(made.x, made.router, made.params, made.shared))
        assert seen[-1].equal(run(made, level))
    assert len({tuple(each.flatten().tolist()) for each in seen}) == len(seen)


def test_programs_run_by_the_kernels_at_every_level(
    only_kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x_TD = Experts(), torch.randn(6, 16)
    for level in levels():
        monkeypatch.setenv(VARIABLE, level)
        program = dsmoe.compile(layer, (x_TD,), require_fused=True)
        with torch.no_grad():
            assert relative(program(x_TD), layer(x_TD)) < 1e-5
    assert f"native kernels, {levels()[-1]}" in str(program.report).replace("\n", " ").replace("    ", "")


class _Fixed(nn.Module):
    """The experts of a layer with its ids and weights."""

    def __init__(self, made: Made) -> None:
        super().__init__()
        self.made, self.experts = made, CpuExperts(to_text(made.spec))

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, self.made.ids, self.made.weights, self.made.params)  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("tracer", ["jit", "fx"])
def test_who_traces_sees_torchs_operators(tracer: str) -> None:
    best()
    made = make(tokens=7)
    if tracer == "jit":
        traced = torch.jit.trace(_Fixed(made), (made.x,), check_trace=False)  # type: ignore[no-untyped-call]
    else:
        traced = make_fx(_Fixed(made))(made.x)
    x = torch.randn_like(made.x)
    close(traced(x), replace(made, x=x))


def test_forward_mode_gradients_are_not_lost() -> None:
    """torch's operators raise where they have none."""
    best()
    made = make(tokens=7)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(made.x, torch.ones_like(made.x))  # type: ignore[no-untyped-call]
        with pytest.raises(NotImplementedError):
            _Fixed(made)(dual)
