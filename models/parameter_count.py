"""How many parameters a DeepSeekMoE holds, and how many of them one token uses."""

from dataclasses import dataclass

from dsmoe_compiler.models.deepseek_moe import DeepSeekMoEForCausalLM, MoE


@dataclass(frozen=True)
class ParameterCount:
    """Parameters a model holds, and those one token's forward pass uses.

    Counted as in the DeepSeekMoE paper: the input embedding and the LM head included, K of E routed experts.
    """

    total: int
    activated: int


def count_parameters(model: DeepSeekMoEForCausalLM) -> ParameterCount:
    """Count the parameters of a model on any device, meta included."""
    total = sum(parameter.numel() for parameter in model.parameters())
    routed = sum(
        parameter.numel()
        for module in model.modules()
        if isinstance(module, MoE)
        for parameter in module.experts.parameters()
    )
    experts, chosen = model.config.n_routed_experts, model.config.num_experts_per_tok
    return ParameterCount(total=total, activated=total - routed * (experts - chosen) // experts)
