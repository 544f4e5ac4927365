"""The routing kernel chooses and weighs as the reference does, in blocks of tokens and in split programs."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsmoe_compiler.codegen.route_flags import route_constants, weights_dtype
from dsmoe_compiler.codegen.routing_tiles import RouteTiles, route_tiles
from dsmoe_compiler.ir import reference
from dsmoe_compiler.ir.spec import RouterSpec
from tests.codegen.interpreted import interpreted, interpreter

FP32, FP16 = torch.float32, torch.float16

GREEDY = RouterSpec(2, "softmax")
MIXTRAL = RouterSpec(2, "softmax", score_dtype="float32", renormalize=True, weight_dtype="float16")
DEEPSEEK_V2 = RouterSpec(
    6, "softmax", groups=4, top_groups=2, weigh="ranked", scale=16.0, logits_dtype="float32"
)
DEEPSEEK_V2_LATER = replace(DEEPSEEK_V2, group_fill=float("-inf"), weigh="scores")
DEEPSEEK_V3 = RouterSpec(
    8,
    "sigmoid",
    renormalize=True,
    epsilon=1e-20,
    scale=2.5,
    selection_bias=True,
    groups=8,
    top_groups=4,
    group_score="top2",
    logits_dtype="float32",
)
GPT_OSS = RouterSpec(4, "softmax", select="logits", logits_bias=True)
# Three slots are padded to four.
PADDED = RouterSpec(3, "sigmoid", select="logits", renormalize=True)
LLAMA4 = RouterSpec(1, "sigmoid", select="logits", score_dtype="float32", weight_dtype="float16")
EVERYTHING_ROUNDED = RouterSpec(
    6, "sigmoid", renormalize=True, epsilon=0.5, scale=1.7, selection_bias=True, logits_bias=True
)


def tensors(
    spec: RouterSpec, tokens: int, experts: int, hidden: int, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    """x (T, D), and the router's tensors in the reference's order: weight, bias, selection bias."""
    x = torch.randn(tokens, hidden)
    router = [torch.randn(experts, hidden) / hidden**0.5]
    if spec.logits_bias:
        router.append(torch.randn(experts))
    router = [t.to(dtype) for t in router]
    if spec.selection_bias:
        router.append(torch.randn(experts) / 4)
    return x.to(dtype), router


def routed(
    spec: RouterSpec, x: Tensor, router: list[Tensor], tiles: RouteTiles, arrivals: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """weights and ids (T, K) by the kernel."""
    (T, D), E = x.shape, router[0].shape[0]
    names = {t: str(t).removeprefix("torch.") for t in (x.dtype, router[0].dtype, router[-1].dtype)}
    constants = route_constants(
        spec,
        experts=E,
        hidden=D,
        x=names[x.dtype],
        weight=names[router[0].dtype],
        selection_bias=names[router[-1].dtype] if spec.selection_bias else "",
    )
    grid = tiles.grid(T, E)
    if not tiles.split:
        tiles = replace(tiles, experts=constants["COLUMNS"])  # type: ignore[arg-type]
    ids = torch.full((T, spec.top_k), -7, dtype=torch.int32)
    weights = torch.full(ids.shape, -7.0, dtype=getattr(torch, weights_dtype(spec, names[x.dtype])))
    arrivals = torch.zeros(grid[0], dtype=torch.int32) if arrivals is None else arrivals
    with interpreter():
        interpreted("route").route[grid](
            x=x,
            weight=router[0],
            bias=router[1] if spec.logits_bias else None,
            selection_bias=router[-1] if spec.selection_bias else None,
            ids=ids,
            weights=weights,
            logits=torch.full((T, E), float("nan")),
            arrivals=arrivals,
            T=T,
            **constants,
            **tiles.constants(),
        )
    assert not arrivals.any(), "the last program to arrive leaves the counter as it was"
    return weights, ids


def expected(spec: RouterSpec, logits: Tensor, router: list[Tensor]) -> tuple[Tensor, Tensor]:
    """weights and ids (T, K) by the reference, the lowest id first where scores are the same."""
    with mock.patch.object(Tensor, "topk", _stable_topk):
        return reference.route(logits, router[-1] if spec.selection_bias else None, spec)


def _stable_topk(scores: Tensor, k: int, dim: int = -1) -> torch.return_types.topk:
    values, indices = scores.sort(dim=dim, descending=True, stable=True)
    return torch.return_types.topk((values.narrow(dim, 0, k), indices.narrow(dim, 0, k)))


def settled(spec: RouterSpec, logits: Tensor, router: list[Tensor]) -> Tensor:
    """The tokens (T,) whose ids the reference keeps when logits are off by what roundings do to them."""
    ids = expected(spec, logits, router)[1]
    half = FP16 in (logits.dtype, getattr(torch, spec.score_dtype or "float32"))
    # A sum in another order is some roundings off, and a sum that is then rounded to fp16 is one.
    noise = torch.finfo(FP16).eps if half else 8 * torch.finfo(FP32).eps
    precise = replace(spec, score_dtype="float32")
    kept = torch.ones(len(ids), dtype=torch.bool)
    for _ in range(6):
        moved = logits.float() + noise * (1 + logits.float().abs()) * torch.randn(logits.shape)
        kept &= (expected(precise, moved, router)[1] == ids).all(-1)
    return kept


def check(spec: RouterSpec, x: Tensor, router: list[Tensor], tiles: RouteTiles) -> Tensor:
    """Compare kernel and reference; returns which tokens could be compared, (T,)."""
    weights, ids = routed(spec, x, router, tiles)
    logits = reference.router_logits(x, router, spec)
    want_weights, want_ids = expected(spec, logits, router)
    assert weights.dtype == want_weights.dtype
    in_order = ids.sort(-1).values
    assert (in_order >= 0).all() and (in_order < len(router[0])).all()
    assert (in_order[:, 1:] > in_order[:, :-1]).all(), "an expert was chosen twice"
    rows = settled(spec, logits, router)
    assert torch.equal(ids[rows].long(), want_ids[rows])
    narrow = FP16 in (weights.dtype, logits.dtype)
    torch.testing.assert_close(
        weights[rows], want_weights[rows], rtol=4e-3 if narrow else 1e-5, atol=2e-6, check_dtype=False
    )
    return rows


def few(tokens: int, experts: int) -> RouteTiles:
    return RouteTiles(tokens, experts, depth=32, warps=4, stages=3, split=True, dot=False)


def blocks(tokens: int) -> RouteTiles:
    return RouteTiles(tokens, 0, depth=16, warps=4, stages=3, split=False, dot=True)


def split_blocks(tokens: int, experts: int) -> RouteTiles:
    return RouteTiles(tokens, experts, depth=64, warps=4, stages=3, split=True, dot=True)


@pytest.mark.parametrize(
    "spec, tokens, experts, hidden, dtype, tiles",
    [
        (replace(GREEDY, top_k=1), 1, 1, 16, FP32, few(1, 1)),
        (GREEDY, 2, 3, 40, FP16, few(2, 2)),
        (replace(GREEDY, top_k=3, renormalize=True), 64, 3, 17, FP32, split_blocks(16, 16)),
        (replace(MIXTRAL, top_k=8), 1, 8, 72, FP16, few(1, 2)),
        (MIXTRAL, 130, 8, 64, FP32, blocks(64)),
        (replace(GREEDY, top_k=8), 64, 60, 50, FP16, split_blocks(16, 32)),
        (DEEPSEEK_V2, 2, 60, 72, FP32, few(2, 8)),
        (replace(DEEPSEEK_V2, groups=3, top_groups=1), 130, 60, 33, FP16, blocks(32)),
        (
            replace(DEEPSEEK_V2, group_fill=float("-inf"), weigh="scores"),
            64,
            64,
            40,
            FP32,
            split_blocks(32, 16),
        ),
        (DEEPSEEK_V3, 1, 256, 72, FP16, few(1, 2)),
        (DEEPSEEK_V3, 64, 256, 40, FP32, blocks(32)),
        (replace(DEEPSEEK_V3, top_groups=8, logits_dtype=None), 130, 512, 24, FP32, split_blocks(64, 128)),
        (replace(DEEPSEEK_V3, groups=3, top_groups=1), 64, 60, 40, FP32, split_blocks(16, 16)),
        (replace(GPT_OSS, top_k=3), 7, 60, 40, FP16, few(8, 4)),
        (PADDED, 2, 60, 40, FP32, few(2, 4)),
        (replace(GPT_OSS, top_k=16), 130, 512, 24, FP32, blocks(32)),
        (LLAMA4, 7, 512, 33, FP16, few(8, 8)),
        (EVERYTHING_ROUNDED, 64, 60, 48, FP16, split_blocks(16, 16)),
    ],
)
def test_tokens_are_routed_as_in_the_reference(
    spec: RouterSpec, tokens: int, experts: int, hidden: int, dtype: torch.dtype, tiles: RouteTiles
) -> None:
    torch.manual_seed(0)
    rows = check(spec, *tensors(spec, tokens, experts, hidden, dtype), tiles)
    assert rows.float().mean() > 0.7, "too few tokens are clear enough to be compared"


def first_choices(
    spec: RouterSpec, logits: list[float], selection_bias: list[float] | None = None
) -> list[int]:
    """The kernel's ids for one fp32 token with these logits; the selection bias is in fp16."""
    x, router = torch.ones(1, 1), [torch.tensor(logits).unsqueeze(-1)]
    if selection_bias:
        router.append(torch.tensor(selection_bias, dtype=FP16))
    by_few = routed(spec, x, router, few(1, 2))[1]
    assert torch.equal(by_few, routed(spec, x, router, blocks(16))[1])
    assert torch.equal(by_few.long(), expected(spec, reference.router_logits(x, router, spec), router)[1])
    return list(by_few[0].tolist())


