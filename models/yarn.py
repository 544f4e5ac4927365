"""YaRN (arXiv 2309.00071): rotary positions stretched to a longer context than in pretraining."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """How positions are stretched; fields are named as in `rope_scaling` of DeepSeek's config.json.

    Raises ValueError, one line, when a field cannot be.
    """

    factor: float  # the context became this many times longer
    original_max_position_embeddings: int
    beta_fast: float = 32.0  # a feature that turns this often in the original context is left as it was
    beta_slow: float = 1.0  # one that turns less often than this is slowed down by `factor`
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def __post_init__(self) -> None:
        for name in ("original_max_position_embeddings", "beta_fast", "beta_slow"):
            if getattr(self, name) <= 0:
                raise ValueError(f"rope_scaling: {name} must be positive, got {getattr(self, name)}")
        if self.factor < 1:
            raise ValueError(f"rope_scaling: factor must be at least 1, got {self.factor}")

    @property
    def table_scale(self) -> float:
        """What cosines and sines are multiplied by."""
        return self.magnitude(self.mscale) / self.magnitude(self.mscale_all_dim)

    @property
    def softmax_scale(self) -> float:
        """What attention's scores are multiplied by, beside the usual one over √d."""
        return self.magnitude(self.mscale_all_dim) ** 2

    def magnitude(self, mscale: float) -> float:
        """0.1 · mscale · ln(factor) + 1: longer contexts want sharper attention."""
        return 0.1 * mscale * math.log(self.factor) + 1.0
