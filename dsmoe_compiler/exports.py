"""export_onnx and export_mlir: a model, or a program compiled from it, in other compilers' formats."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from dsmoe_compiler import __version__
from dsmoe_compiler.api import Model, check_choices, compile, require_call
from dsmoe_compiler.interrupt import Deferred
from dsmoe_compiler.ir.errors import InputError
from dsmoe_compiler.ir.randomness import is_random
from dsmoe_compiler.pipeline import Progress
from dsmoe_compiler.program import Program
from dsmoe_compiler.turns import TURN

if TYPE_CHECKING:
    from dsmoe_compiler.export.mlir.write import Dialect
    from dsmoe_compiler.export.onnx.model import LayerForm
    from dsmoe_compiler.export.onnx.quantized_matrix import LayerError

Target = Literal["standard", "ort"]
Weights = Literal["int8", "int4"]
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnx_ir")


@dataclass(frozen=True)
class Exported:
    """What lies in the files: `path` and, where the model has weights, `data` beside it; what each layer
    became; `error`, the largest relative error onnxruntime showed against the program, with the weights that
    were written (None: not verified, as a program that draws random numbers cannot be); what quantising did
    to the matrices of each product.
    """

    path: Path
    data: Path | None
    target: Target
    weights: Weights | None
    opset: int
    nodes: int
    layers: tuple[LayerForm, ...]
    error: float | None
    quantized: tuple[LayerError, ...] = ()

    @property
    def graph_bytes(self) -> int:
        """Of the model's own file."""
        return self.path.stat().st_size

    @property
    def data_bytes(self) -> int:
        """Of the weights' file."""
        return self.data.stat().st_size if self.data else 0


def export_onnx(
    model_or_program: Model | Program,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    path: str | os.PathLike[str],
    target: Target = "standard",
    dynamic_shapes: Any = "auto",
    weights: Weights | None = None,
    verify: bool = True,
    progress: Progress | None = None,
) -> Exported:
    """Write the model as optimised ONNX: `path`, and its weights in `path`.data beside it.

    Args:
        model_or_program: what `compile` takes, with an example call; or a compiled program, of which an
            example is needed only to verify, and made up where none is given.
        target: "standard" is plain ai.onnx, for any runtime. "ort" runs layers by onnxruntime's own
            `com.microsoft::MoE` where it can express them, and says where it cannot.
        dynamic_shapes: as for `compile`; of a program they are settled.
        weights: "int8" or "int4" for the experts' matrices, in blocks of 32 with a scale each; None: as they
            are.
        verify: run the written model in onnxruntime against the program, at three shapes.
        progress: called with the name of each stage when it begins.

    Raises:
        InputError: the arguments are not what is described here, a package is missing (the extra `onnx`), or
            the place cannot be written. CaptureError: as `compile`.
        ExportError: torch cannot translate the model, or onnxruntime gives other numbers: the files are
            left, and the message names the layer.
    """
    check_choices(target=(target, get_args(Target)), weights=(weights, (None, *get_args(Weights))))
    _require_packages((*_ONNX_PACKAGES, *(("onnxruntime",) if verify else ())))
    from dsmoe_compiler.export.onnx.model import make
    from dsmoe_compiler.export.onnx.write import data_path, require_place, write
    from dsmoe_compiler.onnx_check import check

    path = Path(path)
    if path.is_symlink():  # runtimes look for the weights beside the file itself
        path = Path(os.path.realpath(path))
    require_place(path)
    stage = progress or (lambda name: None)
    program, example = _program(model_or_program, args, kwargs, dynamic_shapes, progress)
    stage("export")
    with TURN, Deferred():
        made = make(
            program.exported,
            names={layer.op: layer.name for layer in program.report.layers if layer.fused},
            inputs=program.inputs.names(),
            outputs=program.outputs.names(),
            target=target,
            weights=weights,
            metadata=_metadata(program, target, weights),
        )
    stage("write")
    with Deferred():
        write(made.model, path)
    data = data_path(path)
    exported = Exported(
        path,
        data if data.exists() else None,
        target,
        weights,
        made.model.opset_imports[""],
        sum(1 for _ in made.model.graph),
        _all_layers(program, made.layers),
        None,
        made.errors(),
    )
    if not verify or is_random(program.exported):
        return exported
    stage("check")
    return replace(exported, error=check(program, path, made.layers, example, weights))


def export_mlir(
    model_or_program: Model | Program,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    path: str | os.PathLike[str] | None = None,
    dialect: Dialect = "torch",
    weights: bool = False,
    dynamic_shapes: Any = "auto",
    progress: Progress | None = None,
) -> str:
    """The model as the text of one MLIR function, also written to `path`.

    "torch" keeps each fused layer as one `torch.operator "torch.dsmoe.moe"`; "linalg" lowers everything to
    linalg on tensors. `weights`: their bytes too; without them a text can be read but not run. Other
    arguments as for `export_onnx`.

    Raises InputError when torch-mlir is not installed (the extra `mlir`), cannot express or lower something,
    or `path` cannot be written. CaptureError: as `compile`.
    """
    from dsmoe_compiler.export.mlir.write import export_mlir as write_mlir

    program, _ = _program(model_or_program, args, kwargs, dynamic_shapes, progress)
    if progress:
        progress("export")
    with TURN, Deferred():
        return write_mlir(program.exported, path=path, dialect=dialect, weights=weights)


def _program(
    model: Model | Program,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    dynamic_shapes: Any,
    progress: Progress | None,
) -> tuple[Program, tuple[tuple[Any, ...], dict[str, Any]]]:
    """The program, and an example call of it."""
    require_call(args, kwargs)
    if not isinstance(model, Program):
        program = compile(
            model, args, kwargs, dynamic_shapes=dynamic_shapes, backend="cpu", progress=progress
        )
    elif dynamic_shapes != "auto":
        raise InputError("a compiled program's shapes are settled: give dynamic_shapes when you compile it")
    else:
        program = model
    example = (tuple(args), dict(kwargs or {})) if args or kwargs else program.exported.example_inputs
    return program, example or program.inputs.made_up()


def _all_layers(program: Program, fused: Sequence[LayerForm]) -> tuple[LayerForm, ...]:
    """What became of every layer, in execution order; those that were not fused are as they were written."""
    from dsmoe_compiler.export.onnx.model import LayerForm

    forms = iter(fused)
    return tuple(
        next(forms) if layer.fused else LayerForm(layer.name, "as written", str(layer.refusal), "")
        for layer in program.report.layers
    )


def _metadata(program: Program, target: str, weights: str | None) -> dict[str, str]:
    """What an exported model says of itself, as text."""
    layers = [layer for layer in program.report.layers if layer.fused and layer.spec]
    return {
        "dsmoe.producer": f"dsmoe_compiler {__version__}",
        "dsmoe.model": program.report.model,
        "dsmoe.target": target,
        "dsmoe.weights": weights or "as they are",
        **{f"dsmoe.layer.{layer.name}": layer.spec.text for layer in layers if layer.spec},
    }


def _require_packages(names: Sequence[str]) -> None:
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise InputError(
            f"ONNX export needs {', '.join(missing)}: pip install 'dsmoe-compiler[onnx]'"
            + (" (or give verify=False)" if missing == ["onnxruntime"] else "")
        )
