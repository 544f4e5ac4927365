"""A callable becomes a graph: `torch.export`, with every size that can vary left to vary.

An example may have a batch or a length of 1 (or 0). Tracing at size 1 would take the branches that models keep for
size 1, so such dimensions are traced at another size; the values of an example never matter to the trace. What was
assumed is checked afterwards by running graph and model on the real example and on a second shape.

The user's object is used as it is and left as it was: attributes set while tracing are taken back, a switched
experts implementation is switched back, whatever way the capture ends.
"""

from __future__ import annotations

import functools
import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.fx.experimental import _config as shapes_config
from torch.utils import _pytree as pytree

from dsmoe_compiler.inputs import CallSignature
from dsmoe_compiler.ir.errors import CaptureError, InputError

CaptureMode = Literal["auto", "as_written"]
# Traced in place of sizes 0 and 1, by dimension: unequal to each other and to the widths models have.
_STAND_IN_SIZES = (3, 7, 5, 11)


@dataclass(frozen=True)
class Captured:
    """A graph of its own (no tensor copied), how to call it, and how it was obtained."""

    exported: ExportedProgram
    call: CallSignature
    how: str


def capture(
    model: Callable[..., Any] | ExportedProgram,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = "auto",
    mode: CaptureMode = "auto",
) -> Captured:
    """Export `model` called as model(*args, **kwargs).

    `mode="auto"` may let a transformers model run its exportable experts implementation while it is traced;
    "as_written" traces what would run. Raises CaptureError naming the line that cannot be captured, InputError when
    `model` is nothing that can be called.
    """
    args, kwargs = tuple(args), dict(kwargs or {})
    if isinstance(model, ExportedProgram):
        return Captured(_own(model), CallSignature.of_exported(model), "exported program")
    module = as_module(model)
    args, kwargs = _on_device_of(module, (args, kwargs))
    call = CallSignature.of_call(module.forward, args, kwargs)
    failures: list[Exception] = []
    for attempt in _attempts(module, args, kwargs, dynamic_shapes, mode):
        try:
            with _preserved(module), attempt.context():
                exported = _export(module, attempt.args, attempt.kwargs, attempt.shapes)
            return Captured(exported, call, attempt.how)
        except Exception as e:  # whatever a model's own code raises while traced
            failures.append(e)
    raise _explain(model, failures[-1]) from failures[-1]


def as_module(model: object) -> nn.Module:
    """The module itself, or a module that calls the function and owns the modules and tensors it closes over."""
    if isinstance(model, nn.Module):
        return model
    if not callable(model):
        raise InputError(f"cannot compile a {type(model).__name__}: give a module, a function or an ExportedProgram")
    return _Function(model)


class _Function(nn.Module):
    """A function as a module: what it closes over is registered, so that its parameters are parameters."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        for name, owned in _closed_over(function).items():
            if isinstance(owned, nn.Module):
                self.add_module(name, owned)
            elif isinstance(owned, nn.Parameter):
                self.register_parameter(name, owned)
            else:
                self.register_buffer(name, owned)

        @functools.wraps(function)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        self.forward = forward


def _closed_over(function: Callable[..., Any]) -> dict[str, nn.Module | Tensor]:
    bound = getattr(function, "__self__", None)
    found: dict[str, object] = {"self": bound} if isinstance(bound, nn.Module) else {}
    while isinstance(function, functools.partial):
        function = function.func
    plain = inspect.unwrap(getattr(function, "__func__", function))
    if inspect.isfunction(plain):
        variables = inspect.getclosurevars(plain)
        found |= {**variables.globals, **variables.nonlocals}
    owner = {name: value for name, value in found.items() if isinstance(value, (nn.Module, Tensor))}
    return {("model" if name == "self" else name): value for name, value in owner.items()}


@dataclass(frozen=True)
class _Attempt:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shapes: Any
    how: str
    context: Callable[[], Any]


def _attempts(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any, mode: CaptureMode
) -> Iterator[_Attempt]:
    """Ways to export, best first: the exportable experts implementation, then as written; sizes of 1 replaced first."""
    switches: list[tuple[str, Callable[[], Any]]] = [("plain export", ExitStack)]
    configs = _configs_with_experts(module) if mode == "auto" else []
    if configs:
        switches.insert(0, ("experts_implementation=grouped_mm", lambda: _experts_implementation(configs, "grouped_mm")))
    for how, context in switches:
        if dynamic_shapes != "auto":
            yield _Attempt(args, kwargs, dynamic_shapes, how, context)
            continue
        for grown_args, grown_kwargs in _grown((args, kwargs)):
            shapes = _every_size((grown_args, grown_kwargs))
            yield _Attempt(grown_args, grown_kwargs, shapes, how, context)


def _export(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any) -> ExportedProgram:
    sizes = shapes_config.patch(backed_size_oblivious=True, use_duck_shape=False)
    with torch.no_grad(), sizes:
        return torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)


def _every_size(example: Any) -> ShapesCollection:
    """Dim.AUTO for every dimension of every tensor."""
    shapes = ShapesCollection()
    for leaf in pytree.tree_leaves(example):
        if isinstance(leaf, Tensor):
            shapes[leaf] = {d: Dim.AUTO for d in range(leaf.dim())}
    return shapes


def _grown(example: tuple[tuple[Any, ...], dict[str, Any]]) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The example with its first two dimensions of size 0 or 1 at other sizes, then only the first, then as it is."""
    seen = set[tuple[object, ...]]()
    for dims in ((0, 1), (0,), ()):
        grown = pytree.tree_map(functools.partial(_stretched, dims=dims), example)
        sizes = tuple(tuple(leaf.shape) for leaf in pytree.tree_leaves(grown) if isinstance(leaf, Tensor))
        if sizes not in seen:
            seen.add(sizes)
            yield grown


