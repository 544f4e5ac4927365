"""A program whose experts' matrices are what quantising makes of them: what a quantised model computes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.fx import Node

from dsmoe_compiler.export.onnx.quantize import Blockwise, dequantize, quantize
from dsmoe_compiler.export.onnx.quantized_matrix import Weights, form_of
from dsmoe_compiler.ir import ops
from dsmoe_compiler.ir.body import GEMMS
from dsmoe_compiler.ir.graph import ProgramGraph
from dsmoe_compiler.ir.spec import ExpertsSpec, MoESpec, parse
from dsmoe_compiler.program import Program


def with_rounded_experts(program: Program, weights: Weights) -> Program:
    """The program on matrices of its own, rounded to `weights`; everything else is the program's."""
    graph, form = ProgramGraph(program.exported), form_of(weights)
    state = dict(program.exported.state_dict)
    for node, transposed in _matrices(graph):
        name = graph.parameter(node)
        if name in state:  # from the model's own numbers: layers may share a matrix
            rounded = _rounded(program.exported.state_dict[name], form, transposed)
            state[name] = nn.Parameter(rounded, requires_grad=False)
    exported = copy.copy(program.exported)
    exported._state_dict = state
    return replace(program, exported=exported)


def _matrices(graph: ProgramGraph) -> Iterator[tuple[Node, bool]]:
    """The placeholders of experts' matrices, and whether they are (out, in)."""
    for node in graph.nodes:
        if node.target not in (ops.MOE, ops.EXPERTS):
            continue
        text = str(node.args[-1])
        spec = parse(text, MoESpec).experts if node.target is ops.MOE else parse(text, ExpertsSpec)
        params = node.args[2 if node.target is ops.MOE else 3]
        assert isinstance(params, (list, tuple))
        for step in spec.body.steps:
            if step.op in GEMMS and spec.body.steps[step.args[1]].op == "p":
                param = params[int(spec.body.steps[step.args[1]].attrs[0] or 0)]
                assert isinstance(param, Node)
                parts = param.args[0] if param.target is ops.PACK else [param]
                assert isinstance(parts, (list, tuple))
                yield from ((part, step.op == "linear") for part in parts if isinstance(part, Node))


def _rounded(tensor: Tensor, form: Blockwise, transposed: bool) -> Tensor:
    """A matrix, or a stack of them, as quantising leaves it."""
    stack = tensor.detach().reshape(-1, *tensor.shape[-2:])
    made = torch.empty_like(stack)
    for one, out in zip(stack, made, strict=True):
        matrix = dequantize(quantize((one.T if transposed else one).numpy(), form))
        out.copy_(torch.from_numpy(matrix.T if transposed else matrix))
    return made.reshape(tensor.shape)
