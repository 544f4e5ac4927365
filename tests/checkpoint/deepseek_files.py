"""Folders as DeepSeek-MoE-16B is released, written and read plainly, without the code under test."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dsmoe_compiler.models.config import DeepSeekMoEConfig
from dsmoe_compiler.models.deepseek_moe import DeepSeekMoEForCausalLM

# As config.json of DeepSeek-MoE-16B says, but for its sizes.
_RELEASED: dict[str, Any] = {
    "architectures": ["DeepseekForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM"},
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 4096,
    "model_type": "deepseek",
    "moe_layer_freq": 1,
    "norm_topk_prob": False,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0",
    "use_cache": True,
}
TINY: dict[str, Any] = _RELEASED | {
    "hidden_size": 32,
    "intermediate_size": 72,
    "moe_intermediate_size": 20,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "num_attention_heads": 4,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "vocab_size": 50,
}
WIDE: dict[str, Any] = _RELEASED | {
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 2,
    "num_key_value_heads": 16,
    "vocab_size": 102400,
}
_SIZES = {field for field in DeepSeekMoEConfig.__dataclass_fields__ if field in WIDE} - {"rope_scaling"}


def shapes(fields: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of the released model with these fields in its config.json."""
    d, heads = fields["hidden_size"], fields["num_attention_heads"]
    shared_width = fields["num_key_value_heads"] * (d // heads)
    yield "model.embed_tokens.weight", (fields["vocab_size"], d)
    for layer in range(fields["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, width in (("q", d), ("k", shared_width), ("v", shared_width), ("o", d)):
            yield f"{prefix}self_attn.{name}_proj.weight", (width, d)
        yield f"{prefix}input_layernorm.weight", (d,)
        yield f"{prefix}post_attention_layernorm.weight", (d,)
        if layer < fields["first_k_dense_replace"]:
            yield from _feed_forward(f"{prefix}mlp.", d, fields["intermediate_size"])
            continue
        yield f"{prefix}mlp.gate.weight", (fields["n_routed_experts"], d)
        for expert in range(fields["n_routed_experts"]):
            yield from _feed_forward(f"{prefix}mlp.experts.{expert}.", d, fields["moe_intermediate_size"])
        shared = fields["n_shared_experts"] * fields["moe_intermediate_size"]
        yield from _feed_forward(f"{prefix}mlp.shared_experts.", d, shared)
    yield "model.norm.weight", (d,)
    yield "lm_head.weight", (fields["vocab_size"], d)


def _feed_forward(prefix: str, width: int, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{prefix}gate_proj.weight", (hidden, width)
    yield f"{prefix}up_proj.weight", (hidden, width)
    yield f"{prefix}down_proj.weight", (width, hidden)


def random_tensors(fields: dict[str, Any], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Values for every tensor, the same each time."""
    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes(fields):
        drawn = torch.empty(shape, dtype=dtype).normal_(generator=generator)
        yield name, 1 + drawn / 8 if len(shape) == 1 else drawn.mul_(shape[-1] ** -0.5)


def write(
    folder: Path,
    fields: dict[str, Any],
    *,
    shard_bytes: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """A folder with one file of weights, or shards of up to `shard_bytes` and their index."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields, indent=2))
    if shard_bytes is None:
        save_file(dict(random_tensors(fields, dtype)), folder / "model.safetensors")
        return folder
    shard, weight_map, number = dict[str, Tensor](), dict[str, str](), 1
    for name, tensor in random_tensors(fields, dtype):
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > shard_bytes:
            save_file(shard, folder / f"model-{number:05}.safetensors")
            shard, number = {}, number + 1
        shard[name] = tensor
        weight_map[name] = f"model-{number:05}.safetensors"
    save_file(shard, folder / f"model-{number:05}.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def plainly_loaded(folder: Path) -> nn.Module:
    """The zoo's model of the folder, its experts stacked by hand."""
    fields = json.loads((folder / "config.json").read_text())
    stored = dict[str, Tensor]()
    for file in sorted(folder.glob("*.safetensors")):
        stored |= load_file(file)
    for layer in range(fields["first_k_dense_replace"], fields["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.mlp.experts."
        names = [f"{prefix}{expert}." for expert in range(fields["n_routed_experts"])]

        def matrices(kind: str, names: list[str] = names) -> list[Tensor]:
            return [stored.pop(f"{name}{kind}_proj.weight") for name in names]

        gate_up = zip(matrices("gate"), matrices("up"), strict=True)
        stored[f"{prefix}gate_up_proj"] = torch.stack([torch.cat(pair) for pair in gate_up])
        stored[f"{prefix}down_proj"] = torch.stack(matrices("down"))
    model = DeepSeekMoEForCausalLM(DeepSeekMoEConfig(**{name: fields[name] for name in _SIZES}))
    model.to(getattr(torch, fields["torch_dtype"])).load_state_dict(stored)
    return model.eval()