def _stretched(leaf: Any, dims: tuple[int, ...]) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    for dim in dims:
        if dim < leaf.dim() and leaf.shape[dim] <= 1:
            leaf = resized(leaf, dim, _STAND_IN_SIZES[dim])
    return leaf


def resized(tensor: Tensor, dim: int, size: int) -> Tensor:
    """The tensor with another size along one dimension: its own values repeated, zeros where it had none."""
    if tensor.shape[dim] == 0:
        return tensor.new_zeros([size if d == dim else s for d, s in enumerate(tensor.shape)])
    return tensor.index_select(dim, torch.arange(size, device=tensor.device) % tensor.shape[dim])


def _on_device_of(module: nn.Module, example: Any) -> Any:
    """A model on the meta device is traced with inputs there."""
    tensors = [*module.parameters(), *module.buffers()]
    if not any(t.is_meta for t in tensors):
        return example
    return pytree.tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, example)


@contextmanager
def _preserved(module: nn.Module) -> Iterator[None]:
    """Every attribute of every submodule is afterwards what it was: tracing leaves fake tensors in caches."""
    before = [(m, dict(m.__dict__), dict(m._parameters), dict(m._buffers), dict(m._modules)) for m in module.modules()]
    try:
        yield
    finally:
        for submodule, *kept in before:
            live = (submodule.__dict__, submodule._parameters, submodule._buffers, submodule._modules)
            for now, then in zip(live, kept, strict=True):
                if now.keys() != then.keys() or any(now[k] is not then[k] for k in then):
                    now.clear()
                    now.update(then)


def _configs_with_experts(module: nn.Module) -> list[Any]:
    """The distinct configurations in the model that choose how its experts run (transformers' convention)."""
    configs = {id(c): c for m in module.modules() if (c := getattr(m, "config", None)) is not None}
    return [c for c in configs.values() if hasattr(c, "_experts_implementation")]


@contextmanager
def _experts_implementation(configs: list[Any], name: str) -> Iterator[None]:
    before = [(c, c._experts_implementation) for c in configs]
    try:
        for c in configs:
            c._experts_implementation = name
        yield
    finally:
        for c, chosen in before:
            c._experts_implementation = chosen


def _own(program: ExportedProgram) -> ExportedProgram:
    """The same program with a graph of its own and the same tensors."""
    graph_module = torch.fx.GraphModule(program.graph_module, torch.fx.Graph())
    graph_module.graph.output(graph_module.graph.graph_copy(program.graph, {}))
    graph_module.meta = dict(program.graph_module.meta)
    return ExportedProgram(
        root=graph_module,
        graph=graph_module.graph,
        graph_signature=program.graph_signature,
        state_dict=program.state_dict,
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=program.verifiers,
    )


def _explain(model: object, failure: Exception) -> CaptureError:
    """One line: what could not be captured, on which line of the user's code, and what to do."""
    name = type(model).__name__ if isinstance(model, nn.Module) else getattr(model, "__name__", str(model))
    reason = next((line.strip() for line in str(failure).splitlines() if line.strip()), type(failure).__name__)
    frames = traceback.extract_tb(failure.__traceback__)
    own = [f for f in frames if "/torch/" not in f.filename and not _is_ours(f.filename)]
    where = f" at {Path(own[-1].filename).name}:{own[-1].lineno} (`{own[-1].line}`)" if own else ""
    hint = "the graph may not depend on the values of tensors: remove the branch or the loop over data"
    if "data-dependent" not in str(failure).lower() and "DataDependent" not in type(failure).__name__:
        hint = "call the model eagerly with these inputs first; if that works, pass dynamic_shapes of your own"
    return CaptureError(f"cannot capture {name}{where}: {reason[:200]}; {hint}")


def _is_ours(filename: str) -> bool:
    return filename == __file__
