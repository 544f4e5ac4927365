"""The sizes of a DeepSeekMoE model, checked where they are written."""

from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class DeepSeekMoEConfig:
    """The sizes that make one DeepSeekMoE; fields are named as in the config.json of DeepSeek-MoE-16B.

    Raises ValueError, one line, when the sizes cannot make a model.
    """

    hidden_size: int  # D
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    n_routed_experts: int  # E
    n_shared_experts: int  # S
    num_experts_per_tok: int  # K, the shared experts not counted
    moe_intermediate_size: int  # F
    first_k_dense_replace: int = 0  # this many first layers are dense
    intermediate_size: int = 0  # hidden width of the dense layers; unused where there are none
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        may_be_zero = {"first_k_dense_replace", "intermediate_size"}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in may_be_zero and value < 0:
                raise ValueError(f"{field.name} must be positive or 0, got {value}")
            if field.name not in may_be_zero and value <= 0:
                raise ValueError(f"{field.name} must be positive, got {value}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must divide hidden_size={self.hidden_size}"
            )
        if self.head_dim % 2:
            raise ValueError(f"rotary embedding needs an even head width, got {self.head_dim}")
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
        if self.first_k_dense_replace and not self.intermediate_size:
            raise ValueError("intermediate_size must be positive where first layers are dense")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_moe_layers(self) -> int:
        """Layers whose feed-forward is a mixture of experts."""
        return self.num_hidden_layers - self.first_k_dense_replace
