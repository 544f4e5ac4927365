"""The command line: parses, calls the API, prints. Nothing here imports torch before a command needs it."""

from dsmoe_compiler.cli.commands import main

__all__ = ["main"]
