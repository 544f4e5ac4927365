"""The dense models that the DeepSeekMoE paper compares with, and one that fits a test."""

from dsmoe_compiler.models.decoder_config import DecoderConfig
from dsmoe_compiler.models.presets.preset import Preset
from dsmoe_compiler.models.presets.widths import nearest_width


def validation(parts: int) -> DecoderConfig:
    """A dense model of the validation experiments, as wide as so many standard feed-forwards."""
    return DecoderConfig(
        hidden_size=1280,
        num_hidden_layers=9,
        num_attention_heads=10,
        vocab_size=8192,
        intermediate_size=nearest_width(1280, parts),
    )


DENSE: dict[str, Preset[DecoderConfig]] = {
    "dense-tiny": Preset(
        "two layers, two heads of queries to one of keys and values: for tests",
        DecoderConfig(
            hidden_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=512,
            intermediate_size=352,
        ),
    ),
    "dense-0.2b": Preset(
        "the dense model of the validation experiments (DeepSeekMoE, Table 1)", validation(1)
    ),
    "dense-x4": Preset("the same with feed-forwards 4 times as wide (DeepSeekMoE, Table 9)", validation(4)),
    "dense-x16": Preset(
        "the same with feed-forwards 16 times as wide, the 2B's bound (DeepSeekMoE, Table 2)", validation(16)
    ),
    "llama2-7b": Preset(
        "LLaMA 2 7B (DeepSeekMoE, Table 4)",
        DecoderConfig(
            hidden_size=4096,
            num_hidden_layers=32,
            num_attention_heads=32,
            vocab_size=32000,
            intermediate_size=11008,
            rms_norm_eps=1e-5,
        ),
    ),
    "deepseek-7b": Preset(
        "DeepSeek LLM 7B (DeepSeekMoE, Table 3)",
        DecoderConfig(
            hidden_size=4096,
            num_hidden_layers=30,
            num_attention_heads=32,
            vocab_size=102400,
            intermediate_size=11008,
        ),
    ),
    "deepseek-67b": Preset(
        "DeepSeek LLM 67B, with grouped-query attention (DeepSeekMoE, Table 6)",
        DecoderConfig(
            hidden_size=8192,
            num_hidden_layers=95,
            num_attention_heads=64,
            num_key_value_heads=8,
            vocab_size=102400,
            intermediate_size=22016,
        ),
    ),
}
