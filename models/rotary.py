"""Rotary positions (RoFormer, arXiv 2104.09864, eq. 15): pairs of features turned by angles that grow along
the sequence.

Shapes: B batch, L length, H heads, d width of what is turned, h = d/2 pairs.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dsmoe_compiler.models.yarn import YarnScaling


@dataclass(frozen=True)
class Rotary:
    """The angles of a model: d, the base of their frequencies, and how they are stretched, if they are."""

    width: int
    theta: float
    scaling: YarnScaling | None = None

    def table(self, length: int, *, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The cosine and sine of every position's angles, each (L, 1, h), taken in float32 and rounded.

        Computed from the length at every call: no buffer that limits it, nothing to move or to materialise.
        """
        position = torch.arange(length, device=device, dtype=torch.float32)
        angle_L1h = position.view(length, 1, 1) * self.frequencies(device)
        cos_L1h, sin_L1h = angle_L1h.cos(), angle_L1h.sin()
        if self.scaling is not None:
            cos_L1h, sin_L1h = cos_L1h * self.scaling.table_scale, sin_L1h * self.scaling.table_scale
        return cos_L1h.to(dtype), sin_L1h.to(dtype)

    def frequencies(self, device: torch.device) -> Tensor:
        """Radians that each pair turns from one position to the next, (h,)."""
        feature = torch.arange(0, self.width, 2, device=device, dtype=torch.float32)
        frequency = torch.pow(self.theta, -feature / self.width)
        if self.scaling is None:
            return frequency
        # YaRN: pairs that seldom came round in the original context are slowed down, fast ones are not.
        low = max(math.floor(self._pair_that_turns(self.scaling.beta_fast, self.scaling)), 0)
        high = min(math.ceil(self._pair_that_turns(self.scaling.beta_slow, self.scaling)), self.width - 1)
        slowed = ((feature / 2 - low) / max(high - low, 0.001)).clamp(0, 1)
        return frequency * (1 - slowed) + frequency / self.scaling.factor * slowed

    def _pair_that_turns(self, times: float, scaling: YarnScaling) -> float:
        """Which pair, as a fraction, comes round this often in the original context."""
        wavelength = scaling.original_max_position_embeddings / (times * 2 * math.pi)
        return self.width * math.log(wavelength) / (2 * math.log(self.theta))


def rotate_halves(x_BLHd: Tensor, cos_L1h: Tensor, sin_L1h: Tensor) -> Tensor:
    """Turn each pair (i, i + d/2), as LLaMA and DeepSeekMoE pair features; shape and dtype stay."""
    first, second = x_BLHd.chunk(2, dim=-1)
    return torch.cat((first * cos_L1h - second * sin_L1h, second * cos_L1h + first * sin_L1h), dim=-1)


def rotate_neighbours(x_BLHd: Tensor, cos_L1h: Tensor, sin_L1h: Tensor) -> Tensor:
    """Turn each pair (2i, 2i + 1), as DeepSeek-V2 and V3 pair features; shape and dtype stay."""
    first, second = torch.unflatten(x_BLHd, -1, (-1, 2)).unbind(-1)
    turned = torch.stack((first * cos_L1h - second * sin_L1h, second * cos_L1h + first * sin_L1h), dim=-1)
    return turned.flatten(-2)
