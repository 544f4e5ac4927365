"""The combine kernel sums each token's rows as torch does, and never looks at dropped ones."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsmoe_compiler.codegen.kernels.combine import combine_reference
from tests.codegen.interpreted import interpreted, interpreter

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


def combined(
    y: Tensor, ids: Tensor, shared: Tensor | None, experts: int, dtype: torch.dtype, columns: int
) -> Tensor:
    (T, K), D = ids.shape, y.shape[1]
    out = torch.full((T, D), float("nan"), dtype=dtype)
    with interpreter():
        interpreted("combine").combine[(T, -(-D // columns))](
            y,
            ids,
            shared,
            out,
            E=experts,
            K=K,
            D=D,
            HAS_SHARED=shared is not None,
            BLOCK_D=columns,
        )
    return out


def check(
    tokens: int,
    top_k: int,
    hidden: int,
    experts: int,
    y_dtype: torch.dtype,
    shared_dtype: torch.dtype | None,
    dtype: torch.dtype,
    ids_dtype: torch.dtype,
    columns: int,
) -> None:
    ids = torch.randint(-1, experts + 1, (tokens, top_k), dtype=ids_dtype)
    y = torch.randn(tokens * top_k, hidden).to(y_dtype)
    y[((ids < 0) | (ids >= experts)).view(-1)] = float("nan")
    shared = None if shared_dtype is None else torch.randn(tokens, hidden).to(shared_dtype)
    got = combined(y, ids, shared, experts, dtype, columns)
    want = combine_reference(y, ids, shared, experts, dtype)
    # One rounding apart at most: the sums differ in their order.
    torch.testing.assert_close(got, want, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize(
    "tokens, top_k, hidden, experts, y_dtype, shared_dtype, dtype, ids_dtype, columns",
    [
        (1, 1, 64, 1, FP32, None, FP32, torch.int32, 64),
        (7, 6, 33, 60, FP16, FP32, FP32, torch.int32, 64),
        (7, 8, 1, 3, FP32, FP16, FP16, torch.int64, 16),
        (64, 16, 40, 512, BF16, BF16, BF16, torch.int32, 64),
        (130, 1, 17, 64, FP32, FP32, BF16, torch.int64, 16),
    ],
)
def test_rows_are_summed(
    tokens: int,
    top_k: int,
    hidden: int,
    experts: int,
    y_dtype: torch.dtype,
    shared_dtype: torch.dtype | None,
    dtype: torch.dtype,
    ids_dtype: torch.dtype,
    columns: int,
) -> None:
    torch.manual_seed(0)
    check(tokens, top_k, hidden, experts, y_dtype, shared_dtype, dtype, ids_dtype, columns)


def test_the_sum_is_rounded_once() -> None:
    # In fp16, 1 + 2⁻¹¹ is 1 again, and so is adding the other half; together they are the next number.
    half = 2.0**-11
    y = torch.tensor([[1.0], [half], [half]], dtype=FP16)
    got = combined(y, torch.tensor([[0, 1, 2]]), None, 3, FP16, 16)
    assert got.item() == 1.0 + 2 * half


def test_the_worked_example() -> None:
    ids = torch.tensor([[0, 2], [1, -1]])
    y = torch.tensor([[1.0, 1], [2, 2], [4, 4], [float("nan")] * 2])
    got = combined(y, ids, torch.tensor([[10.0, 10], [20, 20]]), 3, FP32, 2)
    assert got.tolist() == [[13, 13], [24, 24]]


@pytest.mark.slow
@settings(max_examples=60)
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 1 << 30)))
    dtypes = st.sampled_from([FP32, FP16, BF16])
    check(
        tokens=data.draw(st.integers(1, 20)),
        top_k=data.draw(st.integers(1, 16)),
        hidden=data.draw(st.integers(1, 150)),
        experts=data.draw(st.integers(1, 512)),
        y_dtype=data.draw(dtypes),
        shared_dtype=data.draw(st.none() | dtypes),
        dtype=data.draw(dtypes),
        ids_dtype=data.draw(st.sampled_from([torch.int32, torch.int64])),
        columns=1 << data.draw(st.integers(5, 9)),
    )
