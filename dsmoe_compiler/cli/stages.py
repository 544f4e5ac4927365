"""What a command is doing right now, on stderr: stdout belongs to its answer."""

from __future__ import annotations

import sys
import threading
from types import TracebackType

import click

PATIENCE_SECONDS = 2.0


class Stages:
    """A context in which `stages(name)` says that a stage begins.

    On a terminal a spinner names the stage and its seconds. Elsewhere a line a stage, and none at all when
    everything is over within `PATIENCE_SECONDS`.
    """

    def __init__(self) -> None:
        self._shown: _Spinner | _Lines = _Spinner() if sys.stderr.isatty() else _Lines()

    def __call__(self, name: str) -> None:
        self._shown.begin(name)

    def __enter__(self) -> Stages:
        self._shown.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._shown.stop()


class _Spinner:
    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._progress.add_task("", total=None)

    def start(self) -> None:
        self._progress.start()

    def begin(self, name: str) -> None:
        self._progress.reset(self._task, description=name)

    def stop(self) -> None:
        self._progress.stop()


class _Lines:
    """Stages begun before the patience is over are not told, except the one that outlasts it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stage = ""
        self._late = False
        self._timer = threading.Timer(PATIENCE_SECONDS, self._lose_patience)
        self._timer.daemon = True

    def start(self) -> None:
        self._timer.start()

    def begin(self, name: str) -> None:
        with self._lock:
            self._stage = name
            if self._late:
                self._tell()

    def stop(self) -> None:
        self._timer.cancel()

    def _lose_patience(self) -> None:
        with self._lock:
            self._late = True
            if self._stage:
                self._tell()

    def _tell(self) -> None:
        click.echo(f"stage {self._stage}", err=True)
