"""Combine: a token's output is the sum of its experts' rows and of what its shared experts made.

A gather, in the order of the slots, without atomics: the same bits every time.

Two tokens, K = 2; token 1's second pair was dropped, and its row was never written:

    ids  [[0, 2],      y  [[1, 1],       shared  [[10, 10],     out  [[13, 13],
          [1, -1]]         [2, 2],                [20, 20]]           [24, 24]]
                           [4, 4],
                           [?, ?]]
"""

import torch
import triton
import triton.language as tl


@triton.jit
def combine(
    y,  # [P, D], the routing weight applied; rows of dropped pairs hold anything, NaN too
    ids,  # [T, K]
    shared,  # [T, D], the shared experts' output
    out,  # [T, D]
    E: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[t] = Σ_k y[t·K + k] + shared[t], summed in fp32 and rounded once. Grid: (T, cdiv(D, BLOCK_D))."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < D
    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    for slot in tl.static_range(K):
        pair = token * K + slot
        expert = tl.load(ids + pair)
        # No load rather than a product with 0: what a dropped pair's row holds must not matter.
        known = tl.where((expert >= 0) & (expert < E), D, 0)
        total += tl.load(y + pair * D + columns, mask=columns < known, other=0.0).to(tl.float32)
    if HAS_SHARED:
        total += tl.load(shared + token * D + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * D + columns, total, mask=inside)


def combine_reference(
    y_PD: torch.Tensor,
    ids_TK: torch.Tensor,
    shared_TD: torch.Tensor | None,
    experts: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """What `combine` computes, in torch: out (T, D) in `dtype`."""
    routed_TK1 = ((ids_TK >= 0) & (ids_TK < experts)).unsqueeze(-1)
    y_TKD = y_PD.float().view(*ids_TK.shape, -1)
    total_TD = torch.where(routed_TK1, y_TKD, 0.0).sum(1)
    return (total_TD if shared_TD is None else total_TD + shared_TD.float()).to(dtype)
