"""A compiler for Mixture-of-Experts models: capture, understand, fuse, check, run.

    import dsmoe_compiler as dsmoe
    program = dsmoe.compile(model, (input_ids,))
    program(input_ids)
    print(program.report)

Names are loaded when they are first used, so that the command line can answer `--help` without loading torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsmoe_compiler.api import compile, cost, inspect
    from dsmoe_compiler.cost_model.cost import Cost
    from dsmoe_compiler.exports import Exported, export_mlir, export_onnx
    from dsmoe_compiler.ir.errors import (
        CaptureError,
        DsmoeError,
        ExportError,
        InputError,
        LoadError,
        NotFused,
        Refusal,
        ShapeError,
    )
    from dsmoe_compiler.ir.spec import ExpertsSpec, MoESpec, RouterSpec, SharedSpec
    from dsmoe_compiler.program import Program, load
    from dsmoe_compiler.report.report import LayerReport, PassReport, Report

__version__ = "0.1.0"

_HOMES = {
    "api": ("compile", "cost", "inspect"),
    "cost_model.cost": ("Cost",),
    "exports": ("Exported", "export_mlir", "export_onnx"),
    "ir.errors": (
        "CaptureError",
        "DsmoeError",
        "ExportError",
        "InputError",
        "LoadError",
        "NotFused",
        "Refusal",
        "ShapeError",
    ),
    "ir.spec": ("ExpertsSpec", "MoESpec", "RouterSpec", "SharedSpec"),
    "program": ("Program", "load"),
    "report.report": ("LayerReport", "PassReport", "Report"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "CaptureError",
    "Cost",
    "DsmoeError",
    "ExpertsSpec",
    "ExportError",
    "Exported",
    "InputError",
    "LayerReport",
    "LoadError",
    "MoESpec",
    "NotFused",
    "PassReport",
    "Program",
    "Refusal",
    "Report",
    "RouterSpec",
    "ShapeError",
    "SharedSpec",
    "compile",
    "cost",
    "export_mlir",
    "export_onnx",
    "inspect",
    "load",
]


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # An import that Ctrl-C breaks off leaves modules without their parts, for good.
    with import_module(f"{__name__}.interrupt").Deferred():
        found = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
