"""JSON as a checkpoint holds it: an object, every key once."""

from __future__ import annotations

import json

_MOST_DIGITS = 30


def parse_object(text: bytes) -> dict[str, object]:
    """The object that UTF-8 text holds. Raises ValueError, its message one phrase, for anything else."""
    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=_each_once, parse_int=_integer)
    except UnicodeDecodeError as e:
        raise ValueError(f"is not UTF-8 (byte {e.start})") from e
    except json.JSONDecodeError as e:
        raise ValueError(f"is not JSON ({e.msg}, at character {e.pos})") from e
    except RecursionError as e:
        raise ValueError("is nested too deeply") from e
    if not isinstance(found, dict):
        raise ValueError("is not a JSON object")
    return found


def _integer(digits: str) -> int:
    """No offset has more digits than this, and Python's own limit says so in other words."""
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"has a number of {len(digits)} digits")
    return int(digits)


def _each_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"names {twice!r} twice")
    return found
