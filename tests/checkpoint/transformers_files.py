"""Folders as transformers writes them, and as DeepSeek-V3 is released: in float8, with a scale a block."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
TINY: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN3_MOE: dict[str, Any] = TINY | {
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 6,
    "num_experts_per_tok": 2,
}
# Widths of which no block of 128 x 128 is a divisor.
DEEPSEEK_V3: dict[str, Any] = TINY | {
    "hidden_size": 160,
    "intermediate_size": 200,
    "moe_intermediate_size": 136,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 1,
}


def model_of(kind: str, fields: dict[str, Any], dtype: torch.dtype = torch.float32) -> nn.Module:
    """A causal language model of transformers with random weights that are not all alike."""
    config = getattr(transformers, f"{kind}Config")(**fields)
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for tensor in model.state_dict().values():
        tensor.normal_(std=0.125)
    return model.to(dtype)


def saved(folder: Path, model: Any, shard: str = "60KB") -> Path:
    """The folder, with the model as transformers saves it: in shards of about that size, with an index."""
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def one_file(folder: Path) -> Path:
    """The folder, its shards made one file."""
    tensors = dict[str, Tensor]()
    for shard in folder.glob("model-*.safetensors"):
        tensors |= load_file(shard)
        shard.unlink()
    (folder / "model.safetensors.index.json").unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def rewrite(folder: Path, **tensors: Tensor | None) -> Path:
    """The folder with other tensors in its one file; None takes one away."""
    file = folder / "model.safetensors"
    found = {**load_file(file), **tensors}
    kept = {name: tensor for name, tensor in found.items() if tensor is not None}
    save_file(kept, file, metadata={"format": "pt"})
    return folder


def in_float8(folder: Path) -> dict[str, Tensor]:
    """Rewrite a folder of one file as DeepSeek-V3 is released; what its tensors are then, exactly."""
    stored, exact = dict[str, Tensor](), dict[str, Tensor]()
    for name, tensor in load_file(folder / "model.safetensors").items():
        stored[name] = exact[name] = tensor
        if tensor.dim() == 2 and "_proj" in name:
            values, scales = _quantised(tensor.float())
            stored[name], stored[f"{name}_scale_inv"] = values, scales
            rows, columns = tensor.shape
            spread = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
            exact[name] = (values.float() * spread).to(tensor.dtype)
    assert any(tensor.dtype is torch.float8_e4m3fn for tensor in stored.values())
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return exact


def _quantised(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(float8 values, what each block of 128 x 128 of them is multiplied by)."""
    rows, columns = matrix.shape
    values, scales = torch.empty(rows, columns), torch.empty(-(-rows // 128), -(-columns // 128))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
            scales[i, j] = matrix[block].abs().max() / 448  # the largest float8
            values[block] = matrix[block] / scales[i, j]
    return values.to(torch.float8_e4m3fn), scales
