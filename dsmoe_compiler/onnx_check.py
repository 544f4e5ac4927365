"""A written ONNX model, run by onnxruntime, against the program it was made of."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor
from torch.export.graph_signature import OutputKind, TensorArgument
from torch.utils._python_dispatch import TorchDispatchMode

from dsmoe_compiler.export.onnx.contrib_exact import without_kernels
from dsmoe_compiler.export.onnx.model import LayerForm, Weights
from dsmoe_compiler.ir import ops
from dsmoe_compiler.ir.errors import ExportError
from dsmoe_compiler.onnx_rounded import with_rounded_experts
from dsmoe_compiler.program import Program
from dsmoe_compiler.replay import Call, replay
from dsmoe_compiler.validate import relative_error

_ROUNDED = 0.25  # of the outputs' norm: 8-bit rows are off by 1e-2 a layer, another layout by 1
_FAR = 1e-3  # of a layer's largest number: past what orders of summation explain in float32


def check(
    program: Program, path: Path, layers: Sequence[LayerForm], example: Call, weights: Weights | None
) -> float:
    """The largest relative error on the example; on other sizes and at size 1 what `replay` allows. The
    program runs on the weights that were written: those of experts rounded as `weights` says.

    Raises ExportError where onnxruntime does not run the model, or gives other numbers.
    """
    if weights:
        program = with_rounded_experts(program, weights)
    rounds_rows = any(layer.form == "QMoE" for layer in layers)
    with without_kernels(path) if rounds_rows else nullcontext(path) as exact:
        replayed = replay(program, _Session(program, exact), program.inputs, example)
        if replayed.wrong:
            found = _first_layer(program, exact, layers, example)
            where = f"; the first layer that differs is {found}" if found else "; every MoE layer is right"
            raise ExportError(
                f"{path} was written, but in onnxruntime it gives other numbers than the program on "
                f"{replayed.wrong}{where}"
            )
        if rounds_rows:
            _check_kernels(program, path, exact, example)
    return replayed.error or 0.0


def _check_kernels(program: Program, path: Path, exact: Path, example: Call) -> None:
    """Raises ExportError where kernels that round rows to 8 bits are off by more than that explains."""
    flat = [v for v in program.inputs.flat(*example) if isinstance(v, Tensor)]
    for ours, theirs in zip(_runner(path)(flat), _runner(exact)(flat), strict=True):
        if theirs.is_floating_point() and theirs.numel():
            off = float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))
            if not off <= _ROUNDED:
                raise ExportError(
                    f"{path} was written, but onnxruntime's kernel for quantised experts is off by {off:.1e}"
                )


class _Session:
    """A model in onnxruntime, called as the program is."""

    def __init__(self, program: Program, path: Path) -> None:
        self._program, self._run = program, _runner(path)
        specs = program.exported.graph_signature.output_specs
        ends = [spec.arg for spec in specs if spec.kind is OutputKind.USER_OUTPUT]
        self._are_tensors = [isinstance(end, TensorArgument) for end in ends]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        flat = [v for v in self._program.inputs.flat(args, kwargs) if isinstance(v, Tensor)]
        values = zip(self._run(flat), self._are_tensors, strict=True)
        return self._program.outputs.build([value if tensor else value.item() for value, tensor in values])


def _runner(path: Path) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """Calls the model at `path`. Raises ExportError where onnxruntime cannot load it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # Else products of quantised weights round the rows too: faster, and another model.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as e:  # its bindings raise classes of their own
        reason = str(e).splitlines()[0][:200]
        raise ExportError(
            f"{path} was written, but onnxruntime {onnxruntime.__version__} cannot load it: {reason}; "
            "verify=False leaves it unchecked"
        ) from e
    if any(end.type == "tensor(bfloat16)" for end in (*session.get_inputs(), *session.get_outputs())):
        raise ExportError(
            f"{path} was written, but cannot be checked: inputs or outputs are bfloat16, which NumPy lacks; "
            "verify=False leaves it unchecked"
        )
    names = [given.name for given in session.get_inputs()]

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        feeds = dict(zip(names, (t.detach().numpy() for t in tensors), strict=True))
        return [torch.from_numpy(np.asarray(value)) for value in session.run(None, feeds)]

    return run


def _first_layer(program: Program, path: Path, layers: Sequence[LayerForm], example: Call) -> str:
    """The first layer whose output differs on the example; "" if none does."""
    flat = program.inputs.flat(*example)
    with torch.no_grad(), _LayerOutputs() as expected:
        program.exported.module(check_guards=False)(*example[0], **example[1])
    for layer, theirs, ours in zip(layers, expected.outputs, _values(path, layers, flat), strict=False):
        if ours.shape != theirs.shape or not relative_error(ours, theirs) <= _FAR:
            return layer.name or "the model itself"
    return ""


class _LayerOutputs(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered, keeps what the layers' ops give."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.outputs: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (ops.MOE, ops.EXPERTS):
            self.outputs.append(result)
        return result


def _values(path: Path, layers: Sequence[LayerForm], flat: Sequence[Any]) -> list[Tensor]:
    """What the layers give in the model at `path`: it is read once more with these as its outputs."""
    model = ir.load(path)
    by_name = {value.name: value for node in model.graph for value in node.outputs}
    model.graph.outputs[:] = [by_name[layer.output] for layer in layers]
    beside = path.with_name(f".{secrets.token_hex(8)}.onnx")
    try:
        ir.save(model, beside)  # its weights stay in the file they are in
        return _runner(beside)([v for v in flat if isinstance(v, Tensor)])
    finally:
        beside.unlink(missing_ok=True)
