"""How a command ends: its exit status, and one line on stderr when it is not 0."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import click

from dsmoe_compiler.cli.quiet import debugging
from dsmoe_compiler.ir.errors import CaptureError, DsmoeError, ExportError, InputError, NotFused

REFUSED, WRONG_INPUT, INTERNAL, INTERRUPTED = 1, 2, 70, 130
CLOSED_PIPE = 141  # what a shell reports for a program that SIGPIPE ended


class OneLineErrors(click.Group):
    """A group of commands whose errors are one line each, with the exit status of their kind."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """As click's `main`; in standalone mode it never returns and never lets an exception pass."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, False, **extra)
        _tolerate_encodings()
        try:
            status = super().main(args, prog_name, complete_var, False, **extra)
        except click.Abort:
            sys.exit(INTERRUPTED)
        except Exception as error:
            if debugging():
                traceback.print_exc()
            status, line = _explain(error)
            click.echo(f"dsmoe: {line}", err=True)
        sys.exit(status if isinstance(status, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        """As click's, but a reader that went away (`| head`) is neither a refusal nor an internal error, and
        an option without its argument knows its command.
        """
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            command = self.commands.get(ctx.invoked_subcommand or "")
            if error.ctx is None and command is not None:
                error.ctx = click.Context(command, ctx, ctx.invoked_subcommand)
            raise
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
            ctx.exit(CLOSED_PIPE)


def _explain(error: Exception) -> tuple[int, str]:
    """The exit status and the line for an exception."""
    match error:
        case NotFused() | ExportError():
            return REFUSED, _one_line(error)
        case InputError() | CaptureError():
            return WRONG_INPUT, _one_line(error)
        case click.UsageError():
            path = error.ctx.command_path if error.ctx else "dsmoe"
            return WRONG_INPUT, f"{' '.join(error.format_message().split())} Try '{path} --help'."
        case click.ClickException():
            return WRONG_INPUT, " ".join(error.format_message().split())
    name = "" if isinstance(error, DsmoeError) else f"{type(error).__name__}: "
    return INTERNAL, f"internal error: {name}{_one_line(error)} (set DSMOE_DEBUG=1 for the traceback)"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _tolerate_encodings() -> None:
    """Never fail on a character that the terminal cannot show."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure:
            reconfigure(errors="replace")
