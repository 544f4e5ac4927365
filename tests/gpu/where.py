"""Where these tests run: on a CUDA device.

With TRITON_INTERPRET=1 they run in Triton's interpreter instead, on CPU tensors, small and without bfloat16
(which it multiplies wrongly): so that the tests can be tested where there is no GPU.
"""

import pytest
import torch
import triton

INTERPRETED = bool(triton.knobs.runtime.interpret)
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
DTYPES = (torch.float16, torch.float32) if INTERPRETED else (torch.bfloat16, torch.float16, torch.float32)

on_a_device = pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device; the interpreter is none")


def at_most(tokens: int, *counts: int) -> tuple[int, ...]:
    """The counts of tokens to try; of those, in the interpreter, only the ones up to `tokens`."""
    return tuple(count for count in counts if count <= tokens or not INTERPRETED)
