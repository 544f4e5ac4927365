"""The sizes of the mixtures of experts that DeepSeekMoE is compared with."""

from dataclasses import dataclass

from dsmoe_compiler.models.decoder_config import require_not_negative, require_positive
from dsmoe_compiler.models.moe_config import MoEConfig


@dataclass(frozen=True, kw_only=True)
class GShardConfig(MoEConfig):
    """GShard's: two experts a token, each with room for so many tokens of a group.

    Raises ValueError, one line, when the sizes cannot make a model.
    """

    capacity_factor: float = 1.0  # an expert has room for this many times its even share of the choices

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "capacity_factor")
        if self.num_experts_per_tok != 2:
            raise ValueError(f"GShard chooses num_experts_per_tok=2, got {self.num_experts_per_tok}")
        require_no_shared_experts(self)


@dataclass(frozen=True, kw_only=True)
class SwitchConfig(MoEConfig):
    """Switch Transformer's: one expert a token, with room for so many tokens of a group.

    Raises ValueError, one line, when the sizes cannot make a model.
    """

    train_capacity_factor: float = 1.25  # an expert has room for this many times its even share
    eval_capacity_factor: float = 2.0
    min_capacity: int = 4
    jitter: float = 1e-2  # in training, tokens reach the gate times a number from 1 - jitter to 1 + jitter

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "train_capacity_factor", "eval_capacity_factor", "min_capacity")
        require_not_negative(self, "jitter")
        require_one_expert(self)
        require_no_shared_experts(self)


@dataclass(frozen=True, kw_only=True)
class HashLayerConfig(MoEConfig):
    """Hash Layer's: one expert a token, which a fixed table gives for the token's id.

    Raises ValueError, one line, when the sizes cannot make a model.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_expert(self)
        require_no_shared_experts(self)


def require_one_expert(config: MoEConfig) -> None:
    """Raise ValueError where a token has more than one expert."""
    if config.num_experts_per_tok != 1:
        raise ValueError(
            f"{type(config).__name__} chooses num_experts_per_tok=1, got {config.num_experts_per_tok}"
        )


def require_no_shared_experts(config: MoEConfig) -> None:
    """Raise ValueError where there are shared experts."""
    if config.n_shared_experts:
        raise ValueError(f"{type(config).__name__} has n_shared_experts=0, got {config.n_shared_experts}")
