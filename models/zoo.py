"""The models one can name: DeepSeekMoE in the paper's three sizes, and two that fit a test and a laptop."""

import difflib
from dataclasses import dataclass

import torch
from torch import Tensor

from dsmoe_compiler.models.config import DeepSeekMoEConfig
from dsmoe_compiler.models.deepseek_moe import DeepSeekMoEForCausalLM
from dsmoe_compiler.models.parameter_count import ParameterCount, count_parameters
from dsmoe_compiler.models.random_weights import randomise


class UnknownModel(ValueError):
    """A name the zoo does not have; the message lists the nearest ones."""

    def __init__(self, name: str) -> None:
        nearest = difflib.get_close_matches(name, ZOO, n=3) or list(ZOO)
        super().__init__(f"unknown model {name!r}; the nearest names are: {', '.join(nearest)}")


@dataclass(frozen=True)
class Preset:
    """A model of the zoo: one line about it, and its sizes."""

    description: str
    config: DeepSeekMoEConfig


ZOO: dict[str, Preset] = {
    "deepseek-moe-tiny": Preset(
        "three layers, the first dense, 4.9 MB in float32: for tests and pictures",
        DeepSeekMoEConfig(
            hidden_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            vocab_size=512,
            n_routed_experts=16,
            n_shared_experts=2,
            num_experts_per_tok=4,
            moe_intermediate_size=88,
            first_k_dense_replace=1,
            intermediate_size=352,
        ),
    ),
    "deepseek-moe-demo": Preset(
        "two layers with the experts of the 16B (64 routed, 6 chosen, 2 shared), 356 MB in float32: to time",
        DeepSeekMoEConfig(
            hidden_size=768,
            num_hidden_layers=2,
            num_attention_heads=12,
            vocab_size=4096,
            n_routed_experts=64,
            n_shared_experts=2,
            num_experts_per_tok=6,
            moe_intermediate_size=256,
        ),
    ),
    "deepseek-moe-2b": Preset(
        "DeepSeekMoE 2B of the validation experiments (paper, Table 1)",
        DeepSeekMoEConfig(
            hidden_size=1280,
            num_hidden_layers=9,
            num_attention_heads=10,
            vocab_size=8192,
            n_routed_experts=63,
            n_shared_experts=1,
            num_experts_per_tok=7,
            # A quarter of the standard 8/3·1280 is 853.33; the nearest multiple of 8 keeps rows aligned and
            # gives the paper's 1.89B expert parameters (0.24B activated).
            moe_intermediate_size=856,
        ),
    ),
    "deepseek-moe-16b": Preset(
        "DeepSeekMoE 16B, the released model (paper, Table 3)",
        DeepSeekMoEConfig(
            hidden_size=2048,
            num_hidden_layers=28,
            num_attention_heads=16,
            vocab_size=102400,
            n_routed_experts=64,
            n_shared_experts=2,
            num_experts_per_tok=6,
            moe_intermediate_size=1408,
            first_k_dense_replace=1,
            intermediate_size=10944,
        ),
    ),
    "deepseek-moe-145b": Preset(
        "DeepSeekMoE 145B, the scaling study (paper, Table 6)",
        DeepSeekMoEConfig(
            hidden_size=4096,
            num_hidden_layers=62,
            num_attention_heads=32,
            vocab_size=102400,
            n_routed_experts=128,
            n_shared_experts=4,
            num_experts_per_tok=12,
            # The paper gives an eighth of a standard FFN, 1365.33, and no width for the dense layer: both are
            # rounded as the released 16B rounds them, which reproduces the paper's 144.6B.
            moe_intermediate_size=1408,
            first_k_dense_replace=1,
            intermediate_size=21888,
        ),
    ),
}


def names() -> tuple[str, ...]:
    """The names of the zoo, smallest model first."""
    return tuple(ZOO)


def preset(name: str) -> Preset:
    """The preset of that name. Raises UnknownModel."""
    if name not in ZOO:
        raise UnknownModel(name)
    return ZOO[name]


def build(
    name: str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> DeepSeekMoEForCausalLM:
    """The model of that name in eval mode, with random weights; on "meta", its shapes and no memory.

    The same seed gives the same weights on the same kind of device. Raises UnknownModel.
    """
    config = preset(name).config
    with torch.device("meta"):
        model = DeepSeekMoEForCausalLM(config).to(dtype).eval()
    if torch.device(device).type != "meta":
        model.to_empty(device=device)
        randomise(model, seed)
    return model


def example_inputs(name: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Keyword arguments for one forward call: `input_ids` (3, 11) int64, the same at every call.

    No size of the input equals a dimension of a model, so that a captured graph cannot confuse the two.
    Raises UnknownModel.
    """
    vocabulary = preset(name).config.vocab_size
    ids = torch.randint(vocabulary, (3, 11), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids.to(device)}


def parameter_count(name: str) -> ParameterCount:
    """Parameters of the model of that name, counted on the meta device. Raises UnknownModel."""
    return count_parameters(build(name, device="meta"))
