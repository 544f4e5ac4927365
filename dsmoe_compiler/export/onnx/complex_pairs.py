"""Complex values as pairs of real ones, which is all that ONNX has operators for.

before:
    c = view_as_complex(x);  d = c * polar(r, t);  y = view_as_real(d)
after:
    a, b = x[…, 0], x[…, 1];  u, v = r * cos(t), r * sin(t)
    y = stack(a * u - b * v, a * v + b * u)
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node
from torch.utils import _pytree as pytree

from dsmoe_compiler.export.onnx.inline import PLACE
from dsmoe_compiler.ir.errors import ExportError
from dsmoe_compiler.ir.graph import COPIES, VIEWS, common_module

aten = torch.ops.aten
# What stands for one number of a complex computation: a node, or what was written in the code.
Part: TypeAlias = Any
Pair: TypeAlias = tuple[Part, Part]

# Give each number of the result one of their operands', untouched.
_MOVES = (
    VIEWS
    | COPIES
    | {
        *(aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims),
        *(aten.slice.Tensor, aten.select.int, aten.index.Tensor, aten.index_select.default),
        *(aten.expand.default, aten.repeat.default, aten.permute.default, aten.transpose.int),
        *(
            aten.t.default,
            aten.numpy_T.default,
            aten.flip.default,
            aten.cat.default,
            aten.stack.default,
            aten.gather.default,
        ),
        *(aten.unflatten.int, aten.movedim.int, aten.expand_as.default, aten.repeat_interleave.self_int),
        *(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int),
        *(operator.getitem, aten.embedding.default, aten.resolve_conj.default),
    }
)
# Linear with real coefficients: both parts go the same way, on their own.
_LINEAR = frozenset(
    {
        *(aten.neg.default, aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim),
        *(aten.cumsum.default, aten.constant_pad_nd.default, aten.zeros_like.default),
    }
)
_CONJUGATES = frozenset({aten._conj.default, aten.conj.default, aten.conj_physical.default})
_CONJUGATES |= {aten._conj_physical.default}
_SUMS = frozenset({aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar})
_PRODUCTS = frozenset({aten.mul.Tensor, aten.mul.Scalar})
_CASTS = frozenset({aten.to.dtype, aten._to_copy.default})
_QUOTIENTS = frozenset({aten.div.Tensor, aten.div.Scalar})
_SIZES = frozenset({aten.sym_size.int, aten.sym_stride.int, aten.sym_numel.default})


def split_complex(program: ExportedProgram) -> None:
    """Rewrite the program's graph so that no value in it is complex; weights that were are read as
    (…, 2) real ones.

    Raises ExportError for an operator on complex values that is not known here, and for a complex input or
    output of the model.
    """
    graph = program.graph
    if not any(_touches(node) for node in graph.nodes):
        return
    pairs = dict[Node, Pair]()
    for node in list(graph.nodes):
        if node.op == "placeholder" and _is_complex(node):
            with graph.inserting_before(_first_call(program)):
                pairs[node] = _weight(program, node)
        elif node.op == "output":
            for value in node.all_input_nodes:
                if _is_complex(value):
                    raise ExportError(f"ONNX has no operators for complex numbers: the model returns {value}")
        elif _touches(node):
            with graph.inserting_before(node):
                _rewrite(node, pairs)
    for node in reversed(list(pairs)):
        if node.op != "placeholder":
            graph.erase_node(node)
    graph.lint()


def _is_complex(value: object) -> bool:
    if isinstance(value, complex):
        return True
    fake = value.meta.get("val") if isinstance(value, Node) else None
    return isinstance(fake, Tensor) and fake.is_complex()


def _touches(node: Node) -> bool:
    return _is_complex(node) or any(map(_is_complex, node.all_input_nodes))


def _first_call(program: ExportedProgram) -> Node:
    node: Node = next(node for node in program.graph.nodes if node.op != "placeholder")
    return node


def _weight(program: ExportedProgram, node: Node) -> Pair:
    """Both parts of a complex parameter, buffer or constant, which from here on is kept as real numbers."""
    (spec,) = (s for s in program.graph_signature.input_specs if getattr(s.arg, "name", None) == node.name)
    if spec.kind is InputKind.USER_INPUT or spec.target is None:
        raise ExportError(f"ONNX has no operators for complex numbers: the model's input {node} is complex")
    for tensors in (program.state_dict, program.constants):
        if spec.target in tensors and tensors[spec.target].is_complex():
            tensors[spec.target] = torch.view_as_real(tensors[spec.target].detach().resolve_conj())
    node.meta["val"] = torch.view_as_real(node.meta["val"])
    return _parts_of(node, node)


def _rewrite(node: Node, pairs: dict[Node, Pair]) -> None:
    """Compute the parts of a complex node, or the value of a real one that reads complex ones."""
    target, args, kwargs = node.target, node.args, dict(node.kwargs)
    if node.op != "call_function":
        raise ExportError(_unknown(node))

    def of(operand: Part) -> Pair:
        """The parts of an operand; the imaginary one is None where the operand is real."""
        if isinstance(operand, complex):
            return operand.real, operand.imag
        return pairs.get(operand, (operand, None)) if isinstance(operand, Node) else (operand, None)

    def call(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        return _call(node, op, *args, **kwargs)

    real: Node | None = None
    if target is aten.view_as_complex.default:
        pairs[node] = _parts_of(node, args[0])
    elif target is aten.complex.default:
        pairs[node] = (args[0], args[1])
    elif target is aten.polar.default:
        radius, angle = args
        cos, sin = call(aten.cos.default, angle), call(aten.sin.default, angle)
        pairs[node] = (call(aten.mul.Tensor, radius, cos), call(aten.mul.Tensor, radius, sin))
    elif target in _MOVES or target in _LINEAR:
        pairs[node] = tuple(_each(node, pairs, part) for part in (0, 1))  # type: ignore[assignment]
    elif target in _CONJUGATES:
        re, im = of(args[0])
        pairs[node] = (re, call(aten.neg.default, im))
    elif target in _CASTS and _is_complex(node):
        pairs[node] = _cast(call, node, of(args[0]))
    elif target in _SUMS:
        pairs[node] = _sum(call, target, of(args[0]), of(args[1]), kwargs)
    elif target in _PRODUCTS:
        pairs[node] = _product(call, of(args[0]), of(args[1]))
    elif target in _QUOTIENTS and len(args) == 2 and not kwargs and of(args[1])[1] is None:
        re, im = of(args[0])
        pairs[node] = (call(target, re, args[1]), call(target, im, args[1]))
    elif target is aten.view_as_real.default:
        real = call(aten.stack.default, list(of(args[0])), -1)
    elif target is aten.real.default:
        real = of(args[0])[0]
    elif target is aten.imag.default:
        real = of(args[0])[1]
    elif target is aten.abs.default:
        re, im = of(args[0])
        squares = call(aten.add.Tensor, call(aten.mul.Tensor, re, re), call(aten.mul.Tensor, im, im))
        real = call(aten.sqrt.default, squares)
    elif target in _SIZES:
        real = call(target, of(args[0])[0], *args[1:])
    else:
        raise ExportError(_unknown(node))
    if real is not None:
        node.replace_all_uses_with(real)
        pairs[node] = (real, None)


def _unknown(node: Node) -> str:
    module = common_module([node])
    return f"ONNX has no operators for complex numbers: {node.target}{f' in {module}' if module else ''}"


def _parts_of(node: Node, numbers: Part) -> Pair:
    """Both parts of numbers that lie as pairs: (…, 2)."""
    return _call(node, aten.select.int, numbers, -1, 0), _call(node, aten.select.int, numbers, -1, 1)


def _each(node: Node, pairs: dict[Node, Pair], part: int) -> Node:
    """The node's own operator on one part of each of its complex operands."""

    def chosen(operand: Part) -> Part:
        return pairs[operand][part] if isinstance(operand, Node) and operand in pairs else operand

    args, kwargs = pytree.tree_map(chosen, (node.args, dict(node.kwargs)))
    return _call(node, node.target, *args, **kwargs)


