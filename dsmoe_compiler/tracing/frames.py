"""The user's frames on the stack, among those of torch and of this package."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType

import torch

_OURS = str(Path(__file__).parent)
_OUR_CALLERS = str(Path(__file__).parent.parent)
_TORCH = str(Path(torch.__file__).parent)


def user_line() -> str:
    """The innermost "file.py:123" of the user's code that runs now; "" if none does."""
    for frame, _ in _frames():
        if _is_of_user(frame):
            return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
    return ""


def is_of_user(file: str) -> bool:
    """Whether a source file is neither torch's nor part of what traces here."""
    ours = file == contextlib.__file__ or str(Path(file).parent) in (_OURS, _OUR_CALLERS)
    return not ours and not file.startswith((_TORCH, "<"))


def is_branch_of_user() -> bool:
    """Whether what is asked now is an `if` of the user's own, rather than one of an operator's checks."""
    return next((below == "__bool__" for frame, below in _frames() if _is_of_user(frame)), False)


def callers_of_number() -> list[CodeType]:
    """Of an `int(…)` or `len(…)` in the user's code, the function that holds it and those that called it, up
    to the next operator or module; none if what runs now is no such call.
    """
    codes = list[CodeType]()
    for frame, below in _frames():
        if _is_of_user(frame):
            if not codes and below not in ("__int__", "__len__", "__torch_function__"):
                return []
            codes.append(frame.f_code)
        elif codes:
            break
    return codes


def codes_within(outermost: CodeType) -> Iterator[CodeType]:
    """What runs now, from the innermost function out to the one of this code, that one left out."""
    for frame, _ in _frames():
        if frame.f_code is outermost:
            return
        yield frame.f_code


def _frames() -> Iterator[tuple[FrameType, str]]:
    """Frames from here outwards, each with the name of the function that it called."""
    frame: FrameType | None = sys._getframe(1)
    below = ""
    while frame is not None:
        yield frame, below
        below, frame = frame.f_code.co_name, frame.f_back


def _is_of_user(frame: FrameType) -> bool:
    return is_of_user(frame.f_code.co_filename)
