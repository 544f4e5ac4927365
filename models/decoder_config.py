"""The sizes of a dense decoder, which every model of the zoo is but for some of its feed-forwards."""

from dataclasses import dataclass


def require_positive(config: object, *names: str) -> None:
    """Raise ValueError naming the first of these fields that is not above 0."""
    for name in names:
        value = getattr(config, name)
        if value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")


def require_not_negative(config: object, *names: str) -> None:
    """Raise ValueError naming the first of these fields that is below 0."""
    for name in names:
        value = getattr(config, name)
        if value < 0:
            raise ValueError(f"{name} must be positive or 0, got {value}")


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The sizes that make one decoder as LLaMA's; fields are named as in its config.json.

    Raises ValueError, one line, when the sizes cannot make a model.
    """

    hidden_size: int  # D
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    intermediate_size: int = 0  # hidden width of the dense layers; unused where there are none
    num_key_value_heads: int | None = None  # None: as many as there are heads of queries
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        require_positive(self, "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        require_positive(self, "rms_norm_eps", "rope_theta")
        require_not_negative(self, "intermediate_size")
        self._check_attention()
        if self.num_moe_layers < self.num_hidden_layers and not self.intermediate_size:
            raise ValueError("intermediate_size must be positive where layers are dense")

    def _check_attention(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must divide hidden_size={self.hidden_size}"
            )
        if self.head_dim % 2:
            raise ValueError(f"rotary embedding needs an even head width, got {self.head_dim}")
        if self.key_value_heads <= 0 or self.num_attention_heads % self.key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} must divide "
                f"num_attention_heads={self.num_attention_heads}"
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def key_value_heads(self) -> int:
        """Heads of keys and values; several heads of queries share one where there are fewer."""
        return self.num_attention_heads if self.num_key_value_heads is None else self.num_key_value_heads

    def is_moe(self, index: int) -> bool:
        """Whether the feed-forward of the layer with this index, from 0, is a mixture of experts."""
        return False

    @property
    def num_moe_layers(self) -> int:
        """Layers whose feed-forward is a mixture of experts."""
        return sum(self.is_moe(index) for index in range(self.num_hidden_layers))
