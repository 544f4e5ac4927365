"""ONNX files of one MoE model: ours against transformers' exporter's and torch's, from export to latency.

    python -m benchmarks.onnx [--quick] [--ways standard,ort,…] [--threads 1,2] [--json PATH]

Every way exports in a process of its own and is loaded in others, so that a peak of memory is that way's;
then all are loaded together and take turns, round by round, beside the model itself in torch. A way that
fails is named, with its reason. What is counted is told below each table.

A run of everything writes results/onnx.json; any other writes where --json says. `--tiny` walks the same code
on a model whose figures mean nothing.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console

from benchmarks.measure import ROOT, finish, in_fresh_process, wide_console
from benchmarks.onnx_found import Found
from benchmarks.onnx_model import SIZES
from benchmarks.onnx_one_export import Exported
from benchmarks.onnx_one_load import Loaded
from benchmarks.onnx_one_timing import Request, Timed
from benchmarks.onnx_report import print_found, summary, targets, threads_text
from benchmarks.onnx_ways import STANDARD, WAYS

SECONDS = {1: 8.0, 16: 12.0, 128: 20.0}  # by T: rounds begin for so long
LOADS = 3
THREADS = "1,2"
_RESULTS = ROOT / "benchmarks" / "results" / "onnx.json"


def export_all(
    console: Console, names: Sequence[str], size: str, folder: Path, missing: dict[str, str]
) -> dict[str, Exported]:
    """Into a folder each; of a way that fails, why."""
    found = {}
    for place, name in enumerate(names):
        own = folder / str(place)
        own.mkdir()
        with console.status(f"export: {name}"):
            try:
                found[name] = Exported(**in_fresh_process("benchmarks.onnx_one_export", name, size, str(own)))
            except RuntimeError as e:
                missing[name] = reason(e)
        if not WAYS[name].timed:
            shutil.rmtree(own)
    return found


def load_all(
    console: Console, files: dict[str, Path], threads: int, rounds: int, missing: dict[str, str]
) -> dict[str, list[Loaded]]:
    """Every file once a round, run in the first; one that fails is dropped from `files`."""
    found: dict[str, list[Loaded]] = {}
    for done in range(rounds):
        for name in [*files]:
            arguments = [str(files[name]), str(threads), str(0 if done else max(SECONDS))]
            with console.status(f"load, {threads_text(threads)}, round {done + 1} of {rounds}: {name}"):
                try:
                    fresh = in_fresh_process("benchmarks.onnx_one_load", *arguments)
                except RuntimeError as e:
                    missing[name] = reason(e)
                    del files[name]
                else:
                    found.setdefault(name, []).append(Loaded(**fresh))
    return {name: found[name] for name in files}


def time_all(
    console: Console, files: Mapping[str, Path], size: str, threads: int, share: float
) -> list[list[Timed]]:
    """All that can be alive together, with torch's; and each that cannot, with our standard form."""
    together = {name: str(path) for name, path in files.items() if not WAYS[name].alone}
    groups = [together] + [
        {n: str(p) for n, p in files.items() if n in (STANDARD, name)} for name in files if WAYS[name].alone
    ]
    found = []
    for place, group in enumerate(groups):
        part = share / 4 if place else share  # two ways have rounds sooner than ten
        seconds = {str(tokens): part * spent for tokens, spent in SECONDS.items()}
        request = Request(size, threads, group, torch=place == 0, seconds=seconds)
        with console.status(f"latency, {threads_text(threads)}: {', '.join(group)}"):
            fresh = in_fresh_process("benchmarks.onnx_one_timing", json.dumps(asdict(request)))
        found.append([Timed(**t) for t in fresh["timed"]])
    return found


def reason(failure: RuntimeError) -> str:
    """The error's own line: the first that stands at the margin after a traceback."""
    _, trace, text = str(failure).rpartition("Traceback (most recent call last):")
    lines = [line for line in text.splitlines() if line[:1].strip()]
    return lines[0 if trace else -1][:160]


@click.command(help="ONNX files of one MoE model: ours against transformers' and torch's.")
@click.option("--ways", help=f"With commas: {','.join(WAYS)}.")
@click.option("--threads", default=THREADS, show_default=True, help="Numbers of threads, with commas.")
@click.option("--quick", is_flag=True, help="A fifth of the rounds, one load.")
@click.option("--tiny", is_flag=True, help="Walk the code on a tiny model.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the figures to this file.")
def main(ways: str | None, threads: str, quick: bool, tiny: bool, path: Path | None) -> None:
    start, console = time.monotonic(), wide_console()
    names = list(WAYS) if ways is None else ways.split(",")
    if unknown := [name for name in names if name not in WAYS]:
        raise click.UsageError(f"--ways: no {', '.join(unknown)}; there are {', '.join(WAYS)}")
    if not all(count.isdigit() and int(count) for count in threads.split(",")):
        raise click.UsageError(f"--threads {threads}: give numbers, with commas")
    if path is None and ways is None and threads == THREADS and not (quick or tiny):
        path = _RESULTS
    size, share = "tiny" if tiny else "mid", 0.2 if quick or tiny else 1.0
    found = Found(SIZES[size])
    with tempfile.TemporaryDirectory() as folder:
        found.exports.update(export_all(console, names, size, Path(folder), found.missing))
        files = {
            name: Path(folder) / str(place) / "model.onnx"
            for place, name in enumerate(names)
            if name in found.exports and WAYS[name].timed
        }
        for count in map(int, threads.split(",")):
            found.loads[count] = load_all(console, files, count, 1 if quick or tiny else LOADS, found.missing)
            found.timings[count] = time_all(console, files, size, count, share)
    print_found(console, found)
    results = {"minutes": (time.monotonic() - start) / 60, **summary(found)}
    raise SystemExit(finish(console, "onnx", results, [] if tiny else targets(found), path))


if __name__ == "__main__":
    main()
