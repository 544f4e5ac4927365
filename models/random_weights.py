"""Random weights that behave: activations stay near unit size, and routers have opinions."""

import torch
from torch import Tensor, nn

from dsmoe_compiler.models.deepseek_moe import Gate, RMSNorm


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Fill every parameter, in place, with values that depend on the seed, the shapes and the kind of device.

    Drawn in float32 whatever the parameters' dtype, so that a seed is one model, rounded differently.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            mean, std = mean_and_std(module, parameter)
            if parameter.dtype == torch.float32:  # drawn in place: no second copy of the largest tensors
                parameter.normal_(mean, std, generator=generator)
            else:
                drawn = torch.empty_like(parameter, dtype=torch.float32)
                parameter.copy_(drawn.normal_(mean, std, generator=generator))


def mean_and_std(owner: nn.Module, parameter: Tensor) -> tuple[float, float]:
    """The distribution a parameter of this module is drawn from."""
    if isinstance(owner, RMSNorm):
        return 1.0, 0.1  # not all ones: a norm whose weight got lost must show in the output
    if isinstance(owner, nn.Embedding):
        return 0.0, 1.0
    keeps_unit_size = parameter.shape[-1] ** -0.5
    if isinstance(owner, Gate):
        # Logits of spread 2: near-uniform scores would weigh the routed experts next to nothing.
        return 0.0, 2 * keeps_unit_size
    return 0.0, keeps_unit_size
