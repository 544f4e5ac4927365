"""The lines of functions that a forward calls, kept in the graph beside the forward's own.

While it traces, torch keeps of the stack behind each value the frames named "forward", and those of functions
registered with it. Most layers do their routing in functions with names of their own; each is registered when
it first calls an operator, and taken back at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from types import CodeType
from typing import Any

import torch.fx.proxy
from torch.overrides import TorchFunctionMode

from dsmoe_compiler.tracing.frames import codes_within, is_of_user


class HelperFrames(TorchFunctionMode):
    """Enter it around a forward while torch.export traces. Frames outside the code `within` are not kept.

    Without torch's register of functions (before 2.13), the graph has the lines of forwards alone.
    """

    def __init__(self, within: CodeType) -> None:
        super().__init__()
        self._within, self._seen = within, set[CodeType]()
        self._register: set[tuple[str, str]] = getattr(torch.fx.proxy, "_STACK_TRACE_ANCHORS", set())
        self._added = set[tuple[str, str]]()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        for code in codes_within(self._within):
            if code not in self._seen:
                self._seen.add(code)
                self._keep(code)
        return func(*args, **(kwargs or {}))

    def _keep(self, code: CodeType) -> None:
        function = (code.co_filename, code.co_name)
        if is_of_user(code.co_filename) and function not in self._register:
            self._register.add(function)
            self._added.add(function)

    def __exit__(self, *failure: Any) -> None:
        super().__exit__(*failure)  # type: ignore[no-untyped-call]
        self._register.difference_update(self._added)
