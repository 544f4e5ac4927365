"""Where a user's own files lie that can be made again: measured plans, the built library."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache() -> Path:
    """`dsmoe` in `$XDG_CACHE_HOME`, else in `~/.cache`; it need not exist."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    # A relative path there is to be ignored (XDG base directory specification).
    cache = Path(named) if os.path.isabs(named) else Path(os.path.expanduser("~")) / ".cache"
    return cache / "dsmoe"
