"""What a run of benchmarks.onnx found: tables, targets and the figures for its file."""

from __future__ import annotations

from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from benchmarks.measure import Target
from benchmarks.onnx_found import Found
from benchmarks.onnx_ways import BATCHED, EAGER, GROUPED, ORT, STANDARD, TRANSFORMERS, WAYS

_FILE_BYTES = 1e6
_DATA = 1.01  # times the parameters
_EXPERT_SHARE = {8: 0.30, 4: 0.17}  # of their bytes in float32, by bits
# Relative L2 distance to eager's logits: sums in another order; rounded weights, and tokens that choose other
# experts for it.
_DISTANCE = {32: 1e-4, 8: 0.1, 4: 0.5}
_NODES, _LOAD, _MEMORY, _LATENCY = 0.5, 0.5, 0.8, 1.0  # times transformers'
_BATCHED_TOKENS, _BATCHED = 128, 10.0  # times faster than torch's
_INT8_FROM, _INT8 = (
    16,
    1.1,
)  # tokens from which the standard form takes at most so many times onnxruntime's own


def targets(found: Found) -> list[Target]:
    """Of ours that were made; where a way to compare with is missing, so is the target."""
    ours = [name for name in found.names if WAYS[name].ours and name not in found.missing]
    wanted = [name for name in {**found.exports, **found.missing} if WAYS[name].ours]
    goals = [Target("files of ours that were made, and run", len(ours), len(wanted), at_least=True)]
    goals += _against_transformers(found)
    for threads in found.timings:
        at = f"{threads_text(threads)}, T="
        if (times := found.times(threads, _BATCHED_TOKENS, BATCHED, STANDARD)) is not None:
            goals.append(
                Target(f"{at}{_BATCHED_TOKENS}: times faster than {BATCHED}", times, _BATCHED, at_least=True)
            )
        for tokens in found.tokens:
            times = found.times(threads, tokens, f"{STANDARD} int8", f"{ORT} int8")
            if tokens >= _INT8_FROM and times is not None:
                goals.append(Target(f"{at}{tokens}: {STANDARD} int8, times {ORT} int8", times, _INT8))
    for name in ours:
        goals += _of_one(found, name) if WAYS[name].timed else []
    return goals


def _against_transformers(found: Found) -> list[Target]:
    """Nodes, loads, memory and latency."""
    both = [found.exports.get(name) for name in (STANDARD, TRANSFORMERS)]
    if both[0] is None or both[1] is None:
        return []
    what = f"{STANDARD}, times {TRANSFORMERS}'"
    goals = [Target(f"nodes: {what}", both[0].nodes / both[1].nodes, _NODES)]
    ours, theirs = (found.peaks(name) for name in (STANDARD, TRANSFORMERS))
    if ours is not None and theirs is not None:
        goals.append(Target(f"peak memory, loaded and run: {what}", ours[1] / theirs[1], _MEMORY))
    for threads in found.timings:
        if (times := found.load_times(threads, STANDARD, TRANSFORMERS)) is not None:
            goals.append(Target(f"{threads_text(threads)}, load: {what}", times, _LOAD))
        for tokens in found.tokens:
            if (times := found.times(threads, tokens, STANDARD, TRANSFORMERS)) is not None:
                goals.append(Target(f"{threads_text(threads)}, T={tokens}: {what}", times, _LATENCY))
    return goals


def _of_one(found: Found, name: str) -> list[Target]:
    """Sizes, and how near it is to eager."""
    e, bits = found.exports[name], WAYS[name].bits
    goals = [Target(f"{name}: .onnx, bytes", e.file_bytes, _FILE_BYTES)]
    if bits == 32:
        goals.append(Target(f"{name}: data over parameters", e.data_bytes / e.parameter_bytes, _DATA))
    elif (share := found.expert_share(name)) is not None:
        goals.append(Target(f"{name}: experts' bytes over float32's", share, _EXPERT_SHARE[bits]))
    if (off := found.difference(name)) is not None:
        goals.append(Target(f"{name}: relative distance to {EAGER}", off[1], _DISTANCE[bits]))
    return goals


def print_found(console: Console, found: Found) -> None:
    """What exporting cost, what loading did, and a table of latencies for each number of threads; every × is
    against our standard form. Below, what is missing.
    """
    _note(console, f"{found.size.name}: × is against {STANDARD}")
    _print_exports(console, found)
    _print_loads(console, found)
    for threads in found.timings:
        _print_latency(console, found, threads)
    for name, why in found.missing.items():
        _note(console, f"- {name}: {why}")
    console.print()