def test_a_rejected_expert_that_is_chosen_all_the_same() -> None:
    """Of the groups that are kept two experts score 0, as do then those of the group that is not, which is
    the first.
    """
    x, router = torch.ones(1, 1), [torch.tensor([[-0.5, -200, 0, -200, 0, -200]]).T.contiguous()]
    spec = RouterSpec(3, "softmax", groups=3, top_groups=2, weigh="ranked")
    for weigh, rejected in (("ranked", 0.0), ("scores", router[0].softmax(0)[0].item())):
        weights, ids = routed(replace(spec, weigh=weigh), x, router, few(1, 2))  # type: ignore[arg-type]
        assert ids.tolist() == [[2, 4, 0]]
        assert weights[0, 2].item() == pytest.approx(rejected, rel=1e-6)
        check(replace(spec, weigh=weigh), x, router, blocks(16))  # type: ignore[arg-type]


def test_what_rounds_to_the_same_is_a_tie() -> None:
    one = replace(GREEDY, top_k=1)
    # Above 1 and 4, fp16 knows no number before 2⁻¹⁰ and 2⁻⁸.
    logits = [0.0, 4.0, 0.0, 4 + 2**-10]
    assert first_choices(one, logits) == [3]
    assert first_choices(replace(one, logits_dtype="float16"), logits) == [1]
    assert first_choices(replace(one, score_dtype="float16"), logits) == [1]
    assert first_choices(replace(one, select="logits", score_dtype="float16"), logits) == [3]

    ranked = replace(one, score="sigmoid", selection_bias=True)
    zeros, biases = [0.0] * 4, [0.0, 0.5, 0.0, 0.5 + 2**-11]
    assert first_choices(ranked, zeros, biases) == [3]
    assert first_choices(replace(ranked, score_dtype="float16"), zeros, biases) == [1]

    # The groups' sums of two are 1.5 and 1.5 + 2⁻¹¹; each of their terms is a number of fp16.
    grouped = replace(ranked, groups=2, top_groups=1, group_score="top2")
    biases = [0.5, 0.0, 0.5, 2**-11]
    assert first_choices(grouped, zeros, biases) == [2]
    assert first_choices(replace(grouped, score_dtype="float16"), zeros, biases) == [0]


