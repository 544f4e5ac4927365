"""What holds of every architecture of the zoo: any sizes, any dtype, a gradient for every parameter."""

import pytest
import torch

from dsmoe_compiler.models.zoo import build, names
from tests.tiny_models import relative, tokens

TINY = [name for name in names() if name.endswith("-tiny")]


@torch.no_grad()
@pytest.mark.parametrize("shape", [(3, 9), (0, 5), (1, 1), (2, 0), (1, 300)])
@pytest.mark.parametrize("name", TINY)
def test_any_batch_and_length_runs(name: str, shape: tuple[int, int]) -> None:
    logits = build(name)(tokens(*shape))
    assert logits.shape == (*shape, 512)
    assert logits.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", TINY)
def test_other_dtypes_run(name: str, dtype: torch.dtype) -> None:
    logits = build(name, dtype=dtype)(tokens(2, 9))
    assert logits.dtype == dtype
    assert logits.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("name", TINY)
def test_a_sequence_does_not_see_its_neighbours(name: str) -> None:
    model, ids = build(name), tokens(3, 14)
    assert relative(model(ids)[1:2], model(ids[1:2])) < 1e-5


@pytest.mark.parametrize("name", TINY)
def test_training_reaches_every_parameter(name: str) -> None:
    model = build(name).train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model(tokens(4, 60)).square().mean().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all() and parameter.grad.any(), parameter_name
