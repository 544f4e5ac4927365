"""The native kernels on several threads, of theirs and of the caller's: always the same bits."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

import dsmoe_compiler as dsmoe
from dsmoe_compiler.ir import reference
from dsmoe_compiler.ir.body import parse_body
from dsmoe_compiler.ir.spec import ExpertsSpec, MoESpec
from dsmoe_compiler.runtime.native.bound import Bound
from dsmoe_compiler.runtime.native.library import LEVELS
from tests.codegen.layers import Made, make
from tests.runtime.native_levels import assert_close, at, best, rounding, run
from tests.tiny_models import Experts, relative

at_each_level = pytest.mark.parametrize("level", LEVELS)
COUNTS = (1, 2, 3, 7)


@pytest.fixture(autouse=True)
def _as_many_threads_as_before() -> Iterator[None]:
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


def _layers() -> dict[str, Made]:
    """By how their work falls to threads: experts divided among them, whole experts, one that takes all in
    several parts, some wide beside shared ones.
    """
    gated = {"router": "softmax", "shared": "gated"}
    return {
        "one token": make(tokens=1, sizes=(200, 136), dtype="bfloat16"),
        "one token in float32": make(tokens=1, sizes=(200, 136)),
        "few tokens": make(tokens=5, sizes=(130, 97), dtype="bfloat16", **gated),  # type: ignore[arg-type]
        "many experts": make(tokens=90, experts=64, top_k=6, sizes=(64, 40), dtype="bfloat16"),
        "one expert": make(tokens=1100, experts=3, top_k=1, sizes=(40, 33), dtype="bfloat16", load="one"),
        "rows in parts": make(tokens=700, experts=2, top_k=1, sizes=(40, 33), layout="interleaved"),
        "dropped": make(tokens=300, sizes=(48, 32), dtype="bfloat16", load="dropped", transposed=True),
        "shared": make(tokens=260, sizes=(33, 50), **gated),  # type: ignore[arg-type]
    }


@at_each_level
def test_the_same_bits_on_any_number_of_threads(level: str) -> None:
    for name, made in _layers().items():
        torch.set_num_threads(1)
        alone = run(made, level)
        hidden = made.x.shape[1]
        assert_close(alone, made.expected(), rounding(made.x.dtype, hidden, 2 * hidden, gated=True))
        for count in COUNTS:
            torch.set_num_threads(count)
            assert run(made, level).equal(alone), f"{name}, {count} threads"


THREADS = """
import os, torch
from tests.codegen.layers import make
from tests.runtime.native_levels import best, run

def started():
    return len(os.listdir("/proc/self/task")) - before

made, level = make(sizes=(8, 8)), best().level
torch.set_num_threads(1)
before = len(os.listdir("/proc/self/task"))
run(made, level)
print(started())
torch.set_num_threads(3)
run(made, level)
print(started())
torch.ones(1 << 20).exp()
print(started())
"""


def test_as_many_threads_as_torch_has_and_the_same_ones() -> None:
    best()
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "2", "2"]


def together(*work: Callable[[], Tensor]) -> list[Tensor]:
    """What each returns, all started at once."""
    ready = threading.Barrier(len(work))

    def start(one: Callable[[], Tensor]) -> Tensor:
        ready.wait()
        return one()

    with ThreadPoolExecutor(len(work)) as pool:
        return [each.result() for each in [pool.submit(start, one) for one in work]]


def repeated(call: Callable[[], Tensor | None], times: int = 20) -> Tensor:
    """The answer, the same each time."""
    first = call()
    assert first is not None
    for _ in range(times):
        again = call()
        assert again is not None and again.equal(first)
    return first


@at_each_level
@pytest.mark.parametrize("count", [1, 2])
def test_eight_callers_of_one_layer(count: int, level: str) -> None:
    """Each with tokens of its own: of another number, so that their turns differ."""
    torch.set_num_threads(count)
    made = make(tokens=64, experts=6, sizes=(64, 40), dtype="bfloat16", router="softmax", shared="gated")
    assert isinstance(made.spec, MoESpec)
    spec = made.spec
    layers = [replace(made, x=torch.randn(1 + 9 * i, 64).bfloat16()) for i in range(8)]
    alone = [run(each, level) for each in layers]
    bound = Bound(at(level), spec.experts, spec.shared)

    def call(each: Made) -> Tensor | None:
        weights, ids = reference.route_tokens(each.x, each.router, spec)
        return bound(each.x, ids, weights, each.params, each.shared)

    answers = together(*(partial(repeated, partial(call, each)) for each in layers))
    assert all(a.equal(b) for a, b in zip(answers, alone, strict=True))


@at_each_level
def test_callers_of_several_layers(level: str) -> None:
    """And of one layer that has other tensors at each call: what is bound is nobody else's."""
    layers = list(_layers().values())
    alone = [run(each, level) for each in layers]
    answers = together(*(partial(repeated, partial(run, each, level), 3) for each in layers))
    assert all(a.equal(b) for a, b in zip(answers, alone, strict=True))
    mades = [make(tokens=9, seed=seed) for seed in range(4)]
    assert isinstance(mades[0].spec, ExpertsSpec)
    bound = Bound(at(level), mades[0].spec)
    calls = [partial(bound, m.x, m.ids, m.weights, m.params) for m in mades]
    for got, each in zip(together(*(partial(repeated, call) for call in calls)), mades, strict=True):
        assert_close(got, each.expected(), rounding(torch.float32, 32, 48))


def test_programs_in_threads_that_end() -> None:
    """A thread's memory goes with it; others go on."""
    best()
    x_TD, layers = torch.randn(50, 16), [Experts() for _ in range(3)]
    with torch.no_grad():
        for i, layer in enumerate(layers):
            layer.down.mul_(i + 1)
    programs = [dsmoe.compile(layer, (x_TD,), require_fused=True) for layer in layers]

    def call(program: dsmoe.Program) -> Tensor:
        with torch.no_grad():
            return program(x_TD)  # type: ignore[no-any-return]

    for _ in range(5):
        for got, layer in zip(together(*(partial(call, p) for p in programs)), layers, strict=True):
            with torch.no_grad():
                assert relative(got, layer(x_TD)) < 1e-5


@pytest.mark.slow  # 200 MB
@at_each_level
def test_tokens_in_several_turns(level: str) -> None:
    """So many slots of so wide outputs that the rows of all tokens do not fit at once."""
    experts, width, tokens, out = 8, 3, 515, 16384  # 512 KB of rows a token
    params = [torch.randn(experts, width, 5), torch.randn(experts, out, width)]
    spec = ExpertsSpec(experts, 5, parse_body("mul(linear(relu(linear(x,p0)),p1),w)"))
    x, weights = torch.randn(2, 5).repeat(258, 1)[:tokens], torch.rand(tokens, 1).expand(tokens, 8)
    ids = torch.randperm(experts).expand(tokens, experts).clone()
    ids[1::2, 3] = -1
    got = run(Made(spec, x, ids, weights, params, [], []), level)
    # Two kinds of tokens, each times its weight.
    two = Made(spec, x[:2], ids[:2], torch.ones(2, 8), params, [], []).expected()
    expected = two.repeat(258, 1)[:tokens] * weights[:, :1]
    assert_close(got, expected, rounding(torch.float32, 5, 3))