def _sum(call: Callable[..., Node], op: Any, left: Pair, right: Pair, kwargs: dict[str, Any]) -> Pair:
    (a, b), (c, d) = (_with_zeros(call, *pair) for pair in (left, right))
    return call(op, a, c, **kwargs), call(op, b, d, **kwargs)


def _with_zeros(call: Callable[..., Node], re: Part, im: Part | None) -> Pair:
    """The parts of an operand that may be real; zeros of its shape, as it may make the other one's larger."""
    if im is None:
        im = call(aten.zeros_like.default, re) if isinstance(re, Node) else 0
    return re, im


def _cast(call: Callable[..., Node], node: Node, value: Pair) -> Pair:
    """The parts of an operand, real or not, in the real type that the node's type is made of."""

    def real(argument: Part) -> Part:
        return argument.to_real() if isinstance(argument, torch.dtype) else argument

    args, kwargs = pytree.tree_map(real, (node.args[1:], dict(node.kwargs)))
    re, im = (part if part is None else call(node.target, part, *args, **kwargs) for part in value)
    return _with_zeros(call, re, im)


def _product(call: Callable[..., Node], left: Pair, right: Pair) -> Pair:
    (a, b), (c, d) = left, right
    if isinstance(a, (int, float)):
        (a, b), (c, d) = (c, d), (a, b)

    def times(x: Part, y: Part) -> Node:
        return call(aten.mul.Tensor, x, y)

    if d is None:
        return times(a, c), times(b, c)
    if b is None:
        return times(a, c), times(a, d)
    return (
        call(aten.sub.Tensor, times(a, c), times(b, d)),
        call(aten.add.Tensor, times(a, d), times(b, c)),
    )


def _call(place: Node, op: Any, *args: Any, **kwargs: Any) -> Node:
    """A node that computes this where `place` is, with what capture would record of it."""
    node: Node = place.graph.call_function(op, args, kwargs)
    fakes, named = pytree.tree_map(lambda a: a.meta["val"] if isinstance(a, Node) else a, (args, kwargs))
    node.meta.update({key: value for key, value in place.meta.items() if key in PLACE})
    node.meta["val"] = op(*fakes, **named)
    return node
