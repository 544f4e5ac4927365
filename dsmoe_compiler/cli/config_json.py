"""The config.json of a folder with a model."""

from __future__ import annotations

from pathlib import Path

from dsmoe_compiler.checkpoint.strict_json import parse_object
from dsmoe_compiler.ir.errors import InputError


def read_config(folder: Path) -> dict[str, object]:
    """Its fields. Raises InputError where there is none, or it is no JSON object."""
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"hf:{folder}: no config.json in {folder}; name a folder that transformers saved")
    try:
        return parse_object(path.read_bytes())
    except ValueError as e:
        raise InputError(f"{path}: {e}; fetch the file again") from e
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror or e})") from e
