"""The library built from its sources, in a folder of the caller's, by a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from dsmoe_compiler.interrupt import poll
from dsmoe_compiler.runtime.native import extension
from dsmoe_compiler.runtime.native.compiler import COMPILE, Compiler, link_options

_PATIENCE = 0.1  # seconds between looks at whether the user pressed Ctrl-C
_LONGEST = 200  # characters of a reason


class BuildFailed(Exception):
    """Why there is no library, in one line."""


def build(sources: Mapping[str, bytes], compiler: Compiler, folder: Path) -> Path:
    """The library's file, in `folder`, which is the build's alone. Raises BuildFailed."""
    try:
        for name, text in sources.items():
            (folder / name).write_bytes(text)
        code, said = _run(_command(sources), compiler, folder)
    except OSError as e:
        raise BuildFailed(f"the C++ build could not be started ({e.strerror or e})") from e
    built = folder / f"{extension.NAME}.so"
    if code != 0 or not built.is_file():
        raise BuildFailed(f"the C++ build failed: {_reason(said, code)}")
    return built


def _command(sources: Mapping[str, bytes]) -> list[str]:
    request = {
        "sources": [name for name in sources if name.endswith(".cpp")],
        "compile_options": list(COMPILE),
        "link_options": list(link_options()),
    }
    return [sys.executable, "-m", extension.__name__, json.dumps(request)]


def _run(command: list[str], compiler: Compiler, folder: Path) -> tuple[int, str]:
    """(exit status, all it said). Ctrl-C reaches this process alone, which then ends the build's."""
    ours = {
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),
        "LC_ALL": "C",  # the reason is looked for in English
        "TORCH_DONT_CHECK_COMPILER_ABI": "1",  # nothing of torch's C++ is used
        "TORCH_NO_COMPILER_WRAPPER": "1",  # torch sets it anew for each file, for all threads
    }
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, **compiler.environment(), **ours},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        while True:
            try:
                said, _ = process.communicate(timeout=_PATIENCE)
                return process.returncode, said.decode(errors="replace")
            except subprocess.TimeoutExpired:
                poll()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _reason(said: str, code: int) -> str:
    """The first error of the compiler, else the last line that was said."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if "error: " in line.lower() and not line.startswith("error: command")]
    told = (errors or lines[-1:] or [f"the build ended with status {code}"])[0]
    return told if len(told) <= _LONGEST else told[: _LONGEST - 1] + "…"
