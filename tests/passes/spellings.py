"""One layer in the ways people write it: routers × spellings × bodies × layouts, as plain data.

T tokens, D model width, F expert hidden width, E experts, K experts per token, P = T·K pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
import transformers.integrations.moe  # noqa: F401  (defines transformers::grouped_mm_fallback)
from torch import Tensor, nn

Gemm = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class Body:
    """An expert's maths: `run(x, gemm)`, where `gemm(name, rows)` multiplies by a weight and adds its bias.

    `factors` says, for each weight, its (out, in) widths: "D", "F" or "2F".
    """

    name: str
    run: Callable[[Tensor, Gemm], Tensor]
    factors: dict[str, tuple[str, str]]
    biased: bool = False

    def __str__(self) -> str:
        return self.name


_STACKED = {"gate_up": ("2F", "D"), "down": ("D", "F")}
_SEPARATE = {"gate": ("F", "D"), "up": ("F", "D"), "down": ("D", "F")}
_PLAIN = {"up": ("F", "D"), "down": ("D", "F")}


def _gated(act: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Gemm], Tensor]:
    def run(x: Tensor, gemm: Gemm) -> Tensor:
        gate, up = gemm("gate_up", x).chunk(2, dim=-1)
        return gemm("down", act(gate) * up)

    return run


def _separate(x: Tensor, gemm: Gemm) -> Tensor:
    return gemm("down", F.silu(gemm("gate", x)) * gemm("up", x))


def _up_first(x: Tensor, gemm: Gemm) -> Tensor:
    both = gemm("gate_up", x)
    width = both.shape[-1] // 2
    return gemm("down", F.silu(both[..., width:]) * both[..., :width])


def _relu(x: Tensor, gemm: Gemm) -> Tensor:
    return gemm("down", F.relu(gemm("up", x)))


def _clamped(x: Tensor, gemm: Gemm) -> Tensor:
    gate, up = gemm("gate_up", x).chunk(2, dim=-1)
    return gemm("down", F.silu(gate.clamp(max=0.5)) * up.clamp(-0.5, 0.5))


def _gpt_oss(x: Tensor, gemm: Gemm) -> Tensor:
    both = gemm("gate_up", x)
    gate, up = both[..., ::2].clamp(max=1.0), both[..., 1::2].clamp(min=-1.0, max=1.0)
    return gemm("down", (up + 1) * (gate * torch.sigmoid(gate * 1.702)))


SWIGLU = Body("SwiGLU", _gated(F.silu), _STACKED)
BIASED = replace(SWIGLU, name="SwiGLU + bias", biased=True)
BODIES: tuple[Body, ...] = (
    SWIGLU,
    BIASED,
    Body("GeGLU", _gated(F.gelu), _STACKED),
    Body("GeGLU(tanh)", _gated(lambda g: F.gelu(g, approximate="tanh")), _STACKED),
    Body("separate SwiGLU", _separate, _SEPARATE),
    Body("[up;gate] SwiGLU", _up_first, _STACKED),
    Body("ReLU FFN", _relu, _PLAIN),
    Body("ReLU FFN + bias", _relu, _PLAIN, biased=True),
    Body("clamped SwiGLU", _clamped, _STACKED),
    Body("gpt-oss", _gpt_oss, _STACKED, biased=True),
)


class Experts(nn.Module):
    """One body's weights for E experts: (E, out, in), or (E, in, out) where `transposed`; biases (E, out)."""

    def __init__(self, body: Body, sizes: Sizes, *, transposed: bool) -> None:
        super().__init__()
        self.body, self.count, self.transposed = body, sizes.experts, transposed
        widths = {"D": sizes.width, "F": sizes.hidden, "2F": 2 * sizes.hidden}
        for name, (out, inner) in body.factors.items():
            dims = (widths[inner], widths[out]) if transposed else (widths[out], widths[inner])
            self.register_parameter(name, nn.Parameter(torch.randn(sizes.experts, *dims) * 0.25))
            if body.biased:
                bias = nn.Parameter(torch.randn(sizes.experts, widths[out]) * 0.25)
                self.register_parameter(f"{name}_bias", bias)

    def bias(self, name: str) -> Tensor | None:
        return self.get_parameter(f"{name}_bias") if self.body.biased else None

    def in_out(self, name: str) -> Tensor:
        """The weight as (E, in, out)."""
        weight = self.get_parameter(name)
        return weight if self.transposed else weight.transpose(-2, -1)


