"""Random weights that behave: activations stay near unit size, and routers have opinions."""

import torch
from torch import Tensor, nn

from dsmoe_compiler.models.bias_balanced_gate import BiasBalancedGate
from dsmoe_compiler.models.hash_layer import HashGate
from dsmoe_compiler.models.learned_gate import LearnedGate
from dsmoe_compiler.models.norm import RMSNorm


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Fill every parameter and buffer, in place, with values of this seed.

    They depend on the seed, the shapes and the kind of device alone. Parameters are drawn in float32 whatever
    their dtype, so that a seed is one model, rounded differently.
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
        if isinstance(module, HashGate):
            module.expert_of_token.random_(module.num_experts, generator=generator)
        if isinstance(module, BiasBalancedGate):
            # Scores spread from 0.1 to 0.9: a bias that got lost must show, and not decide alone.
            module.e_score_correction_bias.normal_(0.0, 0.1, generator=generator)


def mean_and_std(owner: nn.Module, parameter: Tensor) -> tuple[float, float]:
    """The distribution a parameter of this module is drawn from."""
    if isinstance(owner, RMSNorm):
        return 1.0, 0.1  # not all ones: a norm whose weight got lost must show in the output
    if isinstance(owner, nn.Embedding):
        return 0.0, 1.0
    keeps_unit_size = parameter.shape[-1] ** -0.5
    if isinstance(owner, LearnedGate):
        # Logits of spread 2: near-uniform scores would weigh the routed experts next to nothing.
        return 0.0, 2 * keeps_unit_size
    return 0.0, keeps_unit_size
