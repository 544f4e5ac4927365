"""The decoder that every model of the zoo is: norms, attention and feed-forwards around a residual stream.

Shapes: B batch, L length, D model width, h pairs of rotary features, V vocabulary.
"""

from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from torch import Tensor, nn

from dsmoe_compiler.models.attention import Attention
from dsmoe_compiler.models.decoder_config import DecoderConfig
from dsmoe_compiler.models.feed_forward import FeedForward
from dsmoe_compiler.models.norm import RMSNorm
from dsmoe_compiler.models.rotary import Rotary

Config = TypeVar("Config", bound=DecoderConfig)


class DecoderLayer(nn.Module):
    """Attention, then a feed-forward, each normed before and added after (DeepSeekMoE, eq. 1-2)."""

    def __init__(self, config: DecoderConfig, attention: nn.Module, feed_forward: nn.Module) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = feed_forward

    def forward(self, x_BLD: Tensor, cos_L1h: Tensor, sin_L1h: Tensor, input_ids: Tensor) -> Tensor:
        x_BLD = x_BLD + self.self_attn(self.input_layernorm(x_BLD), cos_L1h, sin_L1h)
        out_BLD: Tensor = x_BLD + self.feed_forward(self.post_attention_layernorm(x_BLD), input_ids)
        return out_BLD

    def feed_forward(self, x_BLD: Tensor, input_ids: Tensor) -> Tensor:
        """The layer's feed-forward, which need not know what the tokens were."""
        out_BLD: Tensor = self.mlp(x_BLD)
        return out_BLD


class Decoder(nn.Module):
    """Embedding, layers and a last norm: ids (B, L) to hidden states (B, L, D)."""

    def __init__(self, config: DecoderConfig, layers: Iterable[DecoderLayer], rotary: Rotary) -> None:
        super().__init__()
        self.rotary = rotary
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: Tensor) -> Tensor:
        x_BLD = self.embed_tokens(input_ids)
        cos_L1h, sin_L1h = self.rotary.table(input_ids.shape[1], device=x_BLD.device, dtype=x_BLD.dtype)
        for layer in self.layers:
            x_BLD = layer(x_BLD, cos_L1h, sin_L1h, input_ids)
        out_BLD: Tensor = self.norm(x_BLD)
        return out_BLD


class CausalLM(nn.Module, Generic[Config]):
    """A whole language model.

    Parameters and buffers hold no values that mean anything until they are loaded or initialised.
    """

    def __init__(
        self,
        config: Config,
        *,
        attention: Callable[[Config], nn.Module] = Attention,
        moe: Callable[[Config], nn.Module] | None = None,
        moe_layer: type[DecoderLayer] = DecoderLayer,
        rotary: Rotary | None = None,
    ) -> None:
        """`moe` makes what the configuration says are mixtures of experts, `moe_layer` their layers."""
        super().__init__()
        self.config = config
        layers = (
            moe_layer(config, attention(config), moe(config))
            if moe is not None and config.is_moe(index)
            else DecoderLayer(config, attention(config), dense(config))
            for index in range(config.num_hidden_layers)
        )
        self.model = Decoder(config, layers, rotary or Rotary(config.head_dim, config.rope_theta))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Next-token logits (B, L, V) from ids (B, L), int64 in [0, V); B and L may be 0."""
        logits_BLV: Tensor = self.lm_head(self.model(input_ids))
        return logits_BLV


def dense(config: DecoderConfig) -> FeedForward:
    """The feed-forward of a dense layer."""
    return FeedForward(config.hidden_size, config.intermediate_size)
