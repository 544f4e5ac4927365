"""What verifying a saved program costs: loading it with its digests compared, without, and bare reading.

    python -m benchmarks.load_check [--quick] [--json PATH]

Eight square layers, 200 MB of weights, the file in the system's cache: what remains is memory and arithmetic.
"""

from __future__ import annotations

import tempfile
from hashlib import sha256
from pathlib import Path
from unittest import mock

import click
import torch
from rich.table import Table
from torch import nn

import dsmoe_compiler
from benchmarks.measure import Target, finish, interleaved, wide_console
from dsmoe_compiler import archive
from dsmoe_compiler.storages import memory

WIDTH, LAYERS = 2500, 8
RATIO = 4.0
LOAD, UNVERIFIED, READ = "load", "load, weights not verified", "read the file into memory"


class _Trusted:
    """Stands for the digest of a block of weights that nobody computed; small sections are still digested."""

    def __init__(self, block: bytes | memoryview) -> None:
        self.block = block

    def hexdigest(self) -> str:
        """Equal to every digest, or that of a small block."""
        return _Any() if len(self.block) > 1_000_000 else sha256(self.block).hexdigest()


class _Any(str):
    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = str.__hash__


def _load(path: Path, digest: object) -> None:
    with mock.patch.object(archive, "sha256", digest):
        dsmoe_compiler.load(path)


def _read(path: Path) -> None:
    whole = torch.empty(path.stat().st_size, dtype=torch.uint8)
    with path.open("rb") as file:
        file.readinto(memory(whole))


@click.command(help="What verifying a saved program costs.")
@click.option("--quick", is_flag=True, help="Few rounds.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures to this file.")
def main(quick: bool, json_path: Path | None) -> None:
    console = wide_console()
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    with console.status("measuring"), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program.pt2"
        dsmoe_compiler.compile(model, (torch.ones(1, WIDTH),), verify="off").save(path)
        size = path.stat().st_size
        rounds = interleaved(
            {
                LOAD: lambda _: _load(path, sha256),
                UNVERIFIED: lambda _: _load(path, _Trusted),
                READ: lambda _: _read(path),
            },
            3 if quick else 21,
        )
    table = Table("", title=f"loading {size / 1e6:.0f} MB", title_justify="left")
    for column in ("s", "GB/s"):
        table.add_column(column, justify="right")
    for name in (LOAD, UNVERIFIED, READ):
        table.add_row(name, f"{rounds.median(name):.3f}", f"{size / rounds.median(name) / 1e9:.2f}")
    console.print(table)
    ratios = {"verified / not": rounds.ratio(LOAD, UNVERIFIED), "load / read": rounds.ratio(LOAD, READ)}
    results = {"bytes": size, "seconds": dict(rounds.seconds), "ratios": ratios}
    goals = [Target("load / reading the file into memory", ratios["load / read"], RATIO)]
    raise SystemExit(finish(console, "load_check", results, goals, json_path))


if __name__ == "__main__":
    main()
