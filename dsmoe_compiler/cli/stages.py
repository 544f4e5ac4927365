"""What a command is doing right now, on stderr: stdout belongs to its answer."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import TextIO, TypeAlias

import click

from dsmoe_compiler.cli.quiet import quiet
from dsmoe_compiler.interrupt import Deferred

PATIENCE_SECONDS = 2.0
Stage: TypeAlias = Callable[[str], None]


@contextlib.contextmanager
def stages() -> Iterator[Stage]:
    """A context for long work; what it yields says that a stage begins: `stage("capture")`.

    On a terminal a spinner names the stage and its seconds. Elsewhere a line a stage, and none at all when
    everything is over within `PATIENCE_SECONDS`. Nothing else is printed meanwhile.
    """
    show = _spinner if sys.stderr.isatty() else _lines
    with show(sys.stderr) as stage, quiet():
        yield stage


def load_modules(stage: Stage, *modules: str) -> None:
    """Import what takes seconds, as a stage of its own. Ctrl-C waits for the end: broken off in there it may
    get lost, or come out as another error.
    """
    stage("load torch")
    with Deferred():
        for name in modules:
            import_module(name)


@contextlib.contextmanager
def _spinner(stderr: TextIO) -> Iterator[Stage]:
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    progress = Progress(
        *columns, console=Console(file=stderr), transient=True, redirect_stdout=False, redirect_stderr=False
    )
    task = progress.add_task("", total=None)
    with progress:
        yield lambda name: progress.reset(task, description=name)


@contextlib.contextmanager
def _lines(stderr: TextIO) -> Iterator[Stage]:
    lines = _Lines(stderr)
    timer = threading.Timer(PATIENCE_SECONDS, lines.lose_patience)
    timer.daemon = True
    timer.start()
    try:
        yield lines.begin
    finally:
        timer.cancel()


class _Lines:
    """Stages begun before the patience is over are not told, except the one that outlasts it."""

    def __init__(self, stderr: TextIO) -> None:
        self._stderr = stderr
        self._lock = threading.Lock()
        self._stage = ""
        self._late = False

    def begin(self, name: str) -> None:
        with self._lock:
            self._stage = name
            if self._late:
                self._tell()

    def lose_patience(self) -> None:
        with self._lock:
            self._late = True
            if self._stage:
                self._tell()

    def _tell(self) -> None:
        click.echo(f"stage {self._stage}", file=self._stderr)
