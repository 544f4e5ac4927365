"""Which backend runs a program's fused layers, and the program's runnable form."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Literal, cast

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
    module.recompile()
    return module


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
