"""Ctrl-C obeyed where an exception does no harm.

KeyboardInterrupt may be raised between any two instructions of Python: also inside a context manager's
`__exit__` before it has put anything back, or in a callback that C++ does not expect to fail. torch.export
consists of such places (it patches `nn.Module`, keeps modes and flags), and so do `with torch.no_grad()` and
our own put-backs. Guarding one of them leaves the others. So while `Deferred` is entered, a signal is only
noted, and is obeyed

- where the code that was interrupted is a model's own `forward`, or at the entry of the next one: there the
  exception is one that the model might have raised itself;
- at the next `poll()`, which stands between stages, layers and blocks of a file;
- when `Deferred` ends, and then always;
- at once when the user insists with a second Ctrl-C: torch may then be left as the exception found it.

Signals reach the main thread only; elsewhere all this does nothing.
"""

from __future__ import annotations

import functools
import inspect
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from types import CodeType, FrameType, TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch is imported under the guard of this module
    from torch import nn

_Previous = Callable[[int, FrameType | None], Any]


class Deferred:
    """While entered, SIGINT waits for a place where it can be obeyed; `entries` are functions at whose entry
    it can.
    """

    def __init__(self, entries: Iterable[CodeType] = ()) -> None:
        self._entries = frozenset(entries)
        self._waiting: _Waiting | None = None

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        previous = signal.getsignal(signal.SIGINT)
        if callable(previous) and not isinstance(previous, _Waiting):
            self._waiting = _Waiting(previous, self._entries)
            signal.signal(signal.SIGINT, self._waiting)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        waiting = self._waiting
        if waiting is None:
            return
        waiting.untrace()
        if signal.getsignal(signal.SIGINT) is self._waiting:  # nobody else has set another
            signal.signal(signal.SIGINT, waiting.previous)
        # From here on a signal has its usual effect, and nothing is left to be undone.
        if waiting.noted and (error is None or error is not waiting.raised):
            waiting.obey()


class _Waiting:
    """A handler of SIGINT that notes the signal, and calls the previous handler when it is time."""

    def __init__(self, previous: _Previous, entries: frozenset[CodeType]) -> None:
        self.previous, self.entries = previous, entries
        self.noted = False
        self.raised: BaseException | None = None

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        insists, self.noted = self.noted, True
        if insists or (frame is not None and frame.f_code in self.entries):
            self.obey()
        elif self.entries and sys.gettrace() is None:  # a debugger keeps its trace
            sys.settrace(self.trace)

    def trace(self, frame: FrameType, event: str, _argument: object) -> None:
        """Called by the interpreter at every call once a signal was noted."""
        if event == "call" and frame.f_code in self.entries:
            self.untrace()
            if self.noted:
                self.obey()

    def untrace(self) -> None:
        """Let calls be calls again."""
        if sys.gettrace() == self.trace:
            sys.settrace(None)

    def obey(self) -> None:
        """What the signal would have done; it stays noted while the exception may still be swallowed."""
        try:
            self.previous(signal.SIGINT, sys._getframe(1))
        except BaseException as e:
            self.raised = e
            raise
        self.noted = False


def poll() -> None:
    """Obey a Ctrl-C that was noted: nothing may be half-done here that the caller does not undo."""
    waiting = signal.getsignal(signal.SIGINT)
    if (
        isinstance(waiting, _Waiting)
        and waiting.noted
        and threading.current_thread() is threading.main_thread()
    ):
        waiting.obey()


def forwards(module: nn.Module) -> frozenset[CodeType]:
    """The code of every forward in a model, and of the function that a module made of one calls."""
    called = [f for part in module.modules() for f in (part.forward, getattr(part, "_function", None))]
    return frozenset(code for f in called if isinstance(code := _code(f), CodeType))


def _code(function: object) -> object:
    """Of what the decorators and partial applications around it end in calling."""
    if isinstance(function, functools.partial):
        return _code(function.func)
    unwrapped = inspect.unwrap(function) if callable(function) else function
    return getattr(unwrapped, "__code__", None) if unwrapped is function else _code(unwrapped)
