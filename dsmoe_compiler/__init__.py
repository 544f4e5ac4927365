"""A compiler for Mixture-of-Experts models: capture, understand, fuse, check, run.

    import dsmoe_compiler as dsmoe
    program = dsmoe.compile(model, (input_ids,))
    program(input_ids)
    print(program.report)
"""

from dsmoe_compiler.api import compile, inspect
from dsmoe_compiler.ir.errors import CaptureError, DsmoeError, InputError, LoadError, NotFused, Refusal, ShapeError
from dsmoe_compiler.ir.spec import ExpertsSpec, MoESpec, RouterSpec, SharedSpec
from dsmoe_compiler.program import Program, load
from dsmoe_compiler.report.report import LayerReport, PassReport, Report

__version__ = "0.1.0"

__all__ = [
    "CaptureError",
    "DsmoeError",
    "ExpertsSpec",
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
    "inspect",
    "load",
]
