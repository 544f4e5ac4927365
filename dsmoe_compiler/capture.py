"""A callable becomes a graph: `torch.export`, with every size that can vary left to vary.

An example may have a batch or a length of 1 (or 0). Tracing at size 1 would take the branches that models
keep for size 1, so such dimensions are traced at another size; the values of an example never matter to the
trace. What was assumed is checked afterwards by running graph and model on the real example and on a second
shape.

The user's object is used as it is and left as it was: attributes set while tracing are taken back, a switched
experts implementation is switched back, whatever way the capture ends.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import CodeType
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.export.graph_signature import ExportGraphSignature, InputSpec, OutputSpec
from torch.fx import Node
from torch.fx.experimental import _config as shapes_config
from torch.utils import _pytree as pytree

from dsmoe_compiler.functions import as_module
from dsmoe_compiler.inputs import CallSignature, Inputs
from dsmoe_compiler.ir.errors import CaptureError, InputError
from dsmoe_compiler.outputs import Structure
from dsmoe_compiler.preserve import preserved, values_kept
from dsmoe_compiler.quiet import silenced
from dsmoe_compiler.resize import resized
from dsmoe_compiler.tracing.assumption import Assumption
from dsmoe_compiler.tracing.conversions import keep_in_place
from dsmoe_compiler.tracing.frames import is_of_user
from dsmoe_compiler.tracing.helper_frames import HelperFrames
from dsmoe_compiler.tracing.sizes import sizes_assumed
from dsmoe_compiler.tracing.symbolic_int import Codes, keep_symbolic
from dsmoe_compiler.tracing.unrolling import Unrolling

CaptureMode = Literal["auto", "as_written"]
_Spec = TypeVar("_Spec", InputSpec, OutputSpec)
Example = tuple[tuple[Any, ...], dict[str, Any]]
# Traced in place of sizes 0 and 1: unequal to each other and to the widths models have.
_BATCH, _LENGTH = 3, 7
# By rank, the dimensions whose sizes of 0 and 1 are replaced, and whether other sizes of 1 stay: (batch,
# length, …) first; then masks (batch, heads, length, length) broadcast over heads; then less and less.
_STAND_INS: tuple[tuple[Callable[[int], Mapping[int, int]], bool], ...] = (
    (lambda rank: {0: _BATCH, 1: _LENGTH}, False),
    (lambda rank: {0: _BATCH, 1: _LENGTH} if rank < 4 else {0: _BATCH, 2: _LENGTH, 3: _LENGTH}, True),
    (lambda rank: {0: _BATCH}, True),
    (lambda rank: {}, True),
    (lambda rank: {}, False),
)
# Where torch's tracer tells at length what the raised exception says as well.
_TALKATIVE = (
    "torch.fx.experimental.symbolic_shapes",
    "torch._subclasses.fake_tensor",
    "torch._export.non_strict_utils",
)


@dataclass(frozen=True)
class Captured:
    """A graph of its own (no tensor copied) that returns a flat tuple, how to call it, what its outputs
    become, how it was obtained, and what tracing took for granted of the user's code."""

    exported: ExportedProgram
    call: CallSignature
    outputs: Structure
    how: str
    assumed: tuple[Assumption, ...] = ()


def capture(
    model: Callable[..., Any] | ExportedProgram,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = "auto",
    mode: CaptureMode = "auto",
    exact: bool = False,
) -> Captured:
    """Export `model` called as model(*args, **kwargs).

    `mode="auto"` may let a transformers model run its exportable experts implementation while it is traced;
    "as_written" traces what would run. Without `exact`, sizes 0 and 1 are taken to behave as others do, until
    a replay says otherwise; dynamic shapes of the user's own are always held to. Raises CaptureError naming
    the line that cannot be captured, InputError when `model` is nothing that can be called or the arguments
    do not fit it.
    """
    if isinstance(model, ExportedProgram):
        captured = _own(model)
        if args or kwargs:
            Inputs(captured.exported, captured.call).bind(args, kwargs or {})
        return captured
    module = as_module(model)
    example = _unlike(_on_device_of(module, (tuple(args), dict(kwargs or {}))))
    call = replace(CallSignature.of_call(module.forward, *example), exact=exact or dynamic_shapes != "auto")
    failures: list[Exception] = []
    for attempt in _attempts(module, example, dynamic_shapes, mode):
        try:
            exported, outputs, assumed = _traced_as_written(module, attempt)
            Inputs(exported, call).bind(*example)
            return Captured(exported, call, outputs, attempt.how(assumed), assumed)
        except CaptureError:
            raise
        except Exception as e:  # whatever a model's own code raises while traced
            failures.append(e)
    what_to_do = "try an example of other sizes or dtypes, or dynamic_shapes of your own"
    if dynamic_shapes != "auto":
        what_to_do = 'correct dynamic_shapes, or leave it "auto"'
    raise _explain(model, module, example, failures[-1], what_to_do) from failures[-1]


