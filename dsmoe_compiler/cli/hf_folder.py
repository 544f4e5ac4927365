"""`hf:PATH`: a folder with a model as Hugging Face has them, with weights or without."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dsmoe_compiler.checkpoint.folder import holds_safetensors, open_checkpoint
from dsmoe_compiler.checkpoint.quantization import fp8_block, is_plain_or_block_fp8
from dsmoe_compiler.checkpoint.sources import with_scales
from dsmoe_compiler.cli.config_json import read_config
from dsmoe_compiler.cli.deepseek_folder import MODEL_TYPE, deepseek_outline, filled
from dsmoe_compiler.cli.memory import require_memory
from dsmoe_compiler.cli.model_argument import ModelCall, weight_bytes
from dsmoe_compiler.ir.errors import InputError
from dsmoe_compiler.models.config import DeepSeekMoEConfig

_PICKLED = "pytorch_model*.bin"
_BATCHES = (3, 5, 7, 11)
_LENGTHS = (11, 13, 17, 19, 23, 29, 31)


def hf_call(folder: Path, *, with_weights: bool) -> ModelCall:
    """The model of a folder with a config.json; on the meta device unless `with_weights`.

    Where the folder has no weights they are random, and a note says so. Nothing is downloaded, no code of the
    folder is run. Raises InputError, also without weights, when those that are there are not the model's.
    """
    fields = read_config(folder)
    build = _deepseek if fields.get("model_type") == MODEL_TYPE else _of_transformers
    model, notes = build(folder, fields, in_memory=with_weights)
    return ModelCall(model.eval(), (), _example(model), notes)


def _deepseek(
    folder: Path, fields: Mapping[str, object], *, in_memory: bool
) -> tuple[nn.Module, tuple[str, ...]]:
    outline = deepseek_outline(folder, fields)
    if not in_memory:
        return outline.model, outline.notes
    random = () if outline.sources else (_random_note(folder),)
    return filled(folder, outline), (*outline.notes, *random)


def _random_note(folder: Path) -> str:
    return f"{folder} has no weights: they are random"


def _of_transformers(
    folder: Path, fields: Mapping[str, object], *, in_memory: bool
) -> tuple[nn.Module, tuple[str, ...]]:
    transformers = _transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        kind = _class_of(transformers, config)
        with torch.device("meta"):
            outline = kind._from_config(config)
    except Exception as e:  # whatever a foreign library raises about the user's file is about the file
        raise InputError(f"hf:{folder}: transformers does not understand its config.json: {e}") from e
    if in_memory:
        require_memory(weight_bytes(outline), f"hf:{folder}")
    if holds_safetensors(folder):
        return _from_safetensors(folder, fields, outline, in_memory=in_memory), ()
    if not in_memory:
        return outline, ()
    if any(folder.glob(_PICKLED)):
        return _as_transformers_reads(folder, outline), ()
    model: nn.Module = kind._from_config(config)
    return model, (_random_note(folder),)


def _class_of(transformers: Any, config: Any) -> Any:
    """The class whose model was saved, where the configuration names one, else its language model, else its
    model. Raises what transformers raises of a configuration that has none.
    """
    named = (getattr(transformers, name, None) for name in config.architectures or ())
    if found := next((kind for kind in named if kind is not None), None):
        return found
    doors = (transformers.AutoModelForCausalLM, transformers.AutoModelForSeq2SeqLM)
    for door in (*doors, transformers.AutoModel):
        if type(config) in door._model_mapping:
            found = door._model_mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise ValueError(f"no class for model_type {config.model_type!r}")


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as e:
        raise InputError("hf: needs transformers: pip install 'dsmoe-compiler[transformers]'") from e
    messages: Any = transformers.logging
    messages.set_verbosity_error()
    messages.disable_progress_bar()
    return transformers


def _from_safetensors(
    folder: Path, fields: Mapping[str, object], outline: Any, *, in_memory: bool
) -> nn.Module:
    from dsmoe_compiler.cli.transformers_weights import Weights, load, require_fit

    tensors = open_checkpoint(folder)
    if not is_plain_or_block_fp8(fields):  # what only transformers knows to read
        return _as_transformers_reads(folder, outline) if in_memory else outline
    try:
        sources = with_scales(tensors, fp8_block(fields))
    except ValueError as e:
        raise InputError(f"{folder / 'config.json'}: {e}") from e
    weights = Weights(folder, outline, sources)
    require_fit(weights)
    return load(weights) if in_memory else outline


def _as_transformers_reads(folder: Path, outline: Any) -> nn.Module:
    from dsmoe_compiler.cli.transformers_weights import require_exact

    try:
        model, found = type(outline).from_pretrained(
            folder,
            dtype="auto",
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except Exception as e:  # pickle, safetensors and quantisers have errors of their own
        raise InputError(f"hf:{folder}: its weights do not load: {e}") from e
    require_exact(folder, {}, found)
    return model  # type: ignore[no-any-return]


def _example(model: nn.Module) -> dict[str, object]:
    """`input_ids`, and for a decoder behind an encoder its ids and both masks, of sizes that equal no
    dimension of the model, so that a graph cannot confuse the two; nothing for a model that takes no ids.
    """
    taken_by_name = inspect.signature(model.forward).parameters
    if "input_ids" not in taken_by_name:
        return {}
    vocabulary, integers = _sizes(model.config)
    taken = {size for tensor in model.parameters() for size in tensor.shape} | integers
    free = (
        (b, length) for b, length in product(_BATCHES, _LENGTHS) if taken.isdisjoint((b, length, b * length))
    )
    batch, length = next(free, (_BATCHES[0], _LENGTHS[0]))
    device = next(model.parameters()).device
    ids = torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))
    example: dict[str, object] = {"input_ids": ids.to(device)}
    if getattr(model.config, "is_encoder_decoder", False):
        example["decoder_input_ids"] = ids.flip(1).to(device)
        masks = {"attention_mask", "decoder_attention_mask"} & taken_by_name.keys()
        example |= {name: torch.ones_like(ids, device=device) for name in sorted(masks)}
    if "use_cache" in taken_by_name:
        example["use_cache"] = False
    return example


def _sizes(config: Any) -> tuple[int, set[int]]:
    """(the vocabulary, every integer that a model's configuration says or implies)."""
    if isinstance(config, DeepSeekMoEConfig):
        return config.vocab_size, set(_integers(asdict(config)))
    return config.get_text_config().vocab_size, set(_integers(config.to_dict()))


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
