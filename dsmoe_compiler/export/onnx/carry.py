"""A fused program through torch's ONNX exporter, its layers as operators that `lower` knows.

Routers and shared experts are spelled in ATen, where they were part of a layer's op, and torch's exporter
translates them with the rest of the model.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import onnx_ir as ir
import torch
from onnx_ir.passes.common import NameFixPass
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.onnx.ops import symbolic

from dsmoe_compiler.export.onnx.complex_pairs import split_complex
from dsmoe_compiler.export.onnx.conditions import turn_conditions
from dsmoe_compiler.export.onnx.fixed_sizes import number_fixed_sizes
from dsmoe_compiler.export.onnx.initializers import store_transposed
from dsmoe_compiler.export.onnx.inline import inline
from dsmoe_compiler.export.onnx.layer import Experts, Form
from dsmoe_compiler.export.onnx.routing import routing_of
from dsmoe_compiler.export.onnx.state import refuse_state
from dsmoe_compiler.ir import ops, reference
from dsmoe_compiler.ir.errors import ExportError
from dsmoe_compiler.ir.graph import common_module
from dsmoe_compiler.ir.spec import ExpertsSpec, MoESpec, parse, to_text
from dsmoe_compiler.quiet import silenced

# What torch's exporter says of a node that it fails on, and of an operator that it does not know.
_AT_NODE = re.compile(
    r"Error when translating node %(?P<name>\w+) .*?\[target=(?:torch\.ops\.)?(?P<operator>[\w.]+)\]"
)
_NO_FUNCTION = re.compile("No ONNX function found|No decompositions registered")
PACK, OUTPUT = "dsmoe::Pack", "dsmoe::Output"
_LOGGERS = (
    *("torch.onnx", "torch.onnx._internal.exporter._registration", "torch.export"),
    *("onnxscript", "onnx_ir"),
)


def carry(
    exported: ExportedProgram, opset: int, names: Mapping[str, str], choose: Callable[[Experts], Form]
) -> ir.Model:
    """The program as a model of that opset, every layer's experts in the form chosen for them. `exported` is
    left as it was; `names` are its layers', by the name of their op in its graph.
    """
    program = _copied(exported)
    refuse_state(program)
    split_complex(program)
    _spell(program, names, choose)
    with warnings.catch_warnings(), silenced(*_LOGGERS):
        warnings.simplefilter("ignore")
        try:
            made = torch.onnx.export(program, dynamo=True, verbose=False, opset_version=opset, optimize=False)
        except torch.onnx.OnnxExporterError as e:
            raise ExportError(f"torch.onnx cannot translate the model: {_reason(e, program)}") from e
        assert made is not None
        NameFixPass()(made.model)  # a weight may be called as an input is, or as a value of torch's
        store_transposed(made.model.graph)  # before constants are folded, and lose their names
        made.optimize()
    number_fixed_sizes(made.model.graph)
    turn_conditions(made.model.graph)
    return made.model


def _reason(error: BaseException, program: ExportedProgram) -> str:
    """Why torch's exporter gave up, in one line: the operator, the module that calls it, the first cause."""
    causes = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    said = (str(causes[-1]).strip().splitlines() or [type(causes[-1]).__name__])[0]
    at = next((found for found in map(_AT_NODE.match, map(str, causes)) if found), None)
    if at is None:
        return said[:300]
    because = "no ONNX function does what it does" if _NO_FUNCTION.match(said) else said[:300]
    module = next((common_module([node]) for node in program.graph.nodes if node.name == at["name"]), "")
    return f"{at['operator']}{f' in {module}' if module else ''}: {because}"


def _copied(exported: ExportedProgram) -> ExportedProgram:
    """A program with a graph of its own, on the same tensors."""
    graph = copy.deepcopy(exported.graph)
    for node, copied in zip(exported.graph.nodes, graph.nodes, strict=True):
        # A copy is not called as Python's builtins are, and the signature may say `input`.
        copied.name = node.name
    return ExportedProgram(
        root=GraphModule(exported.graph_module, graph),
        graph=graph,
        graph_signature=copy.deepcopy(exported.graph_signature),
        state_dict=dict(exported.state_dict),
        range_constraints=exported.range_constraints,
        module_call_graph=exported.module_call_graph,
        constants=dict(exported.constants),
        verifiers=exported.verifiers,
    )


def _spell(program: ExportedProgram, names: Mapping[str, str], choose: Callable[[Experts], Form]) -> None:
    """Replace our operators by ATen's and by those that `lower` knows."""
    graph = program.graph
    layers = [node for node in graph.nodes if node.target in (ops.MOE, ops.EXPERTS)]
    called = [names.get(node.name) or common_module([node]) for node in layers]
    for node, name in zip(layers, called, strict=True):
        _move_out(node, name)
    for number, node in enumerate(layers):
        if node.target is ops.MOE:
            inline(node, partial(_as_experts, number))
    for number, node in enumerate(_calls(program, ops.EXPERTS)):
        _, ids, weights, params, text = node.args
        assert isinstance(ids, Node) and isinstance(weights, Node) and isinstance(params, (list, tuple))
        fakes = tuple(p.meta["val"] for p in params if isinstance(p, Node))
        slots, spec = int(ids.meta["val"].shape[1]), parse(str(text), ExpertsSpec)
        layer = Experts(number, called[number], spec, routing_of(ids, weights), slots, fakes)
        inline(node, partial(_formed, choose(layer), number if node in layers else None))
    for node in _calls(program, ops.ROUTE):
        raise AssertionError(f"{node}: no pass leaves a router without its experts")
    for node in _calls(program, ops.PACK):
        inline(node, _pack)
    graph.eliminate_dead_code()
    graph.lint()
    program.graph_module.recompile()


def _calls(program: ExportedProgram, target: torch._ops.OpOverload) -> list[Node]:
    return list(program.graph.find_nodes(op="call_function", target=target))


def _move_out(node: Node, layer: str) -> None:
    """Have the call be one of the layer's own, not of a module inside it."""
    stack = node.meta.get("nn_module_stack") or {}
    inside = f"{layer}." if layer else None
    node.meta["nn_module_stack"] = {
        key: entry for key, entry in stack.items() if inside is None or not entry[0].startswith(inside)
    }


def _formed(
    form: Form,
    number: int | None,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    params: Sequence[Tensor],
    spec: str,
) -> Tensor:
    out = form(x, ids, weights, params)
    return out if number is None else _layer_output(number, out)


def _layer_output(number: int, out: Tensor) -> Tensor:
    return symbolic(OUTPUT, [out], {"layer": number}, dtype=out.dtype, shape=out.shape, version=1)


def _as_experts(
    number: int,
    x: Tensor,
    router: Sequence[Tensor],
    params: Sequence[Tensor],
    shared: Sequence[Tensor],
    spec: str,
) -> Tensor:
    """`dsmoe::moe` as its router, `dsmoe::experts` and the shared experts."""
    layer = parse(spec, MoESpec)
    weights, ids = reference.route_tokens(x, router, layer)
    out: Tensor = ops.EXPERTS(x, ids, weights, list(params), to_text(layer.experts))
    if layer.shared:
        out = out + reference.shared_experts(x, shared, layer.shared)
    return _layer_output(number, out)


def _pack(parts: Sequence[Tensor]) -> Tensor:
    shape = (len(parts), *parts[0].shape)
    return symbolic(PACK, list(parts), dtype=parts[0].dtype, shape=shape, version=1)