Spelled = Callable[[Experts, Tensor, Tensor, Tensor], Tensor]


def _added(rows: Tensor, bias: Tensor | None) -> Tensor:
    return rows if bias is None else rows + bias


# -- pairs sorted by expert, grouped products ------------------------------------------------------


def product(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """torch's own grouped product where it runs (bfloat16), else the operator transformers falls back to."""
    if rows.dtype == torch.bfloat16:
        return torch._grouped_mm(rows, weight, offs=ends)
    found: Tensor = torch.ops.transformers.grouped_mm_fallback(rows, weight, ends)
    return found


def segments(experts: Experts, sorted_ids: Tensor) -> Tensor:
    """Where each expert's rows end."""
    counts = torch.histc(sorted_ids.float(), bins=experts.count, min=0, max=experts.count - 1)
    return torch.cumsum(counts, dim=0, dtype=torch.int32)


def grouped_gemm(experts: Experts, ends: Tensor, sorted_ids: Tensor) -> Gemm:
    """Products of sorted rows."""

    def gemm(name: str, rows: Tensor) -> Tensor:
        bias = experts.bias(name)
        found = product(rows, experts.in_out(name), ends)
        return _added(found, None if bias is None else bias[sorted_ids])

    return gemm


def _sorted(experts: Experts, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Gemm]:
    """(permutation, rows of x in sorted order, the grouped product)."""
    sorted_ids, perm = torch.sort(ids.reshape(-1))
    gemm = grouped_gemm(experts, segments(experts, sorted_ids), sorted_ids)
    return perm, x[perm // ids.shape[-1]], gemm


def grouped(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """As transformers writes it: weighed in sorted order, brought back by the inverse permutation."""
    perm, rows, gemm = _sorted(experts, x, ids)
    y = experts.body.run(rows, gemm) * weights.reshape(-1)[perm].unsqueeze(-1)
    inverse = torch.empty_like(perm)
    inverse[perm] = torch.arange(perm.size(0))
    return y[inverse].view(x.shape[0], ids.shape[-1], x.shape[-1]).sum(dim=1).to(x.dtype)


def grouped_argsort(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The inverse is the permutation's own argsort; weights meet the rows in their own order."""
    perm, rows, gemm = _sorted(experts, x, ids)
    y = experts.body.run(rows, gemm)[perm.argsort()].view(x.shape[0], ids.shape[-1], x.shape[-1])
    return (y * weights.unsqueeze(-1)).sum(1)


def grouped_index_add(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Sorted rows are added to their tokens."""
    perm, rows, gemm = _sorted(experts, x, ids)
    y = experts.body.run(rows, gemm) * weights.view(-1, 1)[perm]
    return torch.zeros_like(x).index_add_(0, perm // ids.shape[-1], y.to(x.dtype))


def grouped_put(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Sorted rows are written where their pairs are."""
    perm, rows, gemm = _sorted(experts, x, ids)
    sorted_y = experts.body.run(rows, gemm)
    y = torch.empty_like(sorted_y)
    y[perm] = sorted_y
    return (y.view(x.shape[0], ids.shape[-1], x.shape[-1]) * weights[..., None]).sum(1)


# -- each pair gathers its expert's weights --------------------------------------------------------


def gathered(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """repeat_interleave, then a batched product with each pair's own weights."""
    flat = ids.reshape(-1)

    def gemm(name: str, rows: Tensor) -> Tensor:
        weight, bias = experts.get_parameter(name)[flat], experts.bias(name)
        if experts.transposed:
            product = torch.bmm(rows.unsqueeze(1), weight).squeeze(1)
        else:
            product = torch.bmm(weight, rows.unsqueeze(-1)).squeeze(-1)
        return _added(product, None if bias is None else bias[flat])

    y = experts.body.run(x.repeat_interleave(ids.shape[-1], dim=0), gemm) * weights.reshape(-1, 1)
    return y.view(x.shape[0], ids.shape[-1], x.shape[-1]).sum(dim=1).to(x.dtype)


def gathered_by_slot(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The same on (T, K) rows: tokens expanded, weights indexed by the ids as they are."""

    def gemm(name: str, rows: Tensor) -> Tensor:
        weight, bias = experts.get_parameter(name)[ids], experts.bias(name)
        if experts.transposed:
            product = torch.matmul(rows.unsqueeze(2), weight).squeeze(2)
        else:
            product = torch.matmul(weight, rows.unsqueeze(-1)).squeeze(-1)
        return _added(product, None if bias is None else bias[ids])

    y = experts.body.run(x.unsqueeze(1).expand(-1, ids.shape[-1], -1), gemm)
    return (y * weights.unsqueeze(-1)).sum(dim=1)


# -- every token through every expert, weights zero where not chosen -------------------------------


def scattered(experts: Experts, ids: Tensor, weights: Tensor) -> Tensor:
    """(T, E): the weights written onto zeros."""
    return torch.zeros(ids.shape[0], experts.count, dtype=weights.dtype).scatter_(1, ids, weights)


def one_hot(experts: Experts, ids: Tensor, weights: Tensor) -> Tensor:
    """(T, E): the sum over slots of weighted one-hots."""
    return (F.one_hot(ids, experts.count).to(weights.dtype) * weights.unsqueeze(-1)).sum(1)


def _batched(experts: Experts) -> Gemm:
    def gemm(name: str, rows: Tensor) -> Tensor:
        bias = experts.bias(name)
        return _added(torch.bmm(rows, experts.in_out(name)), None if bias is None else bias.unsqueeze(1))

    return gemm


def dense_repeat(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """x.repeat(E, 1), as gpt-oss."""
    rows = x.repeat(experts.count, 1).view(experts.count, x.shape[0], x.shape[-1])
    y = experts.body.run(rows, _batched(experts)).view(experts.count, x.shape[0], x.shape[-1])
    return (y * scattered(experts, ids, weights).transpose(0, 1).unsqueeze(-1)).sum(dim=0)


def dense_expand(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """x expanded over the experts."""
    y = experts.body.run(x.unsqueeze(0).expand(experts.count, -1, -1), _batched(experts))
    return (y * one_hot(experts, ids, weights).t()[..., None]).sum(0)


def dense_matmul(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """x broadcast over the experts by the product."""

    def gemm(name: str, rows: Tensor) -> Tensor:
        bias = experts.bias(name)
        return _added(torch.matmul(rows, experts.in_out(name)), None if bias is None else bias.unsqueeze(1))

    y = experts.body.run(x, gemm)
    return (y * scattered(experts, ids, weights).t().unsqueeze(-1)).sum(0)


def dense_einsum(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """einsum, tokens first."""

    def gemm(name: str, rows: Tensor) -> Tensor:
        weight, bias = experts.get_parameter(name), experts.bias(name)
        letters = "eio" if experts.transposed else "eoi"
        product = torch.einsum(f"{'ti' if rows.dim() == 2 else 'tei'},{letters}->teo", rows, weight)
        return _added(product, bias)

    y = experts.body.run(x, gemm)
    return (y * one_hot(experts, ids, weights).unsqueeze(-1)).sum(1)


def dense_scaled_input(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The input is scaled by the weight, not the output, as llama4."""
    dense = scattered(experts, ids, weights).t().reshape(-1, 1)
    rows = (x.repeat(experts.count, 1) * dense).view(experts.count, x.shape[0], x.shape[-1])
    return experts.body.run(rows, _batched(experts)).sum(dim=0)


SPARSE: tuple[Spelled, ...] = (
    grouped,
    grouped_argsort,
    grouped_index_add,
    grouped_put,
    gathered,
    gathered_by_slot,
)
DENSE: tuple[Spelled, ...] = (dense_repeat, dense_expand, dense_matmul, dense_einsum)
SPELLINGS: tuple[Spelled, ...] = (*SPARSE, *DENSE)


# -- routers ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Route:
    """How a router turns x into (weights, ids); `fused` whether the compiler is to know it."""

    name: str
    run: Callable[[Router, Tensor], tuple[Tensor, Tensor]]
    fused: bool = True
    bias: bool = False
    groups: int = 1

    def fits(self, sizes: Sizes) -> bool:
        """Whether there are groups of two experts or more, and enough experts in one."""
        return (
            self.groups == 1
            or sizes.experts % self.groups == 0
            and sizes.experts >= max(2 * self.groups, self.groups * sizes.top_k)
        )

    def __str__(self) -> str:
        return self.name


class Router(nn.Module):
    """E logits a token, a selection bias, and the way to choose."""

    def __init__(self, route: Route, sizes: Sizes) -> None:
        super().__init__()
        self.route, self.top_k, self.count = route, sizes.top_k, sizes.experts
        self.weight = nn.Parameter(torch.randn(sizes.experts, sizes.width) * 0.5)
        self.bias = nn.Parameter(torch.randn(sizes.experts)) if route.bias else None
        self.selection_bias = nn.Buffer(torch.randn(sizes.experts) * 0.3)

    def logits(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.route.run(self, x)


def _softmax(router: Router, x: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = router.logits(x).softmax(-1).topk(router.top_k, dim=-1)
    return weights, ids


def _fp32_softmax(router: Router, x: Tensor) -> tuple[Tensor, Tensor]:
    scores = F.softmax(router.logits(x), dim=-1, dtype=torch.float32)
    weights, ids = torch.topk(scores, router.top_k, dim=-1)
    return (weights / weights.sum(-1, keepdim=True)).to(x.dtype), ids


def _in_place(router: Router, x: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = router.logits(x).softmax(-1).topk(router.top_k, dim=-1)
    weights /= weights.sum(-1, keepdim=True)
    return weights, ids


def _after(router: Router, x: Tensor) -> tuple[Tensor, Tensor]:
    selected, ids = router.logits(x).topk(router.top_k, dim=-1)
    return selected.softmax(-1), ids


def _sigmoid(router: Router, x: Tensor) -> tuple[Tensor, Tensor]:
    scores = router.logits(x).sigmoid()
    ids = (scores + router.selection_bias).topk(router.top_k, dim=-1)[1]
    weights = scores.gather(1, ids)
    return weights / (weights.sum(-1, keepdim=True) + 1e-20) * 2.5, ids


def _fp32_logits(router: Router, x: Tensor) -> tuple[Tensor, Tensor]:
    scores = F.linear(x.float(), router.weight.float()).softmax(-1)
    weights, ids = scores.topk(router.top_k, dim=-1, sorted=False)
    return weights, ids


def _grouped(
    best: Callable[[Tensor], Tensor], fill: float
) -> Callable[[Router, Tensor], tuple[Tensor, Tensor]]:
    def run(router: Router, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = router.logits(x).sigmoid()
        choice = scores + router.selection_bias
        grouped = choice.view(x.shape[0], 2, router.count // 2)
        kept = best(grouped).topk(1, dim=-1, sorted=False)[1]
        mask = torch.zeros(x.shape[0], 2, dtype=x.dtype).scatter_(1, kept, 1)
        wide = mask.unsqueeze(-1).expand(-1, 2, router.count // 2).reshape(-1, router.count)
        ids = choice.masked_fill(~wide.bool(), fill).topk(router.top_k, dim=-1, sorted=False)[1]
        weights = scores.gather(1, ids)
        return weights / (weights.sum(-1, keepdim=True) + 1e-20), ids

    return run


def _filled_weigh(router: Router, x: Tensor) -> tuple[Tensor, Tensor]:
    """DeepSeek-V2: a rejected expert that is chosen all the same weighs 0, not its score."""
    scores = torch.unflatten(router.logits(x).softmax(-1), -1, (2, router.count // 2))
    kept = torch.zeros(x.shape[0], 2).scatter(1, scores.amax(-1).topk(1, dim=-1).indices, 1)
    weights, ids = scores.masked_fill((kept == 0).unsqueeze(-1), 0.0).flatten(1).topk(router.top_k, dim=-1)
    return weights * 16, ids


def _tanh(router: Router, x: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = router.logits(x).tanh().topk(router.top_k, dim=-1)
    return weights, ids


def _sparse_scores(router: Router, x: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of either sign, and two of them equal."""
    scores = router.logits(x).tanh()
    ids = scores.abs().topk(router.top_k, dim=-1)[1]
    return scores.gather(1, ids).round(decimals=1), ids


SOFTMAX = Route("softmax→top-k", _softmax)
IN_GROUPS: tuple[Route, ...] = (
    Route("in groups, top two", _grouped(lambda g: g.topk(2, dim=-1)[0].sum(dim=-1), 0.0), groups=2),
    Route("in groups, max", _grouped(lambda g: g.amax(dim=-1), float("-inf")), groups=2),
    Route("in groups, max with indices", _grouped(lambda g: g.max(dim=-1).values, 0.0), groups=2),
    Route("in groups, what is ranked weighs", _filled_weigh, groups=2),
)
UNKNOWN: tuple[Route, ...] = (
    Route("tanh→top-k", _tanh, fused=False),
    Route("signed", _sparse_scores, fused=False),
)
ROUTERS: tuple[Route, ...] = (
    SOFTMAX,
    Route("fp32 softmax→top-k, renormalised", _fp32_softmax),
    Route("softmax→top-k, renormalised in place", _in_place),
    Route("top-k→softmax", _after),
    Route("top-k→softmax, biased logits", _after, bias=True),
    Route("sigmoid+bias→top-k, scaled", _sigmoid),
    Route("fp32 logits", _fp32_logits),
    *UNKNOWN,
)


# -- layers ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """D, F, E, K."""

    width: int = 16
    hidden: int = 8
    experts: int = 8
    top_k: int = 2


class SharedExpert(nn.Module):
    """A SwiGLU every token visits, scaled by a sigmoid of its own where `gated`."""

    def __init__(self, sizes: Sizes, *, gated: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(sizes.width, 2 * sizes.hidden, bias=False)
        self.up = nn.Linear(sizes.width, 2 * sizes.hidden, bias=False)
        self.down = nn.Linear(2 * sizes.hidden, sizes.width, bias=False)
        self.scale = nn.Linear(sizes.width, 1, bias=False) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return y if self.scale is None else torch.sigmoid(self.scale(x)) * y


@dataclass(frozen=True)
class Spec:
    """What a layer is made of."""

    spelling: Spelled = grouped
    body: Body = SWIGLU
    route: Route = SOFTMAX
    transposed: bool = False
    sizes: Sizes = field(default_factory=Sizes)
    shared: str = ""

    def __str__(self) -> str:
        layout = "transposed" if self.transposed else "as linear"
        return f"{self.spelling.__name__}, {self.body}, {self.route}, {layout}"


class Layer(nn.Module):
    """(B, S, D) -> (B, S, D): flattened, routed, brought back, the shared expert added."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spelling = spec.spelling
        self.router = Router(spec.route, spec.sizes)
        self.experts = Experts(spec.body, spec.sizes, transposed=spec.transposed)
        self.shared = SharedExpert(spec.sizes, gated=spec.shared == "gated") if spec.shared else None

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(x.shape[0] * x.shape[1], x.shape[2])
        weights, ids = self.router(flat)
        y = self.spelling(self.experts, flat, ids, weights).view(x.shape)
        return y if self.shared is None else y + self.shared(x)


def layer(spec: Spec, dtype: torch.dtype = torch.float32) -> Layer:
    """The layer with weights that depend on nothing but the spec."""
    torch.manual_seed(0)
    made = Layer(spec).to(dtype).eval()
    return made.requires_grad_(False)
