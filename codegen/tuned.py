"""Measured plans: the committed tables, and the user's own cache beside them.

A table is one JSON file for each GPU, `codegen/tuned/nvidia-h200.json` in the package and
`$XDG_CACHE_HOME/dsmoe/tuned/v1/nvidia-h200.json` (or under `~/.cache`) for the user:

    {"format": 1,
     "gpu": "NVIDIA H200",
     "entries": {"3.9": {"tokens=64,hidden=2048,…": {"microseconds": 297.5, "plan": {"kind": "grouped", …}}}}}

A user's file is a table that can be committed as it is.

An entry counts for one minor version of Triton, as registers are given out differently in each. Entries are
merged under a lock and the file replaced as a whole, so that processes which tune at the same time keep each
other's. What cannot be read is left aside with a warning that names the file.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from dsmoe_compiler.codegen.gpu import Gpu
from dsmoe_compiler.codegen.tiles import Decode, GemmTiles, GemvTiles, Grouped, Plan, Problem
from dsmoe_compiler.codegen.user_cache import user_cache

FORMAT = 1


@dataclass(frozen=True)
class Measured:
    """A plan, and the median time of a layer with it."""

    plan: Plan
    microseconds: float


@dataclass(frozen=True)
class Found:
    """A measurement, and whether it is the user's own rather than the committed table's."""

    measured: Measured
    own: bool


def lookup(problem: Problem, gpu: Gpu, triton: str) -> Plan | None:
    """The measured plan for a problem, the user's own before the committed one; None where there is none."""
    found = find(problem, gpu, triton)
    return None if found is None else found.measured.plan


def find(problem: Problem, gpu: Gpu, triton: str) -> Found | None:
    """As `lookup`, with the time that was measured and where it is kept."""
    for own, place, text in (
        (True, str(_user_file(gpu)), _user_text(gpu)),
        (False, _file_name(gpu), _committed_text(gpu)),
    ):
        entry = _entries(text, place).get(_minor(triton), {}).get(problem.text)
        measured = None if entry is None else _read_entry(entry, place)
        if measured is not None:
            return Found(measured, own)
    return None


def store(found: Mapping[Problem, Measured], gpu: Gpu, triton: str) -> Path | None:
    """Add plans to the user's cache, over older ones for the same problems. Returns the file, or None where
    it cannot be written, after a warning.
    """
    file = _user_file(gpu)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _locked(file):
            entries = _entries(_user_text(gpu), str(file))
            mine = {problem.text: _entry(measured) for problem, measured in found.items()}
            entries[_minor(triton)] = {**entries.get(_minor(triton), {}), **mine}
            _replace(file, {"format": FORMAT, "gpu": gpu.name, "entries": entries})
    except OSError as e:
        _warn(f"{file}: cannot be written ({e.strerror or e}); tuned plans are not kept")
        return None
    return file


def user_folder() -> Path:
    """Where the user's tables lie: `dsmoe/tuned/v1` in `$XDG_CACHE_HOME`, else in `~/.cache`. Tables of
    another format lie beside it, so that no version of the compiler writes over those of another.
    """
    return user_cache() / "tuned" / f"v{FORMAT}"


def _file_name(gpu: Gpu) -> str:
    return re.sub(r"[^a-z0-9]+", "-", gpu.name.lower()).strip("-") + ".json"


def _user_file(gpu: Gpu) -> Path:
    return user_folder() / _file_name(gpu)


def _user_text(gpu: Gpu) -> str | None:
    file = _user_file(gpu)
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as e:
        _warn(f"{file}: cannot be read ({e.strerror or e}); its tuned plans are not used")
        return None


def _committed_text(gpu: Gpu) -> str | None:
    table = files("dsmoe_compiler.codegen") / "tuned" / _file_name(gpu)
    return table.read_text(encoding="utf-8") if table.is_file() else None


def _minor(triton: str) -> str:
    """ "3.9.0+git1234" → "3.9"."""
    return ".".join(triton.split(".")[:2])


def _entries(text: str | None, place: str) -> dict[str, dict[str, Any]]:
    """By Triton's version and the problem's text; empty where the file is not a table of this format."""
    if text is None:
        return {}
    try:
        table = json.loads(text)
    except (ValueError, RecursionError):
        _warn(f"{place}: is not JSON; its tuned plans are not used")
        return {}
    if not isinstance(table, dict) or table.get("format") != FORMAT:
        _warn(f"{place}: is not a table of tuned plans of format {FORMAT}; it is not used")
        return {}
    entries = table.get("entries")
    if not isinstance(entries, dict) or not all(isinstance(each, dict) for each in entries.values()):
        _warn(f"{place}: holds no tuned plans by version and problem; it is not used")
        return {}
    return entries


def _entry(measured: Measured) -> dict[str, Any]:
    kind = "decode" if isinstance(measured.plan, Decode) else "grouped"
    return {"microseconds": measured.microseconds, "plan": {"kind": kind, **asdict(measured.plan)}}


def _read_entry(entry: object, place: str) -> Measured | None:
    try:
        return _measured(entry)
    except (TypeError, ValueError, KeyError, OverflowError) as e:
        _warn(f"{place}: a tuned plan in it cannot be read ({e!r}); it is not used")
        return None


def _measured(entry: Any) -> Measured:
    """Raises TypeError, ValueError, KeyError or OverflowError for what `_entry` did not write."""
    microseconds, plan = float(entry["microseconds"]), dict(entry["plan"])
    if not math.isfinite(microseconds) or microseconds <= 0:
        raise ValueError(f"microseconds={microseconds}")
    if plan["kind"] == "decode":
        decode = Decode(_tiles(GemvTiles, plan["up"]), _tiles(GemvTiles, plan["down"]))
        return Measured(decode, microseconds)
    if plan["kind"] != "grouped":
        raise ValueError(f"kind={plan['kind']!r}")
    up, down = _tiles(GemmTiles, plan["up"]), _tiles(GemmTiles, plan["down"])
    return Measured(Grouped(up, down, _positive("programs", plan["programs"])), microseconds)


_Tiles = TypeVar("_Tiles", GemmTiles, GemvTiles)


def _tiles(kind: type[_Tiles], values: Any) -> _Tiles:
    values = dict(values)
    defaults = {f.name: f.default for f in fields(kind)}
    for name, value in values.items():
        if type(defaults.get(name)) is bool:
            if type(value) is not bool:
                raise TypeError(f"{name}={value!r}")
        elif value != defaults.get(name):
            _positive(name, value)
    return kind(**values)


def _positive(name: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise TypeError(f"{name}={value!r}")
    return value


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """While open, no other process writes `file`."""
    # Not on Windows, where there is no Triton either.
    import fcntl

    with open(file.with_name(file.name + ".lock"), "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _replace(file: Path, table: dict[str, Any]) -> None:
    partial = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
    try:
        partial.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


@lru_cache(maxsize=1024)
def _warn(message: str) -> None:
    """Once for each message."""
    warnings.warn(message, stacklevel=2)