def _print_exports(console: Console, found: Found) -> None:
    table = _table("export", "nodes", "seconds", "peak MB", ".onnx kB", "data MB", "experts")
    base = found.exports.get(STANDARD)
    for name in found.names:
        e, share = found.exports[name], found.expert_share(name)
        b = base or e
        table.add_row(
            name,
            _with_times(e.nodes, "d", e.nodes / b.nodes),
            _with_times(e.seconds, ".1f", e.seconds / b.seconds),
            _with_times(e.peak_megabytes, ".0f", e.peak_megabytes / b.peak_megabytes),
            f"{e.file_bytes / 1e3:.0f}",
            f"{e.data_bytes / 1e6:.0f}",
            f"{share:.3f}",
            style=_style(name),
        )
    console.print(table)
    parameters = max((e.parameter_bytes for e in found.exports.values()), default=0)
    _note(
        console,
        "Each in a process of its own; seconds of the call, files written. Peak: all that was resident, "
        f"torch and {parameters / 1e6:.0f} MB of parameters included. Experts: bytes over those in float32.",
    )


def _print_loads(console: Console, found: Found) -> None:
    seconds = [f"s, {threads_text(threads)}" for threads in found.loads]
    table = _table("load", *seconds, "peak MB", "after a call")
    base = found.peaks(STANDARD)
    for name in found.names:
        if (peaks := found.peaks(name)) is None:
            continue
        cells = [
            _with_times(found.load_seconds(n, name), ".2f", found.load_times(n, name, STANDARD))
            for n in found.loads
        ]
        cells += [_with_times(p, ".0f", p / b) for p, b in zip(peaks, base or peaks, strict=True)]
        table.add_row(name, *cells, style=_style(name))
    console.print(table)
    rounds = max((len(x) for by_name in found.loads.values() for x in by_name.values()), default=0)
    _note(
        console,
        f"Each in a process of its own, medians of {rounds}, the files in the system's cache. Peak: all that "
        "was resident, mapped pages of the files included, no torch; the call has "
        f"{max(found.tokens, default=0)} tokens.",
    )


def _print_latency(console: Console, found: Found, threads: int) -> None:
    columns = [f"T={tokens}" for tokens in found.tokens]
    table = _table(f"ms, {threads_text(threads)}", *columns, "difference", "relative")
    for name in (EAGER, GROUPED, *found.names):
        if (off := found.difference(name)) is None:
            continue
        cells = [
            _with_times(
                found.milliseconds(threads, tokens, name),
                ".2f",
                found.times(threads, tokens, name, STANDARD),
            )
            for tokens in found.tokens
        ]
        differences = [f"{value:.0e}" for value in off]
        table.add_row(name, *cells, *differences, style=_style(name), end_section=name == GROUPED)
    table.add_section()
    for group in found.timings[threads]:
        kept = [f"{t.kept} of {t.kept + t.discarded}" for t in group]
        alone = [name for name in group[0].seconds if WAYS.get(name, WAYS[STANDARD]).alone]
        table.add_row(" ".join(["rounds", *alone]), *kept, style="dim")
    console.print(table)
    apart = f"; {BATCHED}, which gathers its weights, does so with {STANDARD} alone"
    _note(
        console,
        f"Medians of rounds in which all take turns{apart if len(found.timings[threads]) > 1 else ''}. "
        f"Difference to {EAGER}'s logits: the largest, and the relative L2 distance.",
    )


def _note(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False)


def _table(*columns: str) -> Table:
    table = Table()
    table.add_column(columns[0], min_width=len(BATCHED))  # names are folded at their spaces
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def _with_times(value: float | None, spec: str, times: float | None) -> str:
    if value is None:
        return "-"
    shown = format(value, spec)
    return shown if times is None else f"{shown} {times:{'.2f' if times < 9.995 else '.1f'}}×"


def _style(name: str) -> str | None:
    return "bold" if name == STANDARD else None


def threads_text(count: int) -> str:
    """As tables have it."""
    return "1 thread" if count == 1 else f"{count} threads"


def summary(found: Found) -> dict[str, object]:
    """For the file: every figure of the tables, by way."""
    loads = {
        name: {
            "seconds": {n: found.load_seconds(n, name) for n in found.loads},
            "over_standard": {n: found.load_times(n, name, STANDARD) for n in found.loads},
            "peak_megabytes": peaks,
        }
        for name in found.names
        if (peaks := found.peaks(name)) is not None
    }
    latency = {
        name: [
            {
                "threads": threads,
                "tokens": tokens,
                "milliseconds": found.milliseconds(threads, tokens, name),
                "over_standard": found.times(threads, tokens, name, STANDARD),
                "difference": t.difference[name],
                "distance": t.distance[name],
                "rounds": len(t.seconds[name]),
                "discarded": t.discarded,
            }
            for threads in found.timings
            for tokens in found.tokens
            if (t := found.timed(threads, tokens, name)) is not None
        ]
        for name in (EAGER, GROUPED, *found.names)
    }
    return {
        "model": asdict(found.size),
        "exports": {name: asdict(e) for name, e in found.exports.items()},
        "loads": loads,
        "latency": latency,
        "missing": found.missing,
    }
