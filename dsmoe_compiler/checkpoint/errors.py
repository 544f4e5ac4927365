"""What a folder of weights can be wrong in."""

from __future__ import annotations

from pathlib import Path

from dsmoe_compiler.ir.errors import InputError


class CheckpointError(InputError):
    """The files of a checkpoint are damaged, or are not the model's; one line that names file and tensor."""


def damaged(path: Path, what: str) -> CheckpointError:
    """The error for a file whose own bytes contradict each other."""
    return CheckpointError(f"{path}: {what}; fetch the file again")
