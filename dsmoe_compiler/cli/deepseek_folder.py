"""A folder with DeepSeek-MoE-16B or a model of its kind (`model_type: "deepseek"`), as a model of the zoo.

transformers has no such model of its own, and no code of the folder is run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from dsmoe_compiler.checkpoint.fill import fill, require_tensors
from dsmoe_compiler.checkpoint.folder import holds_safetensors, open_checkpoint
from dsmoe_compiler.checkpoint.quantization import fp8_block, is_plain_or_block_fp8
from dsmoe_compiler.checkpoint.reader import Reader
from dsmoe_compiler.checkpoint.sources import Source, main_dtype, with_scales
from dsmoe_compiler.cli.config_json import read_config
from dsmoe_compiler.cli.memory import require_memory
from dsmoe_compiler.ir.errors import InputError
from dsmoe_compiler.models.checkpoint_names import checkpoint_tensors
from dsmoe_compiler.models.deepseek_moe import DeepSeekMoEForCausalLM
from dsmoe_compiler.models.published_config import from_published
from dsmoe_compiler.models.random_weights import randomise

MODEL_TYPE = "deepseek"
# Tables that old releases of the code stored; every model computes them.
_IGNORED = re.compile(r"\.rotary_emb\.inv_freq$")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Outline:
    """A model without memory, on the meta device, and the tensors of its folder; None where it has none."""

    model: DeepSeekMoEForCausalLM
    sources: Mapping[str, Source] | None
    notes: tuple[str, ...]


def load_deepseek_moe(folder: Path) -> DeepSeekMoEForCausalLM:
    """The model of a folder on the CPU, in eval mode, in the dtype that its config.json says.

    Each byte is read once, into the parameter that holds it. Raises InputError (CheckpointError is one) when
    the config asks for another model, or the files do not hold just this one's weights.
    """
    fields = read_config(folder)
    if fields.get("model_type") != MODEL_TYPE:
        raise InputError(
            f"{folder / 'config.json'}: model_type is {fields.get('model_type')!r}, not {MODEL_TYPE!r}"
        )
    outline = deepseek_outline(folder, fields)
    if outline.sources is None:
        raise InputError(f"{folder}: has no weights")
    return filled(folder, outline)


def deepseek_outline(folder: Path, fields: Mapping[str, object]) -> Outline:
    """What a folder with these fields in its config.json holds, from the headers alone. Raises InputError."""
    try:
        published = from_published(fields)
        if not is_plain_or_block_fp8(fields):
            raise ValueError(f"quantization_config is {fields['quantization_config']!r}; only fp8 is undone")
        block, dtype = fp8_block(fields), _dtype(fields)
    except ValueError as e:
        raise InputError(f"{folder / 'config.json'}: {e}") from e
    with torch.device("meta"):
        model = DeepSeekMoEForCausalLM(published.config).eval()
    sources = with_scales(open_checkpoint(folder), block) if holds_safetensors(folder) else None
    if sources is not None:
        require_tensors(folder, sources, {n: t.shape for n, t in checkpoint_tensors(model).items()}, _IGNORED)
        dtype = dtype or main_dtype(sources)
    notes = tuple(f"{folder / 'config.json'}: nothing is known of {name}" for name in published.unknown)
    return Outline(model.to(dtype or torch.float32), sources, notes)


def filled(folder: Path, outline: Outline) -> DeepSeekMoEForCausalLM:
    """The outline's model in memory: its folder's weights, or random ones where that has none.

    Raises InputError when they do not fit in memory or cannot be read; then nothing is handed out.
    """
    model = outline.model
    if outline.sources is None and any(folder.glob("*.bin")):
        raise InputError(f"{folder}: its weights are .bin files; save them as safetensors")
    require_memory(sum(t.nbytes for t in model.state_dict().values()), f"hf:{folder}")
    model.to_empty(device="cpu")
    if outline.sources is None:
        randomise(model, seed=0)
        return model
    with Reader() as reader:
        fill(checkpoint_tensors(model), outline.sources, reader)
    return model


def _dtype(fields: Mapping[str, object]) -> torch.dtype | None:
    """That of the weights in memory; None where config.json leaves it open. Raises ValueError."""
    name = fields.get("dtype", fields.get("torch_dtype"))
    if name is None:
        return None
    if not isinstance(name, str) or name not in _DTYPES:
        raise ValueError(f"dtype is {name!r}, which is none of {', '.join(_DTYPES)}")
    return _DTYPES[name]
