"""Kernels are tested in Triton's interpreter, on CPU tensors."""

from collections.abc import Iterator

import pytest

from tests.codegen.interpreted import interpreter


@pytest.fixture
def in_interpreter() -> Iterator[None]:
    """For a whole file: `pytestmark = pytest.mark.usefixtures("in_interpreter")`."""
    with interpreter():
        yield
