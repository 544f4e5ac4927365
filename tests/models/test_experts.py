"""Routed experts: the loop, the gathered form and the plain double sum are one function.

Everything here is float64, so agreement is measured at float64: a dot product of n ≤ 40 terms of unit size is
off by at most n·2⁻⁵³ ≈ 4e-15, twice in a row and summed over K ≤ 7; 1e-13 leaves one order of room.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsmoe_compiler.models.experts import RoutedExperts
from dsmoe_compiler.models.random_weights import randomise

TOLERANCE = 1e-13


def experts(count: int) -> RoutedExperts:
    module = RoutedExperts(num_experts=count, hidden_size=13, intermediate_size=19).double()
    randomise(module, seed=count)
    return module


def double_sum(module: RoutedExperts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Σ over slots and tokens, one vector at a time."""
    rows = []
    for token in range(x.shape[0]):
        row = torch.zeros(x.shape[1], dtype=x.dtype)
        for slot in range(ids.shape[1]):
            expert = int(ids[token, slot])
            width = module.down_proj.shape[2]
            gate, up = module.gate_up_proj[expert, :width], module.gate_up_proj[expert, width:]
            row = row + weights[token, slot] * (
                module.down_proj[expert] @ (F.silu(gate @ x[token]) * (up @ x[token]))
            )
        rows.append(row)
    return torch.stack(rows) if rows else torch.zeros_like(x)


def routing(tokens: int, k: int, count: int) -> tuple[Tensor, Tensor]:
    """Distinct experts in each token, weights in (0, 1)."""
    scores = torch.rand(tokens, count, generator=torch.Generator().manual_seed(tokens), dtype=torch.float64)
    weights, ids = scores.topk(k, dim=-1)
    return ids, weights


@pytest.mark.parametrize(
    ("tokens", "k", "count"),
    [(0, 2, 5), (1, 1, 1), (1, 3, 7), (2, 7, 7), (17, 1, 7), (31, 3, 11)],
    ids=["no tokens", "one of everything", "one token", "K = E", "K = 1", "primes"],
)
def test_loop_gather_and_sum_agree(tokens: int, k: int, count: int) -> None:
    module = experts(count)
    x = torch.randn(tokens, 13, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ids, weights = routing(tokens, k, count)
    expected = double_sum(module, x, ids, weights)
    torch.testing.assert_close(module.loop(x, ids, weights), expected, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(module.gather(x, ids, weights), expected, rtol=0, atol=TOLERANCE)


@given(
    tokens=st.integers(0, 40),
    k=st.integers(1, 6),
    count=st.integers(1, 9),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_loop_and_gather_agree_on_any_routing(tokens: int, k: int, count: int, seed: int) -> None:
    """Also where a token names an expert twice, or K exceeds E."""
    module = experts(count)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 13, generator=generator, dtype=torch.float64)
    ids = torch.randint(count, (tokens, k), generator=generator)
    weights = torch.rand(tokens, k, generator=generator, dtype=torch.float64)
    loop, gather = module.loop(x, ids, weights), module.gather(x, ids, weights)
    torch.testing.assert_close(loop, gather, rtol=0, atol=TOLERANCE)


def test_every_token_on_the_same_experts_leaves_the_others_unread() -> None:
    module = experts(6)
    with torch.no_grad():
        module.gate_up_proj[[0, 2, 3, 5]] = torch.nan
    x = torch.ones(4, 13, dtype=torch.float64)
    ids = torch.tensor([[4, 1]]).expand(4, 2)
    weights = torch.full((4, 2), 0.5, dtype=torch.float64)
    loop, gather = module.loop(x, ids, weights), module.gather(x, ids, weights)
    assert loop.isfinite().all()
    torch.testing.assert_close(loop, gather, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_result_has_the_dtype_of_the_tokens_and_is_rounded_once(dtype: torch.dtype) -> None:
    module = experts(5).to(dtype)
    x = torch.randn(9, 13, generator=torch.Generator().manual_seed(2)).to(dtype)
    ids, weights = routing(9, 3, 5)
    loop = module.loop(x, ids, weights.float())
    gather = module.gather(x, ids, weights.float())
    assert loop.dtype == gather.dtype == dtype
    expected = double_sum(experts_in_float64(module), x.double(), ids, weights)
    # Two chained dot products and a product in `dtype`: a handful of roundings of values of size about 1.
    bound = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(loop.double(), expected, rtol=0, atol=bound)
    torch.testing.assert_close(gather.double(), expected, rtol=0, atol=bound)


def experts_in_float64(module: RoutedExperts) -> RoutedExperts:
    """The same, already rounded, weights."""
    wide = experts(module.num_experts)
    wide.load_state_dict({name: value.double() for name, value in module.state_dict().items()})
    return wide


def test_gradients_reach_the_tokens_the_weights_and_the_hit_experts_only() -> None:
    module = experts(4)
    x = torch.randn(3, 13, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()
    ids = torch.tensor([[0, 2], [2, 0], [0, 2]])
    weights = torch.tensor([[0.5, 0.25]] * 3, dtype=torch.float64, requires_grad=True)
    leaves = [x, weights, module.gate_up_proj, module.down_proj]
    by_loop = torch.autograd.grad(module.loop(x, ids, weights).square().sum(), leaves)
    by_gather = torch.autograd.grad(module.gather(x, ids, weights).square().sum(), leaves)
    for ours, theirs in zip(by_loop, by_gather, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert by_loop[2][[0, 2]].abs().amax(dim=(1, 2)).min() > 0
    assert by_loop[2][[1, 3]].abs().max() == 0
