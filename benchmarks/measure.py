"""What every benchmark here measures with: interleaved rounds (those of `dsmoe bench`), targets, fresh
processes, the machine's facts.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dsmoe_compiler.cli.measure import Rounds as Rounds
from dsmoe_compiler.cli.measure import interleaved as interleaved

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Target:
    """A figure and the most (or, for `at_least`, the least) it may be."""

    what: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether the figure keeps its limit."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit


def in_fresh_process(module: str, *arguments: str) -> dict[str, Any]:
    """Run `python -m module arguments…` from the root of the checkout; its last line of output is JSON.

    Raises RuntimeError with what it wrote when it fails.
    """
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def peak_megabytes() -> float:
    """The most memory this process ever had resident, in units of 10^6 bytes."""
    try:
        # Not ru_maxrss, which on Linux begins at what the process had that started this one.
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024) / 1e6
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6


def machine() -> dict[str, object]:
    """The processor, how many cores of it may be used, and the system."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"processor": _processor(), "cores": cores, "system": f"{platform.system()} {platform.machine()}"}


def _processor() -> str:
    """The model's name; where a hypervisor hides it, what instructions for neural networks it has, too."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = facts.get("flags", "").split()
    notable = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return " ".join([facts.get("model name", platform.machine()), *notable])


def versions() -> dict[str, str]:
    """Python's version, and those of the packages that a figure may depend on."""
    found = {"python": platform.python_version()}
    for package in ("dsmoe-compiler", "torch", "transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def wide_console() -> Console:
    """The terminal; 150 columns where the output goes to a file."""
    console = Console()
    return console if console.is_terminal else Console(width=150)


def finish(
    console: Console,
    benchmark: str,
    results: Mapping[str, object],
    targets: Sequence[Target],
    path: Path | None,
) -> int:
    """Print the targets and write everything to `path`, if given; the exit status: 1 if one is missed."""
    table = Table("target", "limit", "measured", "", title="targets", title_justify="left")
    for target in targets:
        sign, verdict = "≥" if target.at_least else "≤", "[green]met[/]" if target.met else "[red]missed[/]"
        table.add_row(target.what, f"{sign} {target.limit:g}", f"{target.value:.4g}", verdict)
    console.print(table)
    if path is not None:
        record = {
            "benchmark": benchmark,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": machine(),
            "versions": versions(),
            **results,
            "targets": [{**asdict(target), "met": target.met} for target in targets],
        }
        path.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if all(target.met for target in targets) else 1
