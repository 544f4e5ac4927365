"""Experts that do more than two products and an activation, run in the ways layers run experts.

A body is a function of rows and of `Given`, which knows the rows' experts: `gemm` multiplies by their
matrices, `vector` is what each row's expert holds, `shared` what all experts read.
T tokens, D model width, F expert hidden width, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import transformers.integrations.moe  # noqa: F401  (defines transformers::grouped_mm_fallback)
from torch import Tensor, nn

D, HIDDEN, EXPERTS, SLOTS = 16, 12, 6, 2


@dataclass(frozen=True)
class Given:
    """What a body reads, of the experts whose rows these are."""

    gemm: Callable[[str, Tensor], Tensor]
    vector: Callable[[str], Tensor]
    shared: nn.ParameterDict


BodyFunction = Callable[[Tensor, Given], Tensor]
VECTORS = {"in_scale": D, "scale": HIDDEN, "bias": HIDDEN, "out_scale": D, "number": 1}


def parameters() -> dict[str, Tensor]:
    """Each expert's tensors, the experts first."""
    made = {"up": torch.randn(EXPERTS, 2 * HIDDEN, D) * 0.3, "first": torch.randn(EXPERTS, HIDDEN, D) * 0.3}
    made |= {
        "middle": torch.randn(EXPERTS, HIDDEN, HIDDEN) * 0.3,
        "down": torch.randn(EXPERTS, D, HIDDEN) * 0.3,
    }
    return made | {name: torch.rand(EXPERTS, width) + 0.5 for name, width in VECTORS.items()}


def shared() -> nn.ParameterDict:
    """What all experts read."""
    sizes = {"before": (D,), "hidden": (HIDDEN,), "out": (D,), "slope": (1,), "scalar": (), "places": (64,)}
    made = {name: torch.rand(size) + 0.5 for name, size in sizes.items()}
    made |= {"project": torch.randn(HIDDEN, HIDDEN) * 0.3, "turned": torch.randn(HIDDEN, HIDDEN) * 0.3}
    return nn.ParameterDict({name: nn.Parameter(t) for name, t in made.items()})


# -- bodies ----------------------------------------------------------------------------------------


def _rms(rows: Tensor, eps: float = 1e-6) -> Tensor:
    return rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + eps)


def norm_between(x: Tensor, p: Given) -> Tensor:
    return p.gemm("down", F.layer_norm(F.relu(p.gemm("first", x)), (HIDDEN,)))


def norm_between_weighed_by_all(x: Tensor, p: Given) -> Tensor:
    weight, bias = p.shared["hidden"], p.shared["hidden"] * 0.1
    return p.gemm("down", F.layer_norm(F.silu(p.gemm("first", x)), (HIDDEN,), weight, bias, 1e-3))


def rms_between(x: Tensor, p: Given) -> Tensor:
    return p.gemm("down", F.rms_norm(F.silu(p.gemm("first", x)), (HIDDEN,), p.shared["hidden"], 1e-6))


def rms_before(x: Tensor, p: Given) -> Tensor:
    return p.gemm("down", F.gelu(p.gemm("first", _rms(x) * p.shared["before"])))


def rms_after_as_gemma(x: Tensor, p: Given) -> Tensor:
    rows = p.gemm("down", F.silu(p.gemm("first", x)))
    normed: Tensor = _rms(rows.float()) * (1.0 + p.shared["out"].float())
    return normed.type_as(x)


def norm_of_each_expert(x: Tensor, p: Given) -> Tensor:
    h = p.gemm("first", x)
    centred = h - h.mean(-1, keepdim=True)
    h = centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5) * p.vector("scale") + p.vector(
        "bias"
    )
    return p.gemm("down", F.relu(h))


def variance_by_torch(x: Tensor, p: Given) -> Tensor:
    h = p.gemm("first", x)
    h = (h - h.mean(-1, keepdim=True)) / (h.std(-1, keepdim=True, unbiased=False) + 1e-5)
    return p.gemm("down", F.relu(h * p.vector("scale")))


def scales_of_each_expert(x: Tensor, p: Given) -> Tensor:
    rows = p.gemm("first", x / p.vector("in_scale")) * (1 + p.vector("scale"))
    return p.gemm("down", F.relu(rows)) * p.vector("out_scale") * p.vector("number")


