"""`dsmoe models`: the models one can name."""

from __future__ import annotations

import json
import textwrap
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import click

from dsmoe_compiler.cli.stages import load_modules, stages
from dsmoe_compiler.report.grid import Column, Grid, Row

if TYPE_CHECKING:
    from dsmoe_compiler.models.decoder_config import DecoderConfig

INDENT = "    "


@dataclass(frozen=True)
class Entry:
    """One model of the zoo: parameters held, and used by one token; E, K, S and the number of MoE layers."""

    name: str
    description: str
    parameters: int
    activated: int
    experts: int | None  # None, as the next two, where the model is dense
    experts_per_token: int | None
    shared_experts: int | None
    moe_layers: int


@click.command("models")
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
def models(as_json: bool) -> None:
    """List the models of the zoo, family by family.

    E experts are routed, K of them chosen for each token, S shared by all tokens; a dense model has
    none. Activated parameters are those that one token's way through the model uses.

    \b
    Example:
      dsmoe models
    """
    with stages() as stage:
        load_modules(stage, "dsmoe_compiler.models.zoo")
        entries = _entries()
    if as_json:
        click.echo(json.dumps([asdict(entry) for entry in entries], indent=2))
        return
    _print(entries)


def _entries() -> list[Entry]:
    from dsmoe_compiler.models import zoo

    entries = []
    for name, preset in zoo.ZOO.items():
        count, config = zoo.parameter_count(name), preset.config
        entries.append(
            Entry(
                name,
                preset.description,
                count.total,
                count.activated,
                *_experts(config),
                config.num_moe_layers,
            )
        )
    return entries


def _experts(config: DecoderConfig) -> tuple[int | None, int | None, int | None]:
    """E, K and S; nothing of a dense model."""
    from dsmoe_compiler.models.moe_config import MoEConfig

    if not isinstance(config, MoEConfig):
        return None, None, None
    return config.n_routed_experts, config.num_experts_per_tok, config.n_shared_experts


def _print(entries: list[Entry]) -> None:
    from dsmoe_compiler.cli.paint import console, print_grid

    numbers = ("parameters", "activated", "E", "K", "S", "MoE layers")
    rows = (
        Row(
            (
                entry.name,
                _count(entry.parameters),
                _count(entry.activated),
                _or_dash(entry.experts),
                _or_dash(entry.experts_per_token),
                _or_dash(entry.shared_experts),
                str(entry.moe_layers),
            ),
            below=tuple(
                textwrap.wrap(entry.description, 76, initial_indent=INDENT, subsequent_indent=INDENT)
            ),
        )
        for entry in entries
    )
    print_grid(
        console(), Grid((Column("name"), *(Column(title, number=True) for title in numbers)), tuple(rows))
    )


def _or_dash(number: int | None) -> str:
    return "–" if number is None else str(number)


def _count(parameters: int) -> str:
    """A count for reading: 16.4 B, 1.2 M."""
    return f"{parameters / 1e9:.1f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"
