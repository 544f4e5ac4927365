"""A module's text as a module: Triton reads the text of functions again, so it has to be found by their
file's name.
"""

from __future__ import annotations

import hashlib
import linecache
from types import ModuleType


def load(text: str) -> ModuleType:
    """The module whose text this is, executed. Tracebacks, debuggers and Triton find its lines."""
    name = f"dsmoe_kernels_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    file = f"<{name}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    module = ModuleType(name)
    module.__file__ = file
    exec(compile(text, file, "exec"), vars(module))
    return module
