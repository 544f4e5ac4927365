"""What a model returns, taken apart before tracing and put together at every call.

The graph returns a flat tuple of tensors and sizes; the containers around them are kept here, in a form
that survives JSON, so that a saved program needs neither the model's source nor the library its output
classes come from: where a class cannot be found any more, a `Fields` with the same names stands for it.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dsmoe_compiler.ir.errors import CaptureError

_CONSTANTS = (type(None), bool, int, float, str)
_TRACED = (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)
_BUILTIN = {"tuple": tuple, "list": list, "dict": dict, "OrderedDict": OrderedDict, "Size": torch.Size}
Kind = Literal["value", "constant", "sequence", "mapping", "fields"]


@dataclass(frozen=True)
class Structure:
    """One node of an output: a value of the graph, a constant, or a container of further ones.

    `type` names the container's class ("tuple", "transformers.modeling_outputs:CausalLMOutput"), `keys` its
    keys or fields, `constant` the constant.
    """

    kind: Kind
    type: str = ""
    keys: tuple[str | int, ...] = ()
    children: tuple[Structure, ...] = ()
    constant: None | bool | int | float | str = None

    @staticmethod
    def of(output: object) -> tuple[Structure, list[Any]]:
        """The structure of an output, and its values in order. Raises CaptureError on a container of
        unknown kind.
        """
        values: list[Any] = []
        return _take_apart(output, values), values

    def build(self, values: Sequence[Any]) -> Any:
        """The inverse of `of`."""
        return _put_together(self, iter(values))

    def names(self) -> list[str]:
        """What each value is called: its key, field or place in its container, joined by dots; after
        "output" where the first of these is a place, or there is none.
        """
        root = () if self.keys else ("output",)
        return [".".join((*root, *path)) for path in _paths(self)]

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> Structure:
        """From what `dataclasses.asdict` made of a structure."""
        children = tuple(Structure.from_json(child) for child in record["children"])
        return Structure(record["kind"], record["type"], tuple(record["keys"]), children, record["constant"])


class Fields(Mapping[str, Any]):
    """Named outputs of a class that is not installed here: by attribute, by name or by position."""

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)

    def __getitem__(self, key: str | int) -> Any:
        return (
            vars(self)[key]
            if isinstance(key, str)
            else [v for v in vars(self).values() if v is not None][key]
        )

    def __iter__(self) -> Any:
        return (name for name, value in vars(self).items() if value is not None)

    def __len__(self) -> int:
        return sum(value is not None for value in vars(self).values())

    def __repr__(self) -> str:
        return f"Fields({', '.join(f'{k}={v!r}' for k, v in vars(self).items())})"


def _take_apart(output: Any, values: list[Any]) -> Structure:
    kind = type(output)
    if isinstance(output, _TRACED):
        values.append(output)
        return Structure("value")
    if kind in _CONSTANTS:
        return Structure("constant", constant=output)
    if _is_cache(output):  # a program has no state: it is captured without the cache
        return Structure("constant")
    if dataclasses.is_dataclass(output):
        names = tuple(f.name for f in dataclasses.fields(output) if f.init)
        return Structure("fields", _name(kind), names, _each((getattr(output, n) for n in names), values))
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return Structure("fields", _name(kind), tuple(output._fields), _each(output, values))
    if kind in (tuple, list, torch.Size):
        return Structure("sequence", kind.__name__, (), _each(output, values))
    if isinstance(output, dict) and all(type(key) in (str, int) for key in output):
        return Structure("mapping", _name(kind), tuple(output), _each(output.values(), values))
    raise CaptureError(
        f"the model returns a {kind.__name__}: return tensors and numbers, or tuples, lists, dicts, named "
        "tuples and dataclasses of them",
        "R105",
    )


def _paths(structure: Structure) -> Iterator[tuple[str, ...]]:
    """Of every value, in order, the keys and places that lead to it."""
    if structure.kind == "value":
        yield ()
    places = structure.keys or range(len(structure.children))
    for place, child in zip(places, structure.children, strict=True):
        for path in _paths(child):
            yield (str(place), *path)


def _each(items: Any, values: list[Any]) -> tuple[Structure, ...]:
    return tuple(_take_apart(item, values) for item in items)


def _is_cache(output: object) -> bool:
    return hasattr(output, "get_seq_length")  # the protocol of transformers' caches


def _name(kind: type) -> str:
    return next((n for n, k in _BUILTIN.items() if k is kind), f"{kind.__module__}:{kind.__qualname__}")


def _put_together(structure: Structure, values: Any) -> Any:
    if structure.kind == "value":
        return next(values)
    if structure.kind == "constant":
        return structure.constant
    children = [_put_together(child, values) for child in structure.children]
    kind = _BUILTIN.get(structure.type) or _class(structure.type)
    if structure.kind == "sequence":
        return kind(children)
    if structure.kind == "mapping":
        return (kind or dict)(zip(structure.keys, children, strict=True))
    return (kind or Fields)(**{str(k): child for k, child in zip(structure.keys, children, strict=True)})


def _class(name: str) -> Any:
    """The class of that name if its module is loaded."""
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, type) else None
