"""The model that is measured, and what its configuration says of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import nn

from dsmoe_compiler.capture import prepare_configs
from dsmoe_compiler.cli.bench_options import Options
from dsmoe_compiler.cli.kernels_model import cast_call
from dsmoe_compiler.cli.memory import require_memory
from dsmoe_compiler.cli.model_argument import ModelCall, resolve
from dsmoe_compiler.ir.errors import InputError

Model = Callable[..., object]


def model_to_measure(text: str, options: Options) -> ModelCall:
    """MODEL with its weights, of the type and with the experts that were asked for, and without a cache.

    Raises InputError where there is no such model, or it has no such choice.
    """
    call = resolve(text, options.inputs, with_weights=True, dtype=options.dtype or "float32")
    if options.dtype is not None:
        require_memory(_growth(call.model, options.dtype), text)
        call = cast_call(text, call, options.dtype)
    if options.experts is not None:
        choose = getattr(call.model, "set_experts_implementation", None)
        if not callable(choose):
            raise InputError(f"--experts is for models of transformers, and {text} is none: leave it out")
        choose(options.experts)
    if isinstance(call.model, nn.Module):
        prepare_configs(call.model)
    return call


def _growth(model: Model, dtype: str) -> int:
    """How many bytes more a module's weights take when they are cast; 0 where they shrink."""
    size: int = getattr(torch, dtype).itemsize
    floats = [p for p in model.parameters() if p.is_floating_point()] if isinstance(model, nn.Module) else []
    return max(0, sum(p.numel() * (size - p.element_size()) for p in floats))


def dtype_of(model: Model) -> str:
    """The type of most of a module's weights, "" where there are none."""
    sizes = Counter[str]()
    for parameter in model.parameters() if isinstance(model, nn.Module) else ():
        sizes[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    return next((name for name, _ in sizes.most_common(1)), "")


def experts_of(model: Model) -> str | None:
    """How transformers would run a model's experts, if it has some; None for a model that is not its own."""
    found = getattr(_text_config(model), "_experts_implementation", None)
    return found if isinstance(found, str) else None


def vocabulary(model: Model) -> int | None:
    """How many ids there are, where the configuration says so."""
    return _number(model, "vocab_size")


def longest_sequence(model: Model) -> int | None:
    """The most tokens of a sequence, where the configuration says so."""
    return _number(model, "max_position_embeddings")


def _number(model: Model, name: str) -> int | None:
    found = getattr(_text_config(model), name, None)
    return found if isinstance(found, int) else None


def _text_config(model: Model) -> object:
    """A model's configuration; of one of transformers that has several, the language model's."""
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", None)
    return text() if callable(text) else config
