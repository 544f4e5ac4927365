"""MODEL: a name of the zoo, `package.module:callable`, `hf:PATH`, or a `.pt2` file."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dsmoe_compiler.cli.input_option import ExampleInput
from dsmoe_compiler.cli.memory import require_memory
from dsmoe_compiler.ir.errors import InputError


@dataclass(frozen=True)
class ModelCall:
    """A model and the arguments of one call of it; `notes` is what the user should know of its origin."""

    model: Callable[..., object]
    args: tuple[object, ...]
    kwargs: dict[str, object]
    notes: tuple[str, ...] = ()


def is_saved_program(text: str) -> bool:
    """Whether MODEL names a `.pt2` file, which is loaded instead of compiled."""
    return text.endswith(".pt2")


def resolve(
    text: str, inputs: Sequence[ExampleInput], *, with_weights: bool, dtype: str = "float32"
) -> ModelCall:
    """What MODEL names, ready to be called.

    Without weights, models of the zoo and of `hf:` are built on the meta device. `dtype` is of the zoo's
    parameters; others have their own. Raises InputError when there is no such model, its weights do not fit
    in memory, or the inputs are not what it takes.
    """
    if text.startswith("hf:"):
        from dsmoe_compiler.cli.hf_folder import hf_call

        call = hf_call(Path(text.removeprefix("hf:")), with_weights=with_weights)
    elif ":" in text:
        from dsmoe_compiler.cli.user_callable import user_call

        call = user_call(text)
    else:
        call = _zoo_call(text, with_weights=with_weights, dtype=dtype)
    device = device_of(call.model)
    given = {each.name: each.tensor(device, call.kwargs.get(each.name)) for each in inputs}
    call = replace(call, kwargs={**call.kwargs, **given})
    _require_fit(text, call)
    return call


def device_of(model: Callable[..., object]) -> str:
    """The device of a module's parameters and buffers; "cpu" for a function or a module with none."""
    from torch import nn

    if not isinstance(model, nn.Module):
        return "cpu"
    return next((str(t.device) for t in (*model.parameters(), *model.buffers())), "cpu")


def weight_bytes(model: Callable[..., object]) -> int:
    """The size of a module's parameters and buffers, shared ones counted once; 0 for a function."""
    from torch import nn

    if not isinstance(model, nn.Module):
        return 0
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def _zoo_call(name: str, *, with_weights: bool, dtype: str) -> ModelCall:
    import torch

    from dsmoe_compiler.models import zoo

    of = getattr(torch, dtype)
    device = "cpu" if with_weights else "meta"
    try:
        zoo.preset(name)
    except zoo.UnknownModel as e:
        folder = Path(name, "config.json").exists()
        raise InputError(f"{e}; for the folder of that name say hf:{name}" if folder else str(e)) from e
    if with_weights:
        require_memory(weight_bytes(zoo.build(name, device="meta", dtype=of)), name)
    model = zoo.build(name, device=device, dtype=of)
    return ModelCall(model, (), dict(zoo.example_inputs(name, device)))


def _require_fit(text: str, call: ModelCall) -> None:
    function = getattr(call.model, "forward", call.model)
    try:
        signature = inspect.signature(function)
    except ValueError:
        return  # a built-in without a signature: the call itself will tell
    try:
        signature.bind(*call.args, **call.kwargs)
    except TypeError as e:
        wanted = ", ".join(str(parameter) for parameter in signature.parameters.values())
        raise InputError(
            f"the example inputs do not fit {text}: {e}; it takes ({wanted}): say --input NAME=2x16:int64"
        ) from e
