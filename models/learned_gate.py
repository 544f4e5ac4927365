"""What every learned gate starts from: a number for each token and expert."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LearnedGate(nn.Module):
    """Logits of the experts: a token's products with the rows of `weight` (E, D)."""

    def __init__(self, num_experts: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))

    def logits(self, x: Tensor) -> Tensor:
        """(..., D) to (..., E), float32."""
        # In float32 in every model, as DeepSeek publishes it: rounded scores tie, and flip choices.
        return F.linear(x.float(), self.weight.float())
