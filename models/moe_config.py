"""The sizes of a decoder some of whose feed-forwards are mixtures of experts."""

from dataclasses import dataclass

from dsmoe_compiler.models.decoder_config import DecoderConfig, require_not_negative, require_positive


@dataclass(frozen=True, kw_only=True)
class MoEConfig(DecoderConfig):
    """A decoder whose layers are mixtures of experts, but for the first ones and those between.

    Fields are named as in DeepSeek's config.json. Raises ValueError, one line, when the sizes cannot make a
    model.
    """

    n_routed_experts: int  # E
    num_experts_per_tok: int  # K, the shared experts not counted
    moe_intermediate_size: int  # F
    n_shared_experts: int = 0  # S
    first_k_dense_replace: int = 0  # this many first layers are dense
    moe_layer_freq: int = 1  # of the others, those whose index from 0 is a multiple of it are mixtures

    def __post_init__(self) -> None:
        require_positive(self, "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")
        require_positive(self, "moe_layer_freq")
        require_not_negative(self, "n_shared_experts", "first_k_dense_replace")
        if self.num_experts_per_tok > self.n_routed_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} exceeds "
                f"n_routed_experts={self.n_routed_experts}"
            )
        if self.first_k_dense_replace > self.num_hidden_layers:
            raise ValueError(
                f"first_k_dense_replace={self.first_k_dense_replace} exceeds "
                f"num_hidden_layers={self.num_hidden_layers}"
            )
        super().__post_init__()

    def is_moe(self, index: int) -> bool:
        """Whether the feed-forward of the layer with this index, from 0, is a mixture of experts."""
        return index >= self.first_k_dense_replace and index % self.moe_layer_freq == 0
