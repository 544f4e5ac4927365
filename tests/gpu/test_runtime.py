"""How layers run on a device: the same bits twice, no waiting for the GPU, inside CUDA graphs, on several
streams, through torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import dsmoe_compiler
from dsmoe_compiler.models.zoo import build
from dsmoe_compiler.runtime.generated import EXPERTS, MOE
from tests.gpu import exact
from tests.gpu.layers import Sizes, layer
from tests.gpu.test_experts import SHARED_SUMS
from tests.gpu.test_whole_layers import Whole, check, whole
from tests.gpu.where import DEVICE, DTYPES, INTERPRETED, at_most, on_a_device
from tests.tiny_models import tokens

pytestmark = pytest.mark.gpu

# Decoding, its split reductions included, and grouped; both with a router and shared experts.
COUNTS = at_most(20, 1, 3, 20, 600)
DTYPE = DTYPES[0]


def moe(count: int) -> Whole:
    return whole("sigmoid + bias in groups", count, DTYPE, has_shared=True)


@pytest.mark.parametrize("count", COUNTS)
def test_the_same_bits_every_time(count: int) -> None:
    case = moe(count)
    first = MOE(*case.arguments)
    for _ in range(2 if INTERPRETED else 50):
        assert torch.equal(MOE(*case.arguments), first)


def test_the_same_bits_with_all_on_one_expert() -> None:
    case = layer("SwiGLU stacked", Sizes(192, 160, 16, 4), 20, DTYPE, "one expert")
    first = EXPERTS(*case.arguments)
    for _ in range(2 if INTERPRETED else 50):
        assert torch.equal(EXPERTS(*case.arguments), first)


@pytest.mark.parametrize("count", [1, 3])
def test_the_same_bits_from_programs_that_share_a_sum(count: int) -> None:
    case = layer("SwiGLU stacked", SHARED_SUMS, count, DTYPE)
    first = EXPERTS(*case.arguments)
    exact.assert_near(first, exact.experts(case), SHARED_SUMS.width)
    for _ in range(2 if INTERPRETED else 200):
        assert torch.equal(EXPERTS(*case.arguments), first)


@on_a_device
def test_graphs_whose_programs_share_sums_at_once() -> None:
    cases = [layer("SwiGLU stacked", SHARED_SUMS, 2, DTYPE) for _ in range(2)]
    captured = [_captured(lambda case=case: EXPERTS(*case.arguments)) for case in cases]  # type: ignore[misc]
    streams = [_stream(), _stream()]
    torch.cuda.synchronize()
    for _ in range(100):
        for (graph, _), stream in zip(captured, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for case, (_, out) in zip(cases, captured, strict=True):
        exact.assert_near(out, exact.experts(case), SHARED_SUMS.width)


@on_a_device
@pytest.mark.parametrize("count", (0, *COUNTS))
def test_nothing_waits_for_the_gpu(count: int) -> None:
    """Not the second time: the first compiles and loads kernels."""
    case = moe(count)
    MOE(*case.arguments)
    with _waiting_is_an_error():
        MOE(*case.arguments)


@on_a_device
def test_a_number_of_tokens_of_the_same_power_of_two_waits_for_nothing() -> None:
    MOE(*moe(600).arguments)
    case = moe(900)
    with _waiting_is_an_error():
        out = MOE(*case.arguments)
    check(case, out)


@on_a_device
@pytest.mark.parametrize("count", COUNTS)
def test_a_captured_graph_runs_on_other_inputs(count: int) -> None:
    case = moe(count)
    graph, out = _captured(lambda: MOE(*case.arguments))
    for _ in range(3):
        other = moe(count)
        case.x.copy_(other.x)
        for ours, theirs in zip(_tensors(case), _tensors(other), strict=True):
            ours.copy_(theirs)
        out.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        check(case, out)
        assert torch.equal(out, MOE(*case.arguments))


@on_a_device
@pytest.mark.parametrize("count", COUNTS)
def test_graphs_are_replayed_in_any_order(count: int) -> None:
    """Neither leaves anything that the other needs, nor needs what only a first replay would write."""
    cases = [moe(count), moe(count)]
    captured = [_captured(lambda case=case: MOE(*case.arguments)) for case in cases]  # type: ignore[misc]
    for i in (1, 0, 1):
        graph, out = captured[i]
        out.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        check(cases[i], out)


@on_a_device
@pytest.mark.parametrize("count", COUNTS)
def test_a_call_after_a_capture_that_was_never_replayed(count: int) -> None:
    case = moe(count)
    stream = _stream()
    _captured(lambda: MOE(*case.arguments), stream)
    with torch.cuda.stream(stream):
        out = MOE(*case.arguments)
    torch.cuda.synchronize()
    check(case, out)


@on_a_device
@pytest.mark.parametrize("count", COUNTS)
def test_graphs_that_run_at_once(count: int) -> None:
    cases = [moe(count), moe(count)]
    captured = [_captured(lambda case=case: MOE(*case.arguments)) for case in cases]  # type: ignore[misc]
    streams = [_stream() for _ in cases]
    torch.cuda.synchronize()
    for _ in range(100):
        for (graph, _), stream in zip(captured, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for case, (_, out) in zip(cases, captured, strict=True):
        check(case, out)


@on_a_device
@pytest.mark.parametrize("count", COUNTS)
def test_two_streams_at_once(count: int) -> None:
    cases = [moe(count), moe(count)]
    expected = [MOE(*case.arguments) for case in cases]
    streams = [_stream() for _ in cases]
    torch.cuda.synchronize()
    found: list[list[Tensor]] = [[], []]
    for _ in range(50):
        for case, stream, outs in zip(cases, streams, found, strict=True):
            with torch.cuda.stream(stream):
                outs.append(MOE(*case.arguments))
    torch.cuda.synchronize()
    for case, outs, wanted in zip(cases, found, expected, strict=True):
        check(case, wanted)
        assert all(torch.equal(out, wanted) for out in outs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_compile_takes_the_kernels_as_they_are(dtype: torch.dtype) -> None:
    """The operators are opaque to it; what is around them it may fuse as it likes."""
    model = build("deepseek-moe-tiny", dtype=dtype).to(DEVICE)
    ids = tokens(2, 9).to(DEVICE)
    program = dsmoe_compiler.compile(model, (ids,), backend="triton", require_fused=True)
    torch.compiler.reset()
    compiled = torch.compile(
        program.module, backend="aot_eager" if INTERPRETED else "inductor", fullgraph=True
    )
    with torch.no_grad():
        (out,) = compiled(ids)
        wanted = program.module(ids)[0]
    # Inductor keeps float32 between operators that eager rounds: a few tokens' experts may hang on that.
    assert exact.by_token(out, wanted).median() <= (1e-4 if dtype is torch.float32 else 0.05)


@on_a_device
def test_a_compiled_model_in_a_graph() -> None:
    model = build("deepseek-moe-tiny", dtype=DTYPE).to(DEVICE)
    ids = tokens(1, 4).to(DEVICE)
    program = dsmoe_compiler.compile(model, (ids,), backend="triton", require_fused=True)
    with torch.no_grad():
        graph, out = _captured(lambda: program.module(ids)[0])
        for seed in (1, 2):
            ids.copy_(tokens(1, 4, seed=seed))
            graph.replay()
            torch.cuda.synchronize()
            assert exact.by_token(out, program.module(ids)[0]).median() <= 0.02


def _stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()  # type: ignore[no-untyped-call,unused-ignore]


def _captured(
    call: Callable[[], Tensor], stream: torch.cuda.Stream | None = None
) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of one call, and the tensor that it writes; its first call is before, on another stream."""
    warming = _stream()
    warming.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warming):
        call()
    torch.cuda.current_stream().wait_stream(warming)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = call()
    return graph, out


def _tensors(case: Whole) -> list[Tensor]:
    return [*case.router, *case.params, *case.shared]


@contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