@dataclass(frozen=True)
class _Attempt:
    """One way to export: the example to trace with, its dynamic shapes, and the experts implementation to
    switch to.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shapes: Any
    experts: str | None

    def how(self, assumed: tuple[Assumption, ...]) -> str:
        """For the report."""
        way = f"experts_implementation={self.experts}" if self.experts else "plain export"
        return f"{way}, loops over data unrolled" if assumed else way


def _attempts(
    module: nn.Module, example: Example, dynamic_shapes: Any, mode: CaptureMode
) -> Iterator[_Attempt]:
    """Ways to export, best first: the exportable experts implementation, then as written; sizes of 1
    replaced first.
    """
    switchable = mode == "auto" and any(hasattr(c, "_experts_implementation") for c in _configs(module))
    for experts in ("grouped_mm", None) if switchable else (None,):
        if dynamic_shapes != "auto":
            yield _Attempt(*example, dynamic_shapes, experts)
            continue
        for grown, shapes in _grown(example):
            yield _Attempt(*grown, shapes, experts)


class _Stopped(Exception):
    """Carries what a forward raised past torch.export, which prints the graph of a data-dependent error
    it sees.
    """


_Traced: TypeAlias = tuple[ExportedProgram, Structure, tuple[Assumption, ...]]


def _traced_as_written(module: nn.Module, attempt: _Attempt) -> _Traced:
    """Loops over hit experts go over every index, all but the last where there are fewer weights; functions
    that make a number of a size that varies are traced once more with a symbol.
    """
    traced: _Traced | None = None
    symbolic, skip_last = set[CodeType](), False
    while True:
        unrolling = Unrolling(skip_last)
        try:
            traced = _traced(module, attempt, unrolling, symbolic)
        except IndexError:
            if unrolling.assumed and not skip_last:
                skip_last = True
                continue
            raise
        except Exception:
            if unrolling.baked <= symbolic:
                if traced is not None:  # not all that one can do with a number works with a symbol
                    return traced
                raise
        if unrolling.baked <= symbolic:
            assert traced is not None
            return traced
        symbolic |= unrolling.baked


def _traced(module: nn.Module, attempt: _Attempt, unrolling: Unrolling, symbolic: Codes = ()) -> _Traced:
    """The graph, the structure of its outputs, and what was assumed; the module, its configurations and
    torch's settings put back. Functions whose code is in `symbolic` keep sizes symbolic.
    """
    structures: list[Structure] = []

    def take_apart(_module: nn.Module, _args: Any, output: Any) -> tuple[Any, ...]:
        structure, values = Structure.of(output)
        structure.build(values)
        structures.append(structure)
        return tuple(values) or (None,)  # torch cannot save a graph that returns nothing

    sizes = shapes_config.patch(backed_size_oblivious=True, use_duck_shape=False)  # type: ignore[attr-defined]
    with preserved(module), torch.no_grad(), sizes, silenced(*_TALKATIVE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The tensor attribute")  # set in forward: it is taken back
        prepare_configs(module, attempt.experts)
        keep_in_place(module)
        keep_symbolic(module, symbolic)
        module.forward = _stopping(module.forward, attempt.kwargs, unrolling)
        module.register_forward_hook(take_apart)
        try:
            exported = torch.export.export(
                module, attempt.args, attempt.kwargs, dynamic_shapes=attempt.shapes, strict=False
            )
        except _Stopped as e:
            assert isinstance(e.__cause__, Exception)
            raise e.__cause__ from None
    _register_uses(exported.graph)
    return exported, structures[-1], unrolling.assumed


def _register_uses(graph: torch.fx.Graph) -> None:
    """torch.export leaves values that a `no_grad` block reads without that use of them on record."""
    for node in graph.nodes:
        for argument in node.all_input_nodes:
            argument.users.setdefault(node)


def _stopping(
    forward: Callable[..., Any], kwargs: Mapping[str, Any], unrolling: Unrolling
) -> Callable[..., Any]:
    """The same forward with its loops unrolled, its exceptions carried by `_Stopped`, its **kwargs spelled
    out: torch.export cannot name them.
    """

    @functools.wraps(forward)
    def stopping(*args: Any, **kwargs: Any) -> Any:
        unrolling.routes((args, kwargs))
        fake = torch._guards.detect_fake_mode((args, kwargs))
        environment = getattr(fake, "shape_env", None)
        sizes = sizes_assumed(environment, unrolling) if environment is not None else contextlib.nullcontext()
        try:
            with sizes, HelperFrames(own), unrolling:
                return forward(*args, **kwargs)
        except Exception as e:
            raise _Stopped from e

    own = stopping.__code__  # type: ignore[attr-defined]
    signature = inspect.signature(forward)
    parameters = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    surplus = [k for k in kwargs if k not in signature.parameters]
    parameters += [inspect.Parameter(k, inspect.Parameter.KEYWORD_ONLY) for k in surplus]
    stopping.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return stopping


def _every_size(example: Example, keep_ones: bool) -> ShapesCollection:
    """Dim.AUTO for every dimension of every tensor; with `keep_ones`, a size of 1 is one that is
    broadcast.
    """
    shapes = ShapesCollection()  # type: ignore[no-untyped-call]
    for leaf in pytree.tree_leaves(example):
        if isinstance(leaf, Tensor):
            shapes[leaf] = {
                d: Dim.STATIC if keep_ones and size == 1 else Dim.AUTO for d, size in enumerate(leaf.shape)
            }
    return shapes


def _grown(example: Example) -> Iterator[tuple[Example, ShapesCollection]]:
    """The example with sizes of 0 and 1 replaced, and its dynamic shapes: what leaves most sizes free
    first.
    """
    seen = set[tuple[object, ...]]()
    for stand_ins, keep_ones in _STAND_INS:
        args, kwargs = pytree.tree_map(functools.partial(_stretched, stand_ins=stand_ins), example)
        sizes = tuple(
            tuple(leaf.shape) for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)
        )
        if (sizes, keep_ones and 1 in sum(sizes, ())) not in seen:
            seen.add((sizes, keep_ones and 1 in sum(sizes, ())))
            yield (args, kwargs), _every_size((args, kwargs), keep_ones)


def _stretched(leaf: Any, stand_ins: Callable[[int], Mapping[int, int]]) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    for dim, size in stand_ins(leaf.dim()).items():
        if dim < leaf.dim() and leaf.shape[dim] <= 1:
            leaf = resized(leaf, dim, size)
    return leaf


def _unlike(example: Example) -> Example:
    """The example with no tensor in two places: tracing would take the two for one."""
    seen = set[int]()

    def own(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        again = id(leaf) in seen
        seen.add(id(leaf))
        return leaf.clone() if again else leaf

    args, kwargs = pytree.tree_map(own, example)
    return args, kwargs


def _on_device_of(module: nn.Module, example: Any) -> Any:
    """A model on the meta device is traced with inputs there."""
    tensors = [*module.parameters(), *module.buffers()]
    if not any(t.is_meta for t in tensors):
        return example
    return pytree.tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, example)


def _configs(module: nn.Module) -> list[Any]:
    """The distinct configurations in the model (transformers' convention)."""
    return list(
        {id(c): c for m in module.modules() if (c := getattr(m, "config", None)) is not None}.values()
    )


def prepare_configs(module: nn.Module, experts: str | None = None) -> None:
    """Have a transformers model return no cache, and run the experts implementation asked for, if one is."""
    for config in _configs(module):
        if getattr(config, "use_cache", False):
            config.use_cache = False
        if experts is not None and hasattr(config, "_experts_implementation"):
            config._experts_implementation = experts


def _own(program: ExportedProgram) -> Captured:
    """The same program with a graph of its own that returns a flat tuple, and the same tensors."""
    whole, entry = program.module_call_graph[0].signature, program.module_call_graph[0]
    assert whole is not None
    # A tensor stands for each output, whatever it is: only where it goes matters here.
    markers = [torch.empty(0)] * whole.out_spec.num_leaves
    structure, values = Structure.of(pytree.tree_unflatten(markers, whole.out_spec))
    if len(values) != len(markers):
        raise InputError("the exported program returns a cache: export the model with use_cache=False")
    flat = replace(whole, out_spec=pytree.tree_structure(tuple(markers)))
    graph_module, names = _copied(program.graph_module)
    signature = program.graph_signature
    owned = ExportedProgram(
        root=graph_module,
        graph=graph_module.graph,
        graph_signature=ExportGraphSignature(
            [_renamed(spec, names) for spec in signature.input_specs],
            [_renamed(spec, names) for spec in signature.output_specs],
        ),
        state_dict=dict(program.state_dict),
        range_constraints=program.range_constraints,
        module_call_graph=[replace(entry, signature=flat), *program.module_call_graph[1:]],
        example_inputs=program.example_inputs,
        constants=dict(program.constants),
        verifiers=program.verifiers,
    )
    owned._guards_code = list(getattr(program, "_guards_code", ()))
    return Captured(owned, CallSignature.of_exported(owned), structure, "exported program")


def _copied(graph_module: torch.fx.GraphModule) -> tuple[torch.fx.GraphModule, dict[str, str]]:
    """A graph module with nodes of its own, and what each node is called in it."""
    graph, nodes = torch.fx.Graph(), dict[Node, Node]()
    results = graph.graph_copy(graph_module.graph, nodes, return_output_node=True)
    assert isinstance(results, tuple)
    values, output = results
    graph.output(values).meta.update(output.meta)
    copied = torch.fx.GraphModule(graph_module, graph)
    copied.meta = dict(graph_module.meta)
    return copied, {old.name: new.name for old, new in nodes.items()}


def _renamed(spec: _Spec, names: Mapping[str, str]) -> _Spec:
    name = getattr(spec.arg, "name", None)
    if name is None or name not in names:
        return spec
    return replace(spec, arg=replace(spec.arg, name=names[name]))


def _explain(
    model: object, module: nn.Module, example: Example, failure: Exception, what_to_do: str
) -> CaptureError | InputError:
    """One line: what could not be captured, on which line of the user's code, and what to do."""
    name = (
        type(model).__name__
        if isinstance(model, nn.Module)
        else getattr(model, "__name__", type(model).__name__)
    )
    if (raised := _raised(module, example)) is not None:
        return InputError(f"{name} itself fails on the example inputs{_place(raised)}: {_reason(raised)}")
    code, of_values = "R104", "data-dependent" in str(failure).lower() or ".numpy() is not" in str(failure)
    if of_values or "DataDependent" in type(failure).__name__:
        code, what_to_do = (
            "R101",
            "the graph may not depend on the values of tensors: remove the branch or the loop over data",
        )
    return CaptureError(f"cannot capture {name}{_place(failure)}: {_reason(failure)}; {what_to_do}", code)


def _raised(module: nn.Module, example: Example) -> Exception | None:
    """What calling the model on the example raises; a model without values cannot be called."""
    if any(t.is_meta for t in (*module.parameters(), *module.buffers())):
        return None
    try:
        with preserved(module), values_kept(module), torch.no_grad():
            module(*example[0], **example[1])
    except Exception as e:  # the user's code may raise anything
        return e
    return None


def _reason(failure: Exception) -> str:
    line = next((line.strip() for line in str(failure).splitlines() if line.strip()), type(failure).__name__)
    return line[:200].rstrip(".;: ")


def _place(failure: Exception) -> str:
    """The innermost line outside torch and this package, if there is one."""
    frames = traceback.extract_tb(failure.__traceback__)
    own = [f for f in frames if f.line and is_of_user(f.filename)]
    return f" at {Path(own[-1].filename).name}:{own[-1].lineno} (`{own[-1].line}`)" if own else ""
