"""The structure of an output is the model's, in memory and from a file."""

import collections
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import dsmoe_compiler as dsmoe
from dsmoe_compiler.outputs import Fields, Structure


class _Pair(NamedTuple):
    first: Tensor
    second: Tensor | None


@dataclasses.dataclass
class _Record:
    logits: Tensor
    loss: Tensor | None = None
    hidden: tuple[Tensor, ...] = ()


class _SubDict(dict[str, Tensor]):
    pass


class _Cache:
    def get_seq_length(self) -> int:
        return 0


OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "a tensor": lambda x: x * 2,
    "nothing": lambda x: None,
    "a tuple": lambda x: (x * 2, None, [x, 1.5, "text", True]),
    "a dict": lambda x: {"b": x * 2, "a": None, 3: {"deep": (x,)}},
    "an ordered dict": lambda x: collections.OrderedDict(z=x * 2, a=x),
    "a dict of its own class": lambda x: _SubDict(a=x * 2),
    "a named tuple": lambda x: _Pair(x * 2, None),
    "a dataclass": lambda x: _Record(x * 2, None, (x, x)),
    "one tensor twice": lambda x: (y := x * 2, y),
    "an input": lambda x: (x, x * 2),
    "sizes": lambda x: (x.shape[0] * 2, x.shape, x * 2),
    "a scalar": lambda x: x.sum(),
    "an empty tuple": lambda x: (),
}


def _same(a: Any, b: Any) -> bool:
    """Equal structures of equal types with equal tensors."""
    (mine, values), (theirs, others) = Structure.of(a), Structure.of(b)
    return mine == theirs and all(x.equal(y) for x, y in zip(values, others, strict=True))


@pytest.mark.parametrize("kind", OUTPUTS)
def test_output_structure(kind: str, tmp_path: Path) -> None:
    function = OUTPUTS[kind]
    program = dsmoe.compile(function, (torch.randn(4, 3),))
    program.save(tmp_path / "p.pt2")
    other = torch.randn(5, 3)
    for found in (program(other), dsmoe.load(tmp_path / "p.pt2")(other)):
        assert type(found) is type(function(other))
        assert _same(found, function(other))


def test_a_cache_is_left_out() -> None:
    program = dsmoe.compile(lambda x: {"y": x * 2, "cache": _Cache()}, (torch.ones(2, 2),))
    assert program(torch.ones(1, 2))["cache"] is None


@pytest.mark.parametrize(("made", "named"), [(lambda x: {x}, "set"), (lambda x: (x, x.dtype), "dtype")])
def test_what_cannot_be_returned(made: Callable[[Tensor], Any], named: str) -> None:
    with pytest.raises(dsmoe.CaptureError, match=f"the model returns a {named}: return tensors"):
        dsmoe.compile(made, (torch.ones(2, 2),))


def test_a_class_that_is_not_there_any_more() -> None:
    structure, values = Structure.of(_Record(torch.ones(2), None, (torch.zeros(1),)))
    lost = Structure.from_json(dataclasses.asdict(dataclasses.replace(structure, type="gone.away:Record")))
    found = lost.build(values)
    assert isinstance(found, Fields)
    assert found.logits is found["logits"] is found[0] is values[0]  # type: ignore[attr-defined]
    assert list(found) == ["logits", "hidden"] and found.loss is None  # type: ignore[attr-defined]


def test_an_exported_programs_structure() -> None:
    module = torch.nn.Module()
    module.forward = OUTPUTS["a tuple"]
    exported = torch.export.export(module, (torch.randn(4, 3),))
    found = dsmoe.compile(exported)(torch.ones(4, 3))
    assert pytree.tree_structure(found) == pytree.tree_structure(module.forward(torch.ones(4, 3)))
    assert found[2][1:] == [1.5, "text", True]


def test_values_are_called_by_keys_and_places() -> None:
    t = torch.zeros(1)
    for output, names in (
        (t, ["output"]),
        ((t, [t, t]), ["output.0", "output.1.0", "output.1.1"]),
        ({"logits": t, "states": (t, None, t)}, ["logits", "states.0", "states.2"]),
    ):
        assert Structure.of(output)[0].names() == names
