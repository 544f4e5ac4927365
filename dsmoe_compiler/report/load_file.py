"""Loads in files: JSON with a format and a version.

    {"format": "dsmoe expert load", "version": 1, "model": "DeepSeekMoEForCausalLM", "layers": […],
     "not_counted": []}

each layer being {"name": "model.layers.1.mlp", "top_k": 4, "counts": [3, 0, …], "dropped": 0}.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dsmoe_compiler.atomic import written_whole
from dsmoe_compiler.ir.errors import InputError
from dsmoe_compiler.report.load import LayerLoad, Load

FORMAT, VERSION = "dsmoe expert load", 1


def save(load: Load, path: str | os.PathLike[str]) -> None:
    """Write a load to a file, all or nothing. Raises InputError when the place cannot be written."""
    record = {"format": FORMAT, "version": VERSION, **asdict(load)}
    with written_whole(Path(path)) as file:
        file.write((json.dumps(record) + "\n").encode())


def read(path: str | os.PathLike[str]) -> Load:
    """The load that `save` wrote. Raises InputError when the file is missing, damaged or something else."""
    try:
        text = Path(path).read_bytes()
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from e
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path}: is no JSON, so no load of experts, or it is damaged; {_REMEDY}") from e
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise InputError(f"{path}: is JSON, but no load of experts; {_REMEDY}")
    if record.get("version") != VERSION:
        raise InputError(
            f"{path}: is a load of version {record.get('version')!r}, this reads {VERSION}; count again"
        )
    return _load(path, record)


_REMEDY = "`with program.count_load() as load: …; load.save(FILE)` writes one"


def _load(path: str | os.PathLike[str], record: dict[str, Any]) -> Load:
    model, entries, left = (record.get(key) for key in ("model", "layers", "not_counted"))
    if not isinstance(model, str) or not isinstance(entries, list) or not isinstance(left, list):
        raise InputError(f"{path}: is damaged: it names no model or no layers; count again")
    layers = tuple(_layer(path, i, entry) for i, entry in enumerate(entries))
    return Load(model, layers, tuple(map(str, left)))


def _layer(path: str | os.PathLike[str], number: int, entry: Any) -> LayerLoad:
    try:
        if not isinstance(entry, dict):
            raise ValueError("it is no object")
        name, top_k, counts, dropped = (entry[key] for key in ("name", "top_k", "counts", "dropped"))
        whole = isinstance(counts, list) and all(type(n) is int for n in (top_k, dropped, *counts))
        if not isinstance(name, str):
            raise ValueError("its name is no text")
        if not whole:
            raise ValueError("a count is no whole number")
        return LayerLoad(name, top_k, tuple(counts), dropped)
    except (KeyError, TypeError, ValueError) as e:
        why = f"it has no {e}" if isinstance(e, KeyError) else str(e)
        raise InputError(f"{path}: is damaged in its layer {number}: {why}; count again") from e
