"""The constants of `kernels/route.py` that follow from what the router is and from its tensors' dtypes."""

from __future__ import annotations

import torch
import triton.language as tl

from dsmoe_compiler.ir.spec import RouterSpec

# At least so many columns has a block that a matrix product takes.
_DOT_COLUMNS = 16


def weights_dtype(spec: RouterSpec, x: str) -> str:
    """The dtype of the routing weights (T, K) of tokens in dtype `x`."""
    return spec.weight_dtype or spec.score_dtype or spec.logits_dtype or x


def route_constants(
    spec: RouterSpec, *, experts: int, hidden: int, x: str, weight: str, selection_bias: str = ""
) -> dict[str, object]:
    """What `route` is folded with, but for its tiles: names of its parameters and their values.

    `experts` is E, `hidden` D; `x`, `weight` and `selection_bias` are the tensors' dtypes ("bfloat16"), the
    last one "" where there is none. Raises ValueError for a router that the kernel does not compute.
    """
    logits = spec.logits_dtype or x
    scores = spec.score_dtype or logits
    ranked = scores if not spec.selection_bias else _promoted(scores, selection_bias)
    _check(spec, experts, {x, weight, logits, scores, ranked})
    members = experts // spec.groups
    groups_pad = _padded(spec.groups)
    group_columns = max(_padded(members), _DOT_COLUMNS // groups_pad)
    product = _product(logits, x, weight)
    return {
        "E": experts,
        "K": spec.top_k,
        "D": hidden,
        "LOGITS_BIAS": spec.logits_bias,
        "SELECTION_BIAS": spec.selection_bias,
        "SOFTMAX": spec.score == "softmax",
        "SCORE_SELECTED": spec.select == "logits",
        "GROUPS": spec.groups,
        "GROUP_EXPERTS": members,
        "TOP_GROUPS": spec.top_groups,
        "GROUP_TOP2": spec.group_score == "top2",
        "GROUP_FILL": torch.tensor(spec.group_fill, dtype=getattr(torch, ranked)).item(),
        "WEIGH_SCORES": spec.weigh == "scores" and (spec.selection_bias or spec.groups > 1),
        "RENORMALIZE": spec.renormalize,
        "EPSILON": spec.epsilon,
        "SCALE": spec.scale,
        "PRODUCT_DTYPE": getattr(tl, product),
        "ROUND_OPERANDS": product != "float32" and (x != product or weight != product),
        "LOGITS_DTYPE": getattr(tl, logits),
        "ROUND_LOGITS": logits != "float32",
        "SCORE_DTYPE": getattr(tl, scores),
        "ROUND_SCORES": scores != "float32",
        "RANK_DTYPE": getattr(tl, ranked),
        "ROUND_RANKED": ranked != "float32",
        "COLUMNS": groups_pad * group_columns,
        "GROUPS_PAD": groups_pad,
        "GROUP_COLUMNS": group_columns,
        "K_PAD": _padded(spec.top_k),
    }


def _check(spec: RouterSpec, experts: int, dtypes: set[str]) -> None:
    if "float64" in dtypes:
        raise ValueError("the routing kernel computes in float32, and this router in float64")
    if experts % spec.groups:
        raise ValueError(f"{experts} experts do not make {spec.groups} groups")
    if spec.top_k > experts:
        raise ValueError(f"top-{spec.top_k} of {experts} experts")
    if spec.groups > 1 and spec.group_score == "top2" and experts == spec.groups:
        raise ValueError("groups of one expert have no two best")


def _product(logits: str, x: str, weight: str) -> str:
    """The dtype that operands are multiplied in.

    A product of two 16-bit numbers of one dtype is exact in float32: tensor cores give what a float32 router
    asks for. Otherwise the operands are cast to `logits` as the model does.
    """
    if logits == "float32" and x == weight:
        return x
    return logits


def _promoted(a: str, b: str) -> str:
    return str(torch.promote_types(getattr(torch, a), getattr(torch, b))).removeprefix("torch.")


def _padded(n: int) -> int:
    """The power of two ≥ n."""
    return 1 << (n - 1).bit_length()
