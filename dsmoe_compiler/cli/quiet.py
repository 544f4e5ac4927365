"""A command's reader hears the command, not what torch, a library or the user's model prints meanwhile."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator


def debugging() -> bool:
    """Whether the user asked to see everything."""
    return bool(os.environ.get("DSMOE_DEBUG"))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """While open, prints, warnings and log lines go nowhere; with DSMOE_DEBUG=1, all of them to stderr."""
    with contextlib.ExitStack() as stack:
        if debugging():
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
            yield
            return
        for redirect in (contextlib.redirect_stdout, contextlib.redirect_stderr):
            stack.enter_context(redirect(io.StringIO()))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.CRITICAL)
        yield
