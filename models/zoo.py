"""The models one can name: DeepSeekMoE and its successors, and what its paper compares it with."""

import difflib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dsmoe_compiler.models.baseline_configs import GShardConfig, HashLayerConfig, SwitchConfig
from dsmoe_compiler.models.config import DeepSeekMoEConfig
from dsmoe_compiler.models.decoder import CausalLM
from dsmoe_compiler.models.decoder_config import DecoderConfig
from dsmoe_compiler.models.deepseek_moe import DeepSeekMoEForCausalLM
from dsmoe_compiler.models.dense import DenseForCausalLM
from dsmoe_compiler.models.gshard import GShardForCausalLM
from dsmoe_compiler.models.hash_layer import HashLayerForCausalLM
from dsmoe_compiler.models.parameter_count import ParameterCount, count_parameters
from dsmoe_compiler.models.presets.deepseek_moe import DEEPSEEK_MOE
from dsmoe_compiler.models.presets.deepseek_v2 import DEEPSEEK_V2
from dsmoe_compiler.models.presets.deepseek_v3 import DEEPSEEK_V3
from dsmoe_compiler.models.presets.dense import DENSE
from dsmoe_compiler.models.presets.gshard import GSHARD
from dsmoe_compiler.models.presets.hash_layer import HASH_LAYER
from dsmoe_compiler.models.presets.preset import Preset
from dsmoe_compiler.models.presets.switch import SWITCH
from dsmoe_compiler.models.random_weights import randomise
from dsmoe_compiler.models.switch import SwitchForCausalLM

ZOO: dict[str, Preset[DecoderConfig]] = {
    **DEEPSEEK_MOE,
    **DEEPSEEK_V2,
    **DEEPSEEK_V3,
    **HASH_LAYER,
    **SWITCH,
    **GSHARD,
    **DENSE,
}

ARCHITECTURES: dict[type[DecoderConfig], Callable[[Any], CausalLM[Any]]] = {
    DeepSeekMoEConfig: DeepSeekMoEForCausalLM,
    HashLayerConfig: HashLayerForCausalLM,
    SwitchConfig: SwitchForCausalLM,
    GShardConfig: GShardForCausalLM,
    DecoderConfig: DenseForCausalLM,
}


class UnknownModel(ValueError):
    """A name the zoo does not have; the message lists the nearest ones."""

    def __init__(self, name: str) -> None:
        nearest = difflib.get_close_matches(name, ZOO, n=3)
        known = f"the nearest names are: {', '.join(nearest)}" if nearest else f"known are: {', '.join(ZOO)}"
        super().__init__(f"unknown model {name!r}; {known}")


def names() -> tuple[str, ...]:
    """The names of the zoo, family by family."""
    return tuple(ZOO)


def preset(name: str) -> Preset[DecoderConfig]:
    """The preset of that name. Raises UnknownModel."""
    if name not in ZOO:
        raise UnknownModel(name)
    return ZOO[name]


def build(
    name: str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> CausalLM[Any]:
    """The model of that name in eval mode, with random weights; on "meta", its shapes and no memory.

    `dtype` is the parameters'; buffers keep their own. The same seed gives the same weights on the same kind
    of device. Raises UnknownModel.
    """
    config = preset(name).config
    with torch.device("meta"):
        model = ARCHITECTURES[type(config)](config).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    if torch.device(device).type != "meta":
        model.to_empty(device=device)
        randomise(model, seed)
    return model


def example_inputs(name: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Keyword arguments for one forward call: `input_ids` (5, 11) int64, the same at every call.

    No size of the input equals a dimension of a model, so that a captured graph cannot confuse the two.
    Raises UnknownModel.
    """
    vocabulary = preset(name).config.vocab_size
    ids = torch.randint(vocabulary, (5, 11), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids.to(device)}


def parameter_count(name: str) -> ParameterCount:
    """Parameters of the model of that name, counted on the meta device. Raises UnknownModel."""
    return count_parameters(build(name, device="meta"))