def test_operands_are_rounded_where_the_model_rounds_them() -> None:
    # 1 + 2⁻¹² is 1 in fp16, and the difference of the two is then none.
    x, router = torch.tensor([[1.0, -1.0]]), [torch.zeros(4, 2)]
    router[0][2, 0], router[0][2, 1] = 1 + 2.0**-12, 1.0
    spec = RouterSpec(1, "softmax", select="logits")
    for tiles in (few(1, 2), blocks(16)):
        assert routed(spec, x, router, tiles)[1].item() == 2
        assert routed(replace(spec, logits_dtype="float16"), x, router, tiles)[1].item() == 0


def test_rejected_groups_are_still_real() -> None:
    # Below what fills the rejected groups is all that the kept one has. Groups of three are padded to four.
    spec = replace(DEEPSEEK_V3, top_groups=1)
    router = [torch.zeros(24, 16), torch.full((24,), -2.0)]
    for tiles in (few(2, 8), blocks(16)):
        assert routed(spec, torch.ones(2, 16), router, tiles)[1].tolist() == [list(range(3, 11))] * 2


def test_nan_of_any_bits_ranks_first() -> None:
    torch.manual_seed(0)
    x, router = tensors(GPT_OSS, 2, 8, 16, FP32)
    router[1].view(torch.int32)[5] = -1
    assert router[1][5].isnan()
    assert (routed(GPT_OSS, x, router, few(2, 4))[1][:, 0] == 5).all()


