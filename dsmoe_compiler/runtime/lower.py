"""Which backend runs a program's fused layers, and the program's runnable form."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from dsmoe_compiler.ir import ops
from dsmoe_compiler.ir.errors import InputError
from dsmoe_compiler.packing import Packed
from dsmoe_compiler.runtime.cpu import CpuExperts, CpuMoE, CpuRoute
from dsmoe_compiler.runtime.triton_here import unavailable

Backend = Literal["auto", "cpu", "triton", "reference"]
BACKENDS: tuple[Backend, ...] = ("auto", "cpu", "triton", "reference")
OP = "dsmoe_op"  # in the metadata of a lowered node: the name of the op that it runs


def choose(backend: str, exported: ExportedProgram) -> Backend:
    """The backend that "auto" means for this program. Raises InputError when the one asked for cannot run
    it.
    """
    devices = {t.device.type for t in exported.state_dict.values() if isinstance(t, Tensor)}
    if backend not in BACKENDS:
        raise InputError(f"unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    if backend == "cpu" and devices - {"cpu"}:
        raise InputError(
            f"backend 'cpu' cannot run a model on {', '.join(sorted(devices))}: move it to the CPU first"
        )
    if backend == "triton" and (why := unavailable(devices)):
        raise InputError(f"backend 'triton' cannot run this model: {why}")
    if backend != "auto":
        return cast(Backend, backend)
    if not devices - {"cpu"}:
        return "cpu"
    if why := unavailable(devices):
        warnings.warn(f"the MoE layers run by the reference: {why}", stacklevel=2)
        return "reference"
    return "triton"


def lower(exported: ExportedProgram, backend: Backend) -> GraphModule:
    """The program as a module: its own graph, the model's own tensors, the fused ops run by `backend`."""
    module = exported.module(check_guards=False)
    assert isinstance(module, GraphModule)
    module._forward_pre_hooks.clear()  # the caller has checked the inputs, with messages a user can read
    _bind_packs(module, exported)
    made = _modules(backend)
    for i, node in enumerate([n for n in module.graph.nodes if n.target in made]):
        *operands, spec = node.args
        name = f"dsmoe_{i}"
        module.add_submodule(name, made[node.target](spec))
        with module.graph.inserting_before(node):
            lowered = module.graph.call_module(name, tuple(operands))
        lowered.meta[OP] = node.name
        node.replace_all_uses_with(lowered)
        module.graph.erase_node(node)
    if backend == "cpu":
        _prepare(module)
    module.recompile()
    return module


def _prepare(module: GraphModule) -> None:
    """What the layers' first calls would do is done now: no other thread traces."""
    for node in [n for n in module.graph.nodes if OP in n.meta]:
        layer = module.get_submodule(str(node.target))
        if isinstance(layer, (CpuExperts, CpuMoE)):
            with suppress(_NotYet), torch.no_grad():
                layer.prepare(*[_now(module, a) for a in node.args])


class _NotYet(Exception):
    """A value that a call's inputs decide."""


def _now(module: GraphModule, operand: Any) -> Any:
    """An operand of a layer before any call: parameters as they are, of anything else a row on the meta
    device. Raises _NotYet for parameters that are computed of inputs.
    """
    if isinstance(operand, (list, tuple)):
        return [_parameter(module, each) for each in operand]
    known = operand.meta.get("val")
    if not isinstance(known, Tensor):
        raise _NotYet
    return torch.empty(1, int(known.shape[1]), dtype=known.dtype, device="meta")


def _parameter(module: GraphModule, value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_parameter(module, each) for each in value]
    if not isinstance(value, Node):
        return value
    if value.op == "get_attr":
        return _attribute(module, value)
    if value.op == "placeholder":
        raise _NotYet
    made: Any = module.get_submodule(str(value.target)) if value.op == "call_module" else value.target
    arguments = [_parameter(module, each) for each in value.args]
    return made(*arguments, **{k: _parameter(module, v) for k, v in value.kwargs.items()})


def _modules(backend: Backend) -> dict[torch._ops.OpOverload, Callable[[str], nn.Module]]:
    """What stands for each fused operator; the reference needs nothing to."""
    if backend == "cpu":
        return {ops.MOE: CpuMoE, ops.EXPERTS: CpuExperts, ops.ROUTE: CpuRoute}
    if backend == "triton":
        from dsmoe_compiler.runtime.generated import GeneratedExperts, GeneratedMoE

        return {ops.MOE: GeneratedMoE, ops.EXPERTS: GeneratedExperts, ops.ROUTE: CpuRoute}
    return {}


def _bind_packs(module: GraphModule, exported: ExportedProgram) -> None:
    """Experts' own tensors are brought together now, once, and read as one from then on."""
    state = [*exported.state_dict.values(), *exported.constants.values()]
    for i, node in enumerate([n for n in module.graph.nodes if n.target is ops.PACK]):
        (parts,) = node.args
        tensors = [_attribute(module, part) for part in parts]
        module.add_submodule(f"dsmoe_pack_{i}", Packed(tensors, state))
        with module.graph.inserting_before(node):
            lowered = module.graph.call_module(f"dsmoe_pack_{i}")
        node.replace_all_uses_with(lowered)
        module.graph.erase_node(node)
        for part in dict.fromkeys(parts):
            if not part.users:
                module.graph.erase_node(part)


def _attribute(module: GraphModule, node: Node) -> Tensor:
    found: object = module
    for part in str(node.target).split("."):
        found = getattr(found, part)
    assert isinstance(found, Tensor)
    return found