def soft_maximum(x: Tensor, p: Given) -> Tensor:
    return p.gemm("down", torch.softmax(p.gemm("first", x), dim=-1))


def normalized(x: Tensor, p: Given) -> Tensor:
    h = F.normalize(p.gemm("first", x), dim=-1)
    return p.gemm("down", h - h.amax(-1, keepdim=True) + h.sum(-1, keepdim=True))


def log_normalized(x: Tensor, p: Given) -> Tensor:
    h = p.gemm("first", x)
    return p.gemm("down", h - h.logsumexp(-1, keepdim=True) + h.max(-1, keepdim=True).values)


def gated_linear_unit(x: Tensor, p: Given) -> Tensor:
    return p.gemm("down", F.glu(p.gemm("up", x), dim=-1))


def by_parts(x: Tensor, p: Given) -> Tensor:
    a, b, c = p.gemm("first", x).chunk(3, dim=-1)
    return p.gemm("down", torch.cat([F.relu(c), torch.tanh(a), F.mish(b)], dim=-1))


def cut_by_views(x: Tensor, p: Given) -> Tensor:
    """Gate and up one after the other, then taking turns, told apart by views of the width."""
    h = p.gemm("up", x)
    gate, up = h.view(*h.shape[:-1], 2, HIDDEN).unbind(-2)
    h = torch.cat([F.silu(gate) * up, gate], dim=-1).reshape(*h.shape[:-1], HIDDEN, 2)
    return p.gemm("down", h[..., 0] * h[..., 1].sigmoid())


def by_einsum(x: Tensor, p: Given) -> Tensor:
    h = p.gemm("first", x)
    letters = "zyx"[: h.dim() - 1]
    h = torch.einsum(f"{letters}f,gf->{letters}g", F.relu(h), p.shared["project"])
    return p.gemm("down", torch.einsum(f"fg,{letters}f->{letters}g", p.shared["turned"], h))


def of_several_operands(x: Tensor, p: Given) -> Tensor:
    h = p.gemm("first", x)
    h = torch.lerp(h, torch.addcmul(h, h, p.vector("scale"), value=0.5), 0.3)
    return p.gemm("down", torch.add(h, torch.max(h, -h), alpha=0.3) + 2 ** h.clip(-1, 1))


def in_groups(x: Tensor, p: Given) -> Tensor:
    """The groups' norm counts its dimensions: rows must have one."""
    h = p.gemm("first", x)
    return p.gemm("down", F.group_norm(h, 3, p.shared["hidden"])) if h.dim() == 2 else p.gemm("down", h)


def chosen_by_sign(x: Tensor, p: Given) -> Tensor:
    h = p.gemm("first", x)
    h = torch.where((h > 0.1) & ~(h >= 2), h, h * p.shared["slope"])
    return p.gemm("down", h.masked_fill(h < -1, -1.0))


def projected_by_all(x: Tensor, p: Given) -> Tensor:
    h = F.linear(F.silu(p.gemm("first", x)), p.shared["project"], p.shared["hidden"])
    rows: Tensor = p.gemm("down", h @ p.shared["turned"]) * p.shared["scalar"]
    return rows


def in_wider_numbers(x: Tensor, p: Given) -> Tensor:
    h = p.gemm("first", x)
    return p.gemm(
        "down", torch.softmax(h, -1, dtype=torch.float64).to(h.dtype) + h.double().exp().to(h.dtype)
    )


def three_products(x: Tensor, p: Given) -> Tensor:
    return p.gemm("down", F.relu(p.gemm("middle", F.layer_norm(p.gemm("first", x), (HIDDEN,)))))


