"""`dsmoe kernels --tune`: plans measured on the GPU at hand, and what that changed."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import click

from dsmoe_compiler.cli.kernels_model import FusedModel
from dsmoe_compiler.cli.kernels_table import is_decode, named, shape, title
from dsmoe_compiler.cli.stages import Stage
from dsmoe_compiler.report.grid import Column, Grid, Row

if TYPE_CHECKING:
    from dsmoe_compiler.runtime.kernels import Choice, FusedLayer, GemmTiles, GemvTiles
    from dsmoe_compiler.runtime.trials import Bench, Trial
    from dsmoe_compiler.runtime.tune import Tuned


@dataclass(frozen=True)
class TunedLayer:
    """A distinct layer and what came of it; `why` nothing, where it has no kernels."""

    fused: FusedLayer
    found: tuple[Tuned, ...]
    why: str = ""


@dataclass(frozen=True)
class Tunings:
    """The answer of `--tune`."""

    bench: Bench
    layers: tuple[TunedLayer, ...]
    notes: tuple[str, ...]

    def print(self, as_json: bool) -> None:
        """As tables, or as one JSON record."""
        if as_json:
            found = [_record(each) for layer in self.layers for each in layer.found]
            click.echo(json.dumps({"gpu": self.bench.gpu.name, "tuned": found}, indent=2))
            return
        from dsmoe_compiler.cli.paint import console, print_grid, print_lines, reading_width

        to = console()
        print_lines(to, [f"measured on {named(self.bench.gpu)}"], style="bold")
        for layer in self.layers:
            to.print()
            print_lines(to, textwrap.wrap(title(layer.fused), reading_width(to)), style="bold cyan")
            if layer.why:
                print_lines(to, textwrap.wrap(f"no kernels: {layer.why}", reading_width(to)))
            else:
                print_grid(to, tuned_grid(layer.found))


def bench_here() -> Bench:
    """Where plans are measured. Raises InputError where there is no GPU."""
    from dsmoe_compiler.runtime import trials

    return trials.bench_here()


def tunings(model: FusedModel, tokens: Sequence[int], bench: Bench, stage: Stage) -> Tunings:
    """Measure plans for the model's distinct layers, and keep the best. Layers that a plan cannot tell apart
    are measured once.
    """
    from dsmoe_compiler.runtime.kernels import Unsupported, bucket
    from dsmoe_compiler.runtime.tune import tune

    layers, notes = [], list[str]()
    done = dict[str, str]()
    for fused in model.layers:
        found = []
        try:
            for each in dict.fromkeys(map(bucket, tokens)):
                problem = fused.layer.problem(each).text
                if problem in done:
                    notes.append(f"{title(fused)} at T={each} is as {done[problem]}")
                    continue
                done[problem] = title(fused)
                stage(f"measure {fused.names[0]} at T={each}")
                found.append(tune(fused, each, bench))
        except Unsupported as e:
            layers.append(TunedLayer(fused, (), str(e)))
        else:
            if found:
                layers.append(TunedLayer(fused, tuple(found)))
    for layer in layers:
        for tuned in layer.found:
            for choice, why in tuned.failed:
                tiles = f"up {_tiles(choice.plan.up)}, down {_tiles(choice.plan.down)}"
                notes.append(f"T={tuned.tokens}, {tiles}: {why}")
    return Tunings(bench, tuple(layers), tuple(notes))


def tuned_grid(found: Sequence[Tuned]) -> Grid:
    """Old and new plans, and how many times faster the new one is."""
    rows = []
    for each in found:
        old, new = each.old, each.new
        tokens = str(each.tokens)
        if old is None:
            rows.append(Row((tokens, "old failed", "", "", "", ""), alert=True))
        elif old.choice == new.choice:
            rows += _rows(tokens, "kept", old, "")
            continue
        else:
            rows += _rows(tokens, "old", old, "")
        rows += _rows("", "new", new, "" if old is None else f"{old.microseconds / new.microseconds:.2f}×")
    numbers = [Column("µs", number=True), Column("gain", number=True)]
    return Grid(
        (Column("T", number=True), Column("plan"), Column("up"), Column("down"), *numbers), tuple(rows)
    )


def _rows(tokens: str, which: str, trial: Trial, gain: str) -> Iterator[Row]:
    plan, shared = trial.choice.plan, trial.choice.shared
    kind = "decode" if is_decode(plan) else "grouped"
    cells = (f"{which} {kind}", _tiles(plan.up), _tiles(plan.down))
    yield Row((tokens, *cells, f"{trial.microseconds:.1f}", gain))
    if shared is not None:
        yield Row(("", f"{which} shared", _tiles(shared.up), _tiles(shared.down), "", ""))


def _tiles(tiles: GemmTiles | GemvTiles) -> str:
    """ "128×128×64 8w 4s": sizes, warps, stages."""
    swap = " swap" if getattr(tiles, "swap", False) else ""
    return f"{shape(tiles)} {tiles.warps}w {tiles.stages}s{swap}"


def _record(tuned: Tuned) -> dict[str, Any]:
    def trial(choice: Choice, microseconds: float, error: float) -> dict[str, Any]:
        shared = None if choice.shared is None else asdict(choice.shared)
        told = {"plan": asdict(choice.plan), "shared": shared}
        return {**told, "microseconds": microseconds, "error": error}

    old, new = tuned.old, tuned.new
    return {
        "layers": list(tuned.fused.names),
        "tokens": tuned.tokens,
        "old": None if old is None else trial(old.choice, old.microseconds, old.error),
        "new": trial(new.choice, new.microseconds, new.error),
        "measured": tuned.measured,
        "failed": [{"plan": asdict(choice.plan), "why": why} for choice, why in tuned.failed],
    }
