"""How many parameters a model of the zoo holds, and how many of them one token uses."""

from dataclasses import dataclass

from torch import nn

from dsmoe_compiler.models.decoder import CausalLM
from dsmoe_compiler.models.decoder_config import DecoderConfig
from dsmoe_compiler.models.moe_config import MoEConfig
from dsmoe_compiler.models.stacked_experts import StackedExperts


@dataclass(frozen=True)
class ParameterCount:
    """Parameters a model holds, and those one token's forward pass uses.

    Counted as in the DeepSeekMoE paper: the input embedding and the LM head included, K of E routed experts.
    """

    total: int
    activated: int


def count_parameters(model: CausalLM[DecoderConfig]) -> ParameterCount:
    """Count the parameters of a model on any device, meta included."""
    total = _size(model)
    if not isinstance(model.config, MoEConfig):
        return ParameterCount(total=total, activated=total)
    routed = sum(_size(module) for module in model.modules() if isinstance(module, StackedExperts))
    experts, chosen = model.config.n_routed_experts, model.config.num_experts_per_tok
    return ParameterCount(total=total, activated=total - routed * (experts - chosen) // experts)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
