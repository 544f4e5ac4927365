"""A lowered graph as one Python function, without what costs more than a small operator does.

A graph module looks up every parameter by its path, every operator through `torch.ops`, and calls operators
through their dispatcher's general form: at one token that is a third of a model's time. Here parameters,
operators and submodules are bound once, and common operators are called through torch's own fast bindings of
the same schema.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

aten = torch.ops.aten

# Bindings generated from the same schemas: equal arguments, equal results, half the call's price.
_FAST: dict[object, Callable[..., Any]] = {
    aten.add.Tensor: torch.add,
    aten.bmm.default: torch.bmm,
    aten.cat.default: torch.cat,
    aten.chunk.default: torch.chunk,
    aten.clamp.default: torch.clamp,
    aten.cos.default: torch.cos,
    aten.cumsum.default: torch.cumsum,
    aten.div.Tensor: torch.div,
    aten.embedding.default: torch.embedding,
    aten.exp.default: torch.exp,
    aten.expand.default: Tensor.expand,
    aten.gather.default: torch.gather,
    aten.gelu.default: torch.nn.functional.gelu,
    aten.linear.default: torch.nn.functional.linear,
    aten.masked_fill.Scalar: torch.masked_fill,
    aten.matmul.default: torch.matmul,
    aten.mean.dim: torch.mean,
    aten.mul.Tensor: torch.mul,
    aten.neg.default: torch.neg,
    aten.permute.default: torch.permute,
    aten.pow.Tensor_Scalar: torch.pow,
    aten.relu.default: torch.relu,
    aten.reshape.default: torch.reshape,
    aten.rsqrt.default: torch.rsqrt,
    aten.scaled_dot_product_attention.default: torch.nn.functional.scaled_dot_product_attention,
    aten.sigmoid.default: torch.sigmoid,
    aten.sin.default: torch.sin,
    aten.softmax.int: torch.softmax,
    aten.sub.Tensor: torch.sub,
    aten.sum.dim_IntList: torch.sum,
    aten.sym_size.int: Tensor.size,
    aten.tanh.default: torch.tanh,
    aten.to.dtype: Tensor.to,
    aten.topk.default: torch.topk,
    aten.transpose.int: torch.transpose,
    aten.unsqueeze.default: torch.unsqueeze,
    aten.view.default: Tensor.view,
}


def straight_line(module: GraphModule) -> Callable[..., Any]:
    """A function of the graph's inputs, flat and in order, that returns what the graph's output holds.

    It reads the tensors that the module holds now: changed in place they change here, replaced they do not.
    """
    emitter = _Emitter(module)
    source = emitter.source()
    code = compile(source, f"<compiled program {id(module):#x}>", "exec")
    exec(code, emitter.bound)
    run: Callable[..., Any] = emitter.bound["run"]
    return run


class _Emitter:
    """Writes one line a node; whatever is no literal is bound by a name."""

    def __init__(self, module: GraphModule) -> None:
        self.module = module
        self.bound: dict[str, Any] = {}
        self.names: dict[Node, str] = {}
        self._known: dict[int, str] = {}

    def source(self) -> str:
        """The function's text."""
        lines, inputs = list[str](), list[str]()
        last_use = {a: n for n in self.module.graph.nodes for a in n.all_input_nodes}
        for i, node in enumerate(self.module.graph.nodes):
            if node.op == "placeholder":
                self.names[node] = f"v{i}"
                inputs.append(f"v{i}")
            elif node.op == "get_attr":
                self.names[node] = self.bind(_attribute(self.module, str(node.target)))
            elif node.op == "output":
                lines.append(f"    return {self.text(node.args[0])}")
            else:
                self.names[node] = f"v{i}"
                freed = [
                    self.names[a] for a in node.all_input_nodes if last_use[a] is node and a.op != "get_attr"
                ]
                after = "".join(f"; {name} = None" for name in freed)
                lines.append(f"    v{i} = {self.call(node)}{after}")
        return f"def run({', '.join(inputs)}):\n" + "\n".join(lines) + "\n"

    def call(self, node: Node) -> str:
        """The node's call."""
        if node.op == "call_module":
            target: Any = _attribute(self.module, str(node.target)).forward
        else:
            target = _FAST.get(node.target, node.target)
            target = getattr(target, "_op", target)
        arguments = [self.text(a) for a in node.args]
        arguments += [f"{k}={self.text(v)}" for k, v in node.kwargs.items()]
        return f"{self.bind(target)}({', '.join(arguments)})"

    def text(self, value: Any) -> str:
        """An argument's text."""
        if isinstance(value, Node):
            return self.names[value]
        if isinstance(value, (list, tuple)):
            inside = "".join(f"{self.text(v)}, " for v in value)
            return f"[{inside}]" if isinstance(value, list) else f"({inside})"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{k!r}: {self.text(v)}" for k, v in value.items()) + "}"
        if isinstance(value, slice):
            return f"slice({self.text(value.start)}, {self.text(value.stop)}, {self.text(value.step)})"
        plain = value is None or isinstance(value, (bool, int, str)) and not isinstance(value, torch.Tensor)
        if plain or (isinstance(value, float) and math.isfinite(value)):
            return repr(value)
        return self.bind(value)

    def bind(self, value: Any) -> str:
        """A name that stands for `value` in the function."""
        name = self._known.setdefault(id(value), f"c{len(self.bound)}")
        self.bound[name] = value
        return name


def _attribute(module: GraphModule, path: str) -> Any:
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part)
    return found
