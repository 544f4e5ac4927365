"""How many tokens each expert of each layer was given: counts, and what they say of the balance.

Plain data, as a report is. Experts are numbered from 0, a pair is a token with one of the K experts it chose.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import log2

from dsmoe_compiler.ir.errors import InputError


@dataclass(frozen=True)
class LayerLoad:
    """The load of one layer's routed experts: `counts` (E,) pairs that each expert ran, and the pairs that
    none did, `dropped`: over an expert's capacity, or sent to experts without weights of their own.

    `top_k` is K. Raises ValueError where these are no counts of whole tokens.
    """

    name: str
    top_k: int
    counts: tuple[int, ...]
    dropped: int = 0

    def __post_init__(self) -> None:
        if not self.counts or self.top_k < 1:
            raise ValueError("a layer has experts, and a token chooses some")
        if min(*self.counts, self.dropped) < 0:
            raise ValueError("a count is negative")
        if self.pairs % self.top_k:
            raise ValueError(f"{self.pairs} pairs are no tokens of {self.top_k} experts each")

    @property
    def pairs(self) -> int:
        """All pairs, those dropped included."""
        return sum(self.counts) + self.dropped

    @property
    def tokens(self) -> int:
        """How many tokens the layer was given."""
        return self.pairs // self.top_k

    @property
    def shares(self) -> tuple[float, ...] | None:
        """Each expert's count over the mean count (E,): 1 is an even share. None where no expert ran."""
        total = sum(self.counts)
        return tuple(count * len(self.counts) / total for count in self.counts) if total else None

    @property
    def max_violation(self) -> float | None:
        """MaxVio = (max − mean) / mean of the counts, 0 where they are even (arXiv 2408.15664, section 4.1).
        None where no expert ran.
        """
        return max(self.shares) - 1 if self.shares else None

    @property
    def entropy(self) -> float | None:
        """That of the counts' distribution in bits, at most `even_entropy`. None where no expert ran."""
        total = sum(self.counts)
        return -sum(n / total * log2(n / total) for n in self.counts if n) + 0.0 if total else None

    @property
    def even_entropy(self) -> float:
        """log2 E bits, the entropy of an even load."""
        return log2(len(self.counts))

    @property
    def unused(self) -> tuple[int, ...]:
        """The experts that ran for no token."""
        return tuple(expert for expert, count in enumerate(self.counts) if not count)

    def __add__(self, other: LayerLoad) -> LayerLoad:
        """Both together. Raises InputError where it is another layer."""
        mine, its = ((x.name, x.top_k, len(x.counts)) for x in (self, other))
        if mine != its:
            raise InputError(f"these loads are of different models: {_said(self)} here, {_said(other)} there")
        counts = tuple(a + b for a, b in zip(self.counts, other.counts, strict=True))
        return LayerLoad(self.name, self.top_k, counts, self.dropped + other.dropped)


@dataclass(frozen=True)
class Load:
    """The load of a model's layers in execution order; `not_counted` names the layers that were not fused."""

    model: str
    layers: tuple[LayerLoad, ...]
    not_counted: tuple[str, ...] = ()

    def __add__(self, other: Load) -> Load:
        """Both together, as if counted at once. Raises InputError where they are of different models."""
        mine, its = ((x.model, tuple(layer.name for layer in x.layers), x.not_counted) for x in (self, other))
        if mine != its:
            raise InputError(
                f"these loads are of different models: {_layers(self)} here, {_layers(other)} there"
            )
        layers = tuple(a + b for a, b in zip(self.layers, other.layers, strict=True))
        return Load(self.model, layers, self.not_counted)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file, all or nothing. Raises InputError when the place cannot be written."""
        from dsmoe_compiler.report.load_file import save

        save(self, path)

    @staticmethod
    def read(path: str | os.PathLike[str]) -> Load:
        """What `save` wrote. Raises InputError when the file is missing, damaged or something else."""
        from dsmoe_compiler.report.load_file import read

        return read(path)

    def __str__(self) -> str:
        from dsmoe_compiler.report.load_text import render

        return render(self)


def _said(layer: LayerLoad) -> str:
    return f"{layer.name or 'a layer'} with top-{layer.top_k} of {len(layer.counts)} experts"


def _layers(load: Load) -> str:
    first = f" ({load.layers[0].name}, …)" if load.layers else ""
    return f"{load.model} with {len(load.layers)} layers counted{first}"
