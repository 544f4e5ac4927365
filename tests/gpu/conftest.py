"""What all tests of this room need: kernels that ran, and full float32."""

import warnings
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _no_layer_runs_by_the_reference() -> Iterator[None]:
    """It would be compared with itself: the warning that there are no kernels is an error here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "no kernels for")
        yield


@pytest.fixture(autouse=True)
def _full_float32() -> None:
    assert not torch.backends.cuda.matmul.allow_tf32, "the reference would be off by more than the kernels"
