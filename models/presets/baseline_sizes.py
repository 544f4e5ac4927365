"""What Hash Layer, Switch Transformer and GShard have in common where DeepSeekMoE is compared with them."""

from typing import TypedDict


class Sizes(TypedDict):
    """The sizes of a decoder with E experts."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    n_routed_experts: int
    first_k_dense_replace: int
    intermediate_size: int


# Eleven tokens of a sequence find 4 places with each of 6 experts, whether a token has one or two of them.
TINY: Sizes = {
    "hidden_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "vocab_size": 512,
    "n_routed_experts": 6,
    "first_k_dense_replace": 1,
    "intermediate_size": 208,
}
TINY_EXPERT_WIDTH = 56

# The validation experiments (DeepSeekMoE, appendix A).
VALIDATION: Sizes = {
    "hidden_size": 1280,
    "num_hidden_layers": 9,
    "num_attention_heads": 10,
    "vocab_size": 8192,
    "n_routed_experts": 16,
    "first_k_dense_replace": 0,
    "intermediate_size": 0,
}
