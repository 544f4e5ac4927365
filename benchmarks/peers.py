"""Other ways to run the same experts: a zoo model on the same tensors, with transformers' experts in it."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TypeVar

import torch
from torch import Tensor, nn

from dsmoe_compiler.models.deepseek_moe import MoE
from dsmoe_compiler.models.experts import RoutedExperts

# Transformers' ways to run stacked experts on a CPU; its third, batched_mm, copies every pair's weights.
IMPLEMENTATIONS = ("eager", "grouped_mm") if find_spec("transformers") else ()

Model = TypeVar("Model", bound=nn.Module)


class TransformersExperts(nn.Module):
    """Transformers' Qwen3-MoE experts on the tensors of a zoo layer's.

    `implementation` is "eager", a loop over the experts that were hit, or "grouped_mm", rows by expert.
    """

    def __init__(self, experts: RoutedExperts, implementation: str) -> None:
        super().__init__()
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        count, width, hidden = experts.down_proj.shape
        config = Qwen3MoeConfig(num_experts=count, hidden_size=width, moe_intermediate_size=hidden)
        config._experts_implementation = implementation
        with torch.device("meta"):
            self.inner: nn.Module = Qwen3MoeExperts(config)  # type: ignore[no-untyped-call]
        self.inner.gate_up_proj, self.inner.down_proj = experts.gate_up_proj, experts.down_proj

    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """As RoutedExperts."""
        out_TD: Tensor = self.inner(x_TD, ids_TK, weights_TK)
        return out_TD


def with_transformers_experts(model: nn.Module, twin: Model, implementation: str) -> Model:
    """`twin`, given `model`'s tensors and transformers' experts.

    It is the same model without values, built on the meta device, and is changed in place.
    """
    twin.load_state_dict(model.state_dict(), assign=True)
    for module in [*twin.modules()]:
        if isinstance(module, MoE):
            module.add_module("experts", TransformersExperts(module.experts, implementation))
    return twin.eval()
