"""A dense decoder, as LLaMA (arXiv 2302.13971) and DeepSeek LLM (arXiv 2401.02954)."""

from dsmoe_compiler.models.decoder import CausalLM
from dsmoe_compiler.models.decoder_config import DecoderConfig


class DenseForCausalLM(CausalLM[DecoderConfig]):
    """Every feed-forward is dense; modules are named as in LLaMA's checkpoints."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