def _between(act: Callable[[Tensor], Tensor], name: str) -> BodyFunction:
    def run(x: Tensor, p: Given) -> Tensor:
        return p.gemm("down", act(p.gemm("first", x)))

    run.__name__ = name
    return run


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "hardtanh": F.hardtanh,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "elu": lambda h: F.elu(h, 1.5),
    "celu": lambda h: F.celu(h, 1.5),
    "selu": F.selu,
    "mish": F.mish,
    "log_sigmoid": F.logsigmoid,
    "softsign": F.softsign,
    "tanhshrink": F.tanhshrink,
    "softshrink": F.softshrink,
    "hardshrink": F.hardshrink,
    "threshold": lambda h: F.threshold(h, 0.1, -2.0),
    "log1p": lambda h: torch.log1p(h.abs()),
    "expm1": torch.expm1,
    "reciprocal": lambda h: 1 / (h.abs() + 1),
    "sine": lambda h: torch.sin(h) * torch.cos(h),
    "sign": lambda h: torch.sign(h) * h,
    "squared relu": lambda h: F.relu(h).square(),
    "arc tangent": torch.atan,
    "softplus": lambda h: F.softplus(h, beta=2.0, threshold=1.0),
    "not a number": lambda h: torch.log(h).nan_to_num(-1.0),
    "power of two": lambda h: torch.exp2(h) + torch.log2(h.abs() + 1),
}
BODIES: tuple[BodyFunction, ...] = (
    norm_between,
    norm_between_weighed_by_all,
    rms_between,
    rms_before,
    rms_after_as_gemma,
    norm_of_each_expert,
    variance_by_torch,
    scales_of_each_expert,
    soft_maximum,
    normalized,
    log_normalized,
    gated_linear_unit,
    by_parts,
    cut_by_views,
    by_einsum,
    of_several_operands,
    in_groups,
    chosen_by_sign,
    projected_by_all,
    in_wider_numbers,
    three_products,
)
ACTIVATED = tuple(_between(act, name) for name, act in ACTIVATIONS.items())


# -- what is no body ---------------------------------------------------------------------------------


def over_the_rows(x: Tensor, p: Given) -> Tensor:
    """Centred over the rows, not along each."""
    h = p.gemm("first", x)
    return p.gemm("down", h - h.mean(0, keepdim=True))


def softmax_over_the_rows(x: Tensor, p: Given) -> Tensor:
    return p.gemm("down", torch.softmax(p.gemm("first", x), dim=0))


def softmax_over_the_row_before_the_last(x: Tensor, p: Given) -> Tensor:
    return p.gemm("down", torch.softmax(p.gemm("first", x), dim=-2))


def scaled_by_all_rows(x: Tensor, p: Given) -> Tensor:
    h = p.gemm("first", x)
    return p.gemm("down", h * x.mean())


def scaled_by_place(x: Tensor, p: Given) -> Tensor:
    """A learned number for each place in the batch, as many as the rows happen to be."""
    places: Tensor = p.shared["places"][: x.shape[-2]].unsqueeze(-1)
    return p.gemm("down", p.gemm("first", x)) * places


def norm_of_all(x: Tensor, p: Given) -> Tensor:
    h = p.gemm("first", x)
    return p.gemm("down", h / (h.norm() + 1))


def less_all_rows(x: Tensor, p: Given) -> Tensor:
    h = p.gemm("first", x)
    return p.gemm("down", h - h.sum(-2, keepdim=True))


def cumulated(x: Tensor, p: Given) -> Tensor:
    return p.gemm("down", p.gemm("first", x).cumsum(-2))


def turned(x: Tensor, p: Given) -> Tensor:
    """The rows' numbers read column by column."""
    h = p.gemm("first", x)
    return p.gemm("down", h.transpose(-1, -2).reshape(h.shape))


def largest_of_each_pair(x: Tensor, p: Given) -> Tensor:
    """Half as many numbers a row, each the larger of two: no operator along the width says that."""
    h = p.gemm("up", x)
    return p.gemm("down", h.view(*h.shape[:-1], HIDDEN, 2).amax(-1))


NO_BODIES: tuple[BodyFunction, ...] = (
    over_the_rows,
    softmax_over_the_rows,
    softmax_over_the_row_before_the_last,
    scaled_by_all_rows,
    scaled_by_place,
    norm_of_all,
    less_all_rows,
    cumulated,
    turned,
    largest_of_each_pair,
)


# -- ways to run them ------------------------------------------------------------------------------


