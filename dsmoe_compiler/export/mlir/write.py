"""The MLIR text of a fused program."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from torch.export import ExportedProgram

from dsmoe_compiler.atomic import written_whole
from dsmoe_compiler.ir.errors import InputError

if TYPE_CHECKING:
    import os

Dialect = Literal["torch", "linalg"]

# A text without weights leaves out constants of more elements than this, and the bytes of every resource, for
# which MLIR prints an empty section.
_FEW = 16
_NO_BYTES = "\n{-#\n\n#-}\n"


def export_mlir(
    exported: ExportedProgram,
    *,
    path: str | os.PathLike[str] | None = None,
    dialect: Dialect = "torch",
    weights: bool = False,
) -> str:
    """The program as one MLIR function `main` of its inputs that are tensors; also written to `path`.

    "torch" keeps each fused layer as one `torch.operator "torch.dsmoe.moe"` (or `…experts`, `…route`) with
    its spec, sizes that vary bound to symbols. "linalg" spells the layers in gathers and matrix products and
    lowers everything to linalg on tensors. Every weight is a `dense_resource` of its own name; its bytes
    follow only with `weights` (in hexadecimal: twice their size, in memory too), and a text without them can
    be read and parsed but not run.

    Raises InputError when torch-mlir is not installed, cannot express or lower something in the program, or
    `path` cannot be written.
    """
    if dialect not in get_args(Dialect):
        raise InputError(f"dialect={dialect!r}: choose one of {', '.join(map(repr, get_args(Dialect)))}")
    try:
        from dsmoe_compiler.export.mlir.lower import in_linalg, in_torch
    except ModuleNotFoundError as e:
        if (e.name or "").partition(".")[0] != "torch_mlir":
            raise
        raise InputError(
            'MLIR is made by torch-mlir, which is not installed: pip install "dsmoe-compiler[mlir]"'
        ) from e
    module = in_torch(exported) if dialect == "torch" else in_linalg(exported)
    limits = (None, None) if weights else (_FEW, 0)
    text: str = module.operation.get_asm(large_elements_limit=limits[0], large_resource_limit=limits[1])
    text = text.removesuffix(_NO_BYTES)
    if path is not None:
        with written_whole(Path(path)) as file:
            file.write(text.encode())
    return text
