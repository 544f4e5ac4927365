"""What a benchmark calls a model with: the example's ids at other lengths, or the example as it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dsmoe_compiler.cli.bench_model import longest_sequence, vocabulary
from dsmoe_compiler.cli.bench_options import TOKENS, Options
from dsmoe_compiler.cli.model_argument import ModelCall
from dsmoe_compiler.ir.errors import InputError
from dsmoe_compiler.resize import resized

TURNS = 4  # inputs that take turns, so that no figure tells of weights that a cache happened to hold
Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Workload:
    """Calls of one shape that take turns. `shape` is the ids', (batch, T), or else the first tensor's;
    `tokens` is T, None where nothing says what a token is.
    """

    shape: tuple[int, ...]
    tokens: int | None
    calls: tuple[Call, ...]

    @property
    def label(self) -> str:
        """What a table calls it: "128", "5x16"."""
        return "x".join(map(str, self.shape)) if self.tokens is None else str(self.tokens)

    @property
    def where(self) -> str:
        """The same in a sentence: "T=128", "inputs of 5x16"."""
        return f"inputs of {self.label}" if self.tokens is None else f"T={self.label}"


def workloads(text: str, call: ModelCall, options: Options) -> tuple[Workload, ...]:
    """What MODEL is measured on. Raises InputError where it cannot be asked that."""
    if not _takes_ids(call):
        if options.tokens or options.batch:
            raise InputError(
                f"--tokens and --batch say the sizes of ids (batch, length), and {text} takes other inputs: "
                "say theirs with --input"
            )
        return (_as_it_is(call),)
    longest = longest_sequence(call.model)
    if options.tokens and longest is not None and max(options.tokens) > longest:
        raise InputError(f"{text} takes at most {longest} tokens, --tokens says {max(options.tokens)}")
    tokens = options.tokens or tuple(each for each in TOKENS if longest is None or each <= longest)
    return tuple(_of_length(call, options.batch or 1, each) for each in tokens)


def _takes_ids(call: ModelCall) -> bool:
    """Whether all tensors of the example are integers or masks, (B, L) alike."""
    tensors = [leaf for _, leaf in _tensors((call.args, call.kwargs))]
    if not tensors or any(tensor.dim() != 2 or tensor.shape != tensors[0].shape for tensor in tensors):
        return False
    return all(not tensor.is_floating_point() and not tensor.is_complex() for tensor in tensors)


def _of_length(call: ModelCall, batch: int, tokens: int) -> Workload:
    """The example's call with random ids (batch, tokens), its masks repeated, and positions that count on."""
    known = vocabulary(call.model)
    paths = [path for path, _ in _tensors((call.args, call.kwargs))]
    ids = {path for path in paths if path[-1].endswith("input_ids")} or set(paths[:1])

    def made(path: tuple[str, ...], example: Tensor, generator: torch.Generator) -> Tensor:
        if path in ids:
            end = known or (int(example.max()) + 1 if example.numel() else 1)
            return torch.randint(end, (batch, tokens), generator=generator).to(example.device, example.dtype)
        if _counts(example):
            positions = torch.arange(tokens, dtype=example.dtype, device=example.device)
            return positions.repeat(batch, 1)
        return resized(resized(example, 0, batch), 1, tokens)

    def turn(seed: int) -> Call:
        generator = torch.Generator().manual_seed(seed)

        def leaf(path: Any, value: Any) -> Any:
            return made(_words(path), value, generator) if isinstance(value, Tensor) else value

        args, kwargs = pytree.tree_map_with_path(leaf, (call.args, call.kwargs))
        return args, kwargs

    return Workload((batch, tokens), tokens, tuple(map(turn, range(TURNS))))


def _counts(example: Tensor) -> bool:
    """Whether every row is 0, 1, 2, …: more than a lone zero, which is no sign of positions."""
    if example.dtype == torch.bool or example.shape[1] < 2:
        return False
    return example.equal(torch.arange(example.shape[1]).to(example).expand_as(example))


def _as_it_is(call: ModelCall) -> Workload:
    """The example's call."""
    first = next((leaf for _, leaf in _tensors((call.args, call.kwargs))), None)
    shape = () if first is None else tuple(first.shape)
    return Workload(shape, None, ((call.args, call.kwargs),))


def _tensors(call: Call) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """The tensors of a call, and where each stands."""
    for path, leaf in pytree.tree_flatten_with_path(call)[0]:
        if isinstance(leaf, Tensor):
            yield _words(path), leaf


def _words(path: Any) -> tuple[str, ...]:
    """A place in a call: ("1", "input_ids")."""
    return tuple(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)
