"""`hf:PATH`: a folder as transformers saves a model, with weights or without."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dsmoe_compiler.cli.memory import require_memory
from dsmoe_compiler.cli.model_argument import ModelCall, weight_bytes
from dsmoe_compiler.ir.errors import InputError

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_BATCHES = (3, 5, 7, 11)
_LENGTHS = (11, 13, 17, 19, 23, 29, 31)


def hf_call(folder: Path, *, with_weights: bool) -> ModelCall:
    """The causal language model of a folder with a config.json; on the meta device unless `with_weights`.

    Where the folder has no weights they are random, and a note says so. Nothing is downloaded, no code of the
    folder is run. Raises InputError.
    """
    transformers = _transformers()
    if not (folder / "config.json").is_file():
        raise InputError(f"hf:{folder}: no config.json in {folder}; name a folder that transformers saved")
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        with torch.device("meta"):
            outline = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as e:  # whatever a foreign library raises about the user's file is about the file
        raise InputError(f"hf:{folder}: transformers does not understand its config.json: {e}") from e
    model, notes = outline, list[str]()
    if with_weights:
        require_memory(weight_bytes(outline), f"hf:{folder}")
        model, notes = _with_weights(transformers, folder, config)
    return ModelCall(model.eval(), (), _example(config, model), tuple(notes))


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as e:
        raise InputError("hf: needs transformers: pip install 'dsmoe-compiler[transformers]'") from e
    messages: Any = transformers.logging
    messages.set_verbosity_error()
    messages.disable_progress_bar()
    return transformers


def _with_weights(transformers: Any, folder: Path, config: Any) -> tuple[nn.Module, list[str]]:
    if not any(file for pattern in _WEIGHTS for file in folder.glob(pattern)):
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        return model, [f"{folder} has no weights: they are random"]
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", local_files_only=True, trust_remote_code=False
        )
    except Exception as e:  # safetensors and pickle have errors of their own
        raise InputError(f"hf:{folder}: its weights do not load: {e}") from e
    return model, []


def _example(config: Any, model: nn.Module) -> dict[str, object]:
    """`input_ids` of sizes that equal no dimension of the model, so that a graph cannot confuse the two."""
    taken = {size for tensor in model.parameters() for size in tensor.shape} | set(
        _integers(config.to_dict())
    )
    free = (
        (b, length) for b, length in product(_BATCHES, _LENGTHS) if taken.isdisjoint((b, length, b * length))
    )
    batch, length = next(free, (_BATCHES[0], _LENGTHS[0]))
    device = next(model.parameters()).device
    vocabulary = config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))
    example: dict[str, object] = {"input_ids": ids.to(device)}
    if "use_cache" in inspect.signature(model.forward).parameters:
        example["use_cache"] = False
    return example


def _integers(value: object) -> Iterator[int]:
    """Every integer of a nested configuration."""
    match value:
        case bool():
            return
        case int():
            yield value
        case dict():
            for each in value.values():
                yield from _integers(each)
        case list() | tuple():
            for each in value:
                yield from _integers(each)
