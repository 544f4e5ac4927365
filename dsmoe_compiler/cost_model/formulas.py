"""FLOPs of the operators that torch's own counter does not know; a multiply-add is two.

Products are counted: sums over a dimension of products. What works on each number alone is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten

# Operators that take long and are no products that anything here counts.
_NOT_COUNTED = (
    "_cudnn_rnn",
    "_fft_",
    "_linalg_",
    "_native_multi_head_attention",
    "_transformer_encoder_layer_fwd",
    "_trilinear",
    "_weight_int",
    "cdist",
    "fft_",
    "gru",
    "linalg_",
    "lstm",
    "rnn_",
)
_POINTWISE = ("linalg_vector_norm", "linalg_cross", "linalg_diagonal")


class NotCounted(Exception):
    """How much work an operator does is not known here."""


def flops_of(target: torch._ops.OpOverload, args: Any, kwargs: Any) -> int:
    """The FLOPs of one call, its tensors on the meta device. Raises NotCounted."""
    name = target._schema.name
    if name in _DIRECT:
        return _DIRECT[name](*args)
    counter = FlopCounterMode(display=False, custom_mapping=_UNKNOWN_TO_TORCH)
    try:
        with counter, torch.no_grad():
            target(*args, **kwargs)
    except (RuntimeError, NotImplementedError) as e:
        raise NotCounted(f"{name}: {e}") from e
    flops = counter.get_total_flops()
    space, _, plain = name.partition("::")
    if not flops and (space not in ("aten", "prims", "dsmoe") or _is_long(plain)):
        raise NotCounted(f"what {name} computes is not known")
    return flops


def is_attention(target: torch._ops.OpOverload) -> bool:
    """Whether an operator multiplies activations alone, though its mask may be the model's own."""
    return _DIRECT.get(target._schema.name) is _attention


def can_multiply(target: torch._ops.OpOverload) -> bool:
    """Whether an operator, by its name, may be one with products: asked where its sizes are not known."""
    space, _, plain = target._schema.name.partition("::")
    return space not in ("aten", "prims", "dsmoe") or plain in _PRODUCTS or _is_long(plain)


def attention(q: Sequence[int], k: Sequence[int], v: Sequence[int]) -> int:
    """softmax(q kᵀ) v, of shapes (…, H, L, d), (…, h, M, d) and (…, h, M, c), every query with every key:
    what a causal mask hides is counted too.
    """
    return 2 * prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def grouped_mm(a: Sequence[int], b: Sequence[int]) -> int:
    """Rows in groups times a matrix for each group: (P, D) by (G, D, F), or with the groups elsewhere."""
    groups = a[0] if len(a) == 3 and len(b) == 3 else 1
    return 2 * groups * a[-2] * a[-1] * b[-1]


def bilinear(x: Sequence[int], y: Sequence[int], weight: Sequence[int]) -> int:
    """x W y of shapes (…, D), (O, D, C) and (…, C): a row's product with W, and that with the other row."""
    out, _, other = weight
    return 2 * prod(x) * out * other + 2 * prod(y) * out


def _is_long(plain: str) -> bool:
    return plain.startswith(_NOT_COUNTED) and plain not in _POINTWISE


def _attention(q: Tensor, k: Tensor, v: Tensor, *others: object) -> int:
    return attention(q.shape, k.shape, v.shape)


def _bilinear(x: Tensor, y: Tensor, weight: Tensor, *others: object) -> int:
    return bilinear(x.shape, y.shape, weight.shape)


def _grouped(a: Tensor, b: Tensor, *others: object) -> int:
    return grouped_mm(a.shape, b.shape)


# Which kernel attention becomes depends on the device; its products do not.
_DIRECT: dict[str, Callable[..., int]] = {
    "aten::scaled_dot_product_attention": _attention,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten::bilinear": _bilinear,
    "aten::_grouped_mm": _grouped,
    "aten::_scaled_grouped_mm": _grouped,
    "transformers::grouped_mm_fallback": _grouped,
}


def _vector(a: Sequence[int], b: Sequence[int], **rest: object) -> int:
    return 2 * prod(a)


def _add_vector(added: Sequence[int], a: Sequence[int], b: Sequence[int], **rest: object) -> int:
    return 2 * prod(a)


def _add_batches(added: Sequence[int], a: Sequence[int], b: Sequence[int], **rest: object) -> int:
    return 2 * prod(a) * b[-1]


def _matrices(a: Sequence[int], b: Sequence[int], **rest: object) -> int:
    return 2 * prod(a) * b[-1]


_UNKNOWN_TO_TORCH: dict[Any, Any] = {
    aten.mv: _vector,
    aten.dot: _vector,
    aten.vdot: _vector,
    aten.addmv: _add_vector,
    aten.addbmm: _add_batches,
    aten._int_mm: _matrices,
}
_PRODUCTS = frozenset(
    {
        *(
            "linear",
            "matmul",
            "mm",
            "bmm",
            "addmm",
            "addbmm",
            "baddbmm",
            "mv",
            "addmv",
            "dot",
            "vdot",
            "inner",
        ),
        *("einsum", "tensordot", "bilinear", "chain_matmul", "_int_mm", "_grouped_mm", "_scaled_grouped_mm"),
        *("scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu"),
        *(
            "convolution",
            "_convolution",
            "conv1d",
            "conv2d",
            "conv3d",
            "conv_transpose1d",
            "conv_transpose2d",
        ),
    }
)
