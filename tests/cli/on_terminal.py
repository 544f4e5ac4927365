"""What a command prints where stdout is a terminal."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Shown:
    """The bytes of a terminal as text: with colours, and without."""

    coloured: str

    @property
    def plain(self) -> str:
        """Without colours."""
        return re.sub(r"\x1b\[[\d;]*m", "", self.coloured)


def on_terminal(width: int, *arguments: str) -> Shown:
    """`dsmoe ARGUMENTS` on a terminal so many characters wide; it must end well."""
    reader, terminal = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(width), "TERM": "xterm-256color"}
    command = [sys.executable, "-m", "dsmoe_compiler", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=terminal, stderr=subprocess.DEVNULL, env=environment)
    os.close(terminal)
    shown = b""
    while chunk := _read(reader):
        shown += chunk
    os.close(reader)
    assert process.wait() == 0
    return Shown(shown.decode().replace("\r\n", "\n"))


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # how Linux says that the other end is closed
        return b""
