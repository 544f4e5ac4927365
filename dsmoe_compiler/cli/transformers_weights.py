"""A transformers model filled by our reader: its own classes and conversions, and nothing made up.

transformers warns of a tensor that a checkpoint lacks, and draws it at random; here every such thing is
an error. `from_pretrained` is given, instead of files, a state dict whose tensors are read when it asks for
them. It is called twice: first with fake tensors, which know shapes and hold nothing, so that a checkpoint of
another model is refused before anything is read.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)

from dsmoe_compiler.checkpoint.errors import CheckpointError
from dsmoe_compiler.checkpoint.experts import first_without_sibling, require_whole_families
from dsmoe_compiler.checkpoint.fill import require_floats, require_same_names
from dsmoe_compiler.checkpoint.reader import Reader
from dsmoe_compiler.checkpoint.sources import BlockScaled, Source, main_dtype, stored
from dsmoe_compiler.interrupt import Deferred, poll

# What a model does while it is made that needs numbers, which fake tensors have not.
_NEEDS_NUMBERS = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)
_OLD_BUFFERS = "position_ids"  # integers that old releases stored; transformers ignores them


@dataclass(frozen=True)
class Weights:
    """A folder's tensors, and the transformers model on the meta device that they are for."""

    folder: Path
    outline: Any  # transformers' PreTrainedModel: it has no types of its own
    sources: Mapping[str, Source]

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights in memory: what config.json says, else that of most of the checkpoint."""
        found: torch.dtype | None = getattr(self.outline.config, "dtype", None)
        return found or main_dtype(self.sources)


def require_fit(weights: Weights) -> None:
    """Raise CheckpointError unless the checkpoint has just the model's tensors, from the headers alone.

    Names that the model's class declares ignored, and tied weights, are no errors.
    """
    require_whole_families(weights.sources)
    _require_distinct(weights)
    _require_floats(weights)
    with contextlib.suppress(*_NEEDS_NUMBERS), FakeTensorMode(allow_non_fake_inputs=True):
        _from_pretrained(weights, lambda tensor, source: None)


def load(weights: Weights) -> nn.Module:
    """The model in memory, each byte of its checkpoint read once.

    Raises CheckpointError when the checkpoint lacks something, has more, or cannot be read; then nothing is
    handed out.
    """
    with Reader() as reader:
        return _from_pretrained(weights, reader.fill)


_Fill = Callable[[Tensor, Source], None]


@dataclass(frozen=True)
class _Unread:
    """Stands in a state dict for a tensor, which `[...]` reads: as safetensors' slices do."""

    source: Source
    dtype: torch.dtype
    fill: _Fill

    def __getitem__(self, everything: object) -> Tensor:
        poll()
        tensor = torch.empty(self.source.shape, dtype=self.dtype)
        self.fill(tensor, self.source)
        return tensor


def _from_pretrained(weights: Weights, fill: _Fill) -> nn.Module:
    """The model, with tensors that `fill` has filled from the checkpoint."""
    state = {
        name: _Unread(source, weights.dtype if isinstance(source, BlockScaled) else source.dtype, fill)
        for name, source in _without_prediction_layers(weights).items()
    }
    config = copy.deepcopy(weights.outline.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # what is read is no longer quantised
    try:
        with Deferred(), _one_at_a_time():
            model, found = type(weights.outline).from_pretrained(
                None,
                config=config,
                state_dict=state,
                dtype=weights.dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # told apart below, with the tensor's name
                local_files_only=True,
            )
    except (CheckpointError, *_NEEDS_NUMBERS):
        raise
    except Exception as e:  # a foreign library raises whatever a tensor of another shape leads to
        alone = first_without_sibling(weights.sources)
        what = f"lacks {alone}" if alone else f"transformers does not load its weights: {e}"
        raise CheckpointError(f"{weights.folder}: {what}") from e
    require_exact(weights.folder, weights.sources, found)
    return model  # type: ignore[no-any-return]


def require_exact(folder: Path, sources: Mapping[str, Source], found: Mapping[str, Any]) -> None:
    """Raise CheckpointError when transformers' account of what it loaded names any tensor."""
    require_same_names(folder, sources, sorted(found["missing_keys"]), sorted(found["unexpected_keys"]))
    for name, shape, wanted in sorted(found["mismatched_keys"]):
        where = stored(sources[name]).file if name in sources else folder
        raise CheckpointError(
            f"{where}: {name} is {list(shape)}, and {list(wanted)} in the model of config.json"
        )
    if found["error_msgs"]:
        raise CheckpointError(f"{folder}: transformers does not load its weights: {found['error_msgs'][0]}")


def _require_floats(weights: Weights) -> None:
    """No integers but where the model has some: transformers would convert them to floats."""
    own = weights.outline.state_dict().items()
    integers = {name.rpartition(".")[2] for name, tensor in own if not tensor.is_floating_point()}
    for name, source in weights.sources.items():
        if name.rpartition(".")[2] not in {*integers, _OLD_BUFFERS}:
            require_floats(source)


def _require_distinct(weights: Weights) -> None:
    """transformers takes `layers.0.…` for `model.layers.0.…`, and of both one, silently."""
    prefix = f"{weights.outline.base_model_prefix}."
    for name in weights.sources:
        if name.startswith(prefix) and name.removeprefix(prefix) in weights.sources:
            raise CheckpointError(
                f"{weights.folder}: holds {name} and {name.removeprefix(prefix)}, one tensor to transformers"
            )


def _without_prediction_layers(weights: Weights) -> dict[str, Source]:
    """The checkpoint without the layers that predict further tokens (DeepSeek-V3, section 2.2), which follow
    the model's own and which transformers does not run.
    """
    config = weights.outline.config.get_text_config()
    further = getattr(config, "num_nextn_predict_layers", None)
    if not isinstance(further, int):
        return dict(weights.sources)
    layers = range(config.num_hidden_layers, config.num_hidden_layers + further)
    prefixes = tuple(f"model.layers.{layer}." for layer in layers)
    return {name: source for name, source in weights.sources.items() if not name.startswith(prefixes)}


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    """transformers would read ahead, in threads, all it can: now what it stacks next, and Ctrl-C is heard."""
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