@pytest.mark.parametrize("tiles", [few(2, 8), blocks(16)], ids=["few", "blocks"])
def test_the_lowest_expert_wins_a_tie(tiles: RouteTiles) -> None:
    experts = 24
    for spec in (GREEDY, GPT_OSS, DEEPSEEK_V3, replace(DEEPSEEK_V2, groups=3)):
        x, router = torch.ones(3, 16), [torch.zeros(experts, 16)]
        router += [torch.zeros(experts)] * (spec.logits_bias + spec.selection_bias)
        _, ids = routed(spec, x, router, tiles)
        assert ids.tolist() == [list(range(spec.top_k))] * 3


def test_minus_zero_ties_with_zero() -> None:
    # The products −2⁻²⁸ are −0 in fp16.
    x = torch.full((1, 1), 2.0**-14, dtype=FP16)
    router = [torch.tensor([[-(2.0**-14)], [0], [-(2.0**-14)], [0]], dtype=FP16)]
    _, ids = routed(replace(GPT_OSS, logits_bias=False), x, router, few(1, 4))
    assert ids.tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("tiles", [few(4, 8), blocks(16)], ids=["few", "blocks"])
def test_nan_chooses_experts_that_exist(tiles: RouteTiles) -> None:
    experts, untouched = 24, [0, 2, 4]
    for spec in (GREEDY, GPT_OSS, DEEPSEEK_V3, DEEPSEEK_V2):
        torch.manual_seed(0)
        x, router = tensors(spec, 5, experts, 32, FP32)
        want_weights, want_ids = routed(spec, x, router, tiles)
        x[1], x[3, 0] = float("nan"), float("inf")
        weights, ids = routed(spec, x, router, tiles)
        assert ((ids >= 0) & (ids < experts)).all()
        assert all(len(set(row)) == spec.top_k for row in ids.tolist())
        assert weights[1].isnan().all()
        assert torch.equal(ids[untouched], want_ids[untouched])
        assert torch.equal(weights[untouched], want_weights[untouched])


