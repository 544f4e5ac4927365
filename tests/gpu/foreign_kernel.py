"""A kernel with the name and the parameters of vLLM's, and only what they mean for plain operands: a file for
`benchmarks.gpu --vllm-kernel`, which takes the kernel's text out of it and nothing else.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,unused-ignore"

import a_package_that_is_not_installed  # type: ignore  # noqa: F401
import triton
import triton.language as tl


@triton.jit
def written_elsewhere(c_ptr, offsets, mask):
    tl.store(c_ptr + offsets, 0.0, mask=mask)


@triton.jit
def place_of(token, column, stride_cm, stride_cn):
    return stride_cm * token[:, None] + stride_cn * column[None, :]


@triton.jit
def fused_moe_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    b_bias_ptr,
    a_scale_ptr,
    b_scale_ptr,
    topk_weights_ptr,
    sorted_token_ids_ptr,
    expert_ids_ptr,
    num_tokens_post_padded_ptr,
    N,
    K,
    EM,
    num_valid_tokens,
    stride_am,
    stride_ak,
    stride_be,
    stride_bk,
    stride_bn,
    stride_cm,
    stride_cn,
    stride_asm,
    stride_bse,
    stride_bbe,
    group_n: tl.constexpr,
    naive_block_assignment: tl.constexpr,
    BLOCK_SIZE_M: tl.constexpr,
    BLOCK_SIZE_N: tl.constexpr,
    BLOCK_SIZE_K: tl.constexpr,
    GROUP_SIZE_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
    MUL_ROUTED_WEIGHT: tl.constexpr,
    top_k: tl.constexpr,
    compute_type: tl.constexpr,
    use_fp8_w8a8: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    block = tl.program_id(0)
    columns = tl.cdiv(N, BLOCK_SIZE_N)
    tile = block // columns
    if tile * BLOCK_SIZE_M >= tl.load(num_tokens_post_padded_ptr):
        return
    place = tile * BLOCK_SIZE_M + tl.arange(0, BLOCK_SIZE_M)
    token = tl.load(sorted_token_ids_ptr + place)
    real = token < num_valid_tokens
    expert = tl.load(expert_ids_ptr + tile).to(tl.int64)
    column = block % columns * BLOCK_SIZE_N + tl.arange(0, BLOCK_SIZE_N)
    total = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_N), dtype=tl.float32)
    for first in range(0, K, BLOCK_SIZE_K):
        k = first + tl.arange(0, BLOCK_SIZE_K)
        a = tl.load(
            a_ptr + token[:, None] // top_k * stride_am + k[None, :] * stride_ak,
            mask=real[:, None] & (k[None, :] < K),
            other=0.0,
        )
        b = tl.load(
            b_ptr + expert * stride_be + k[:, None] * stride_bk + column[None, :] * stride_bn,
            mask=(k[:, None] < K) & (column[None, :] < N),
            other=0.0,
        )
        total = tl.dot(a, b, acc=total)
    if MUL_ROUTED_WEIGHT:
        total *= tl.load(topk_weights_ptr + token, mask=real, other=0.0)[:, None]
    where = c_ptr + place_of(token, column, stride_cm, stride_cn)
    tl.store(where, total.to(compute_type), mask=real[:, None] & (column[None, :] < N))