class Layer(nn.Module):
    """Softmax, top-k, renormalised; the experts as a subclass runs them."""

    def __init__(self, body: BodyFunction) -> None:
        super().__init__()
        self.body = body
        self.gate = nn.Linear(D, EXPERTS, bias=False)
        self.shared = shared()
        self._hold({name: nn.Parameter(t) for name, t in parameters().items()})
        self.requires_grad_(False)

    def _hold(self, tensors: dict[str, nn.Parameter]) -> None:
        self.own = nn.ParameterDict(tensors)

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.reshape(-1, D)
        scores, ids = torch.softmax(self.gate(x), dim=-1, dtype=torch.float32).topk(SLOTS, dim=-1)
        weights = (scores / scores.sum(-1, keepdim=True)).to(x.dtype)
        return self.experts(x, ids, weights).view_as(hidden)

    def experts(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        raise NotImplementedError

    def _given(self, gemm: Callable[[str, Tensor], Tensor], vector: Callable[[str], Tensor]) -> Given:
        return Given(gemm, vector, self.shared)

    def _of(self, own: dict[str, Tensor]) -> Given:
        """The tensors of one expert."""
        return self._given(lambda name, rows: rows @ own[name].t(), own.__getitem__)


class Looped(Layer):
    """One expert at a time, its entries of stacked tensors."""

    def experts(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(EXPERTS):
            tokens, slots = torch.where(ids == e)
            y = self.body(x[tokens], self._of({name: tensor[e] for name, tensor in self.own.items()}))
            out.index_add_(0, tokens, y * weights[tokens, slots, None])
        return out


class Separate(Layer):
    """One expert at a time, each a module with parameters of its own."""

    def _hold(self, tensors: dict[str, nn.Parameter]) -> None:
        self.each = nn.ModuleList(
            nn.ParameterDict({name: nn.Parameter(t[e].clone()) for name, t in tensors.items()})
            for e in range(EXPERTS)
        )

    def experts(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, own in enumerate(self.each):
            chosen = ids == e
            rows = chosen.any(-1)
            weight = (weights * chosen).sum(-1, keepdim=True)
            out[rows] += self.body(x[rows], self._of(dict(own.named_parameters()))) * weight[rows]
        return out


class Gathered(Layer):
    """Each pair gathers its expert's tensors."""

    def experts(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        given = self._given(
            lambda name, rows: torch.bmm(self.own[name][flat], rows.unsqueeze(-1)).squeeze(-1),
            lambda name: self.own[name][flat],
        )
        y = self.body(x.repeat_interleave(SLOTS, dim=0), given) * weights.reshape(-1, 1)
        return y.view(x.shape[0], SLOTS, D).sum(1)


class Grouped(Layer):
    """Pairs sorted by expert, grouped products."""

    def experts(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        flat, order = ids.reshape(-1).sort()
        ends = torch.histc(flat.float(), EXPERTS, 0, EXPERTS - 1).cumsum(0, dtype=torch.int32)
        product = torch.ops.transformers.grouped_mm_fallback
        given = self._given(
            lambda name, rows: product(rows, self.own[name].transpose(1, 2), ends),
            lambda name: self.own[name][flat],
        )
        y = self.body(x[order // SLOTS], given) * weights.reshape(-1)[order].unsqueeze(-1)
        return torch.zeros_like(x).index_add_(0, order // SLOTS, y)


class Dense(Layer):
    """Every token through every expert, weights zero off the ids."""

    def experts(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        given = self._given(
            lambda name, rows: torch.bmm(rows, self.own[name].transpose(1, 2)),
            lambda name: self.own[name].unsqueeze(1),
        )
        y = self.body(x.unsqueeze(0).expand(EXPERTS, -1, -1), given)
        scattered = torch.zeros(x.shape[0], EXPERTS, dtype=x.dtype).scatter(1, ids, weights)
        return (y * scattered.t().unsqueeze(-1)).sum(0)


class DenseByEinsum(Layer):
    """The same with the tokens first."""

    def experts(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        given = self._given(
            lambda name, rows: torch.einsum("tei,eoi->teo", rows, self.own[name]), lambda name: self.own[name]
        )
        y = self.body(x.unsqueeze(1).expand(-1, EXPERTS, -1), given)
        scattered = torch.zeros(x.shape[0], EXPERTS, dtype=x.dtype).scatter(1, ids, weights)
        return (y * scattered.unsqueeze(-1)).sum(1)


WAYS: tuple[type[Layer], ...] = (Looped, Separate, Gathered, Grouped, Dense)