def test_experts_that_cannot_be_reached_are_still_experts() -> None:
    # More slots than experts with a finite logit: the rest are −∞, and rank above what does not exist.
    torch.manual_seed(0)
    x, router = tensors(GPT_OSS, 3, 5, 16, FP32)
    router[1][1:] = float("-inf")
    weights, ids = routed(GPT_OSS, x, router, few(4, 2))
    assert ids.tolist() == [[0, 1, 2, 3]] * 3
    assert weights.tolist() == [[1, 0, 0, 0]] * 3


def test_the_worked_example() -> None:
    spec = replace(GREEDY, renormalize=True, selection_bias=True)
    router = [torch.tensor([[0.0], [1], [2], [1]]), torch.tensor([1.0, 0, 0, 0])]
    weights, ids = routed(spec, torch.ones(1, 1), router, few(1, 4))
    assert ids.tolist() == [[0, 2]]
    assert [round(w, 2) for w in weights[0].tolist()] == [0.12, 0.88]


def test_counters_serve_launch_after_launch() -> None:
    torch.manual_seed(0)
    x, router = tensors(GREEDY, 5, 8, 16, FP32)
    arrivals = torch.zeros(3, dtype=torch.int32)
    first = routed(GREEDY, x, router, few(2, 2), arrivals)
    second = routed(GREEDY, x, router, few(2, 2), arrivals)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_what_the_kernel_does_not_compute_is_refused() -> None:
    for spec, experts, dtype, message in (
        (GREEDY, 8, "float64", "float64"),
        (replace(GREEDY, groups=3), 8, "float32", "3 groups"),
        (GREEDY, 1, "float32", "top-2 of 1"),
        (replace(GREEDY, groups=8, top_groups=2, group_score="top2"), 8, "float32", "two best"),
    ):
        with pytest.raises(ValueError, match=message):
            route_constants(spec, experts=experts, hidden=16, x=dtype, weight=dtype)


@st.composite
def routers(draw: st.DrawFn) -> tuple[RouterSpec, int]:
    """A router, and how many experts it has."""
    after = draw(st.booleans())
    groups = 1 if after else draw(st.integers(1, 9))
    members = draw(st.integers(2, 512 // groups))
    dtypes = st.sampled_from([None, "float32", "float16"])
    spec = RouterSpec(
        top_k=draw(st.integers(1, min(16, groups * members))),
        score=draw(st.sampled_from(["softmax", "sigmoid"])),
        select="logits" if after else "scores",
        renormalize=draw(st.booleans()),
        epsilon=draw(st.sampled_from([0.0, 1e-20, 1e-6])),
        scale=draw(st.sampled_from([1.0, 2.5])),
        logits_bias=draw(st.booleans()),
        selection_bias=not after and draw(st.booleans()),
        groups=groups,
        top_groups=draw(st.integers(1, groups)),
        group_score=draw(st.sampled_from(["max", "top2"])),
        group_fill=draw(st.sampled_from([0.0, float("-inf")])),
        logits_dtype=draw(dtypes),
        score_dtype=draw(dtypes),
        weight_dtype=draw(dtypes),
    )
    return spec, groups * members


@pytest.mark.slow
@settings(max_examples=120)
@given(routers(), st.integers(1, 40), st.integers(1, 70), st.booleans(), st.integers(0, 1 << 30))
def test_any_router(made: tuple[RouterSpec, int], tokens: int, hidden: int, half: bool, seed: int) -> None:
    spec, experts = made
    torch.manual_seed(seed)
    dtype = FP16 if half else FP32
    columns = route_constants(
        spec, experts=experts, hidden=hidden, x="float32", weight="float32", selection_bias="float32"
    )["COLUMNS"]
    assert isinstance(columns, int)
    tiles = route_tiles(
        tokens, experts=experts, columns=columns, operand_bytes=4, processors=8, shared=100_000
    )
    check(spec, *tensors(spec, tokens, experts, hidden, dtype), tiles)
