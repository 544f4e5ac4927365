"""A call in a captured graph replaced by what a function computes of its tensors, traced on the spot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

# What a traced node keeps of the call it stands for: where in the model it is.
PLACE = ("nn_module_stack", "source_fn_stack")


def inline(call: Node, function: Callable[..., Tensor]) -> None:
    """Put the graph of `function(*call.args)` in the place of `call`, which has one tensor as its value.

    The function is traced on the values that capture recorded, so that its sizes are the graph's own symbols.
    """
    graph: Graph = call.graph
    leaves, spec = pytree.tree_flatten(call.args)
    nodes = list(dict.fromkeys(leaf for leaf in leaves if isinstance(leaf, Node)))

    def of_tensors(*tensors: Tensor) -> Tensor:
        given = dict(zip(nodes, tensors, strict=True))
        values: list[Any] = [given[leaf] if isinstance(leaf, Node) else leaf for leaf in leaves]
        return function(*pytree.tree_unflatten(values, spec))

    with torch.no_grad():
        traced = make_fx(of_tensors, tracing_mode="symbolic", _allow_non_fake_inputs=True)(
            *(node.meta["val"] for node in nodes)
        )
    inputs = [node for node in traced.graph.nodes if node.op == "placeholder"]
    place = {key: call.meta[key] for key in PLACE if key in call.meta}
    with graph.inserting_before(call):
        known = dict(zip(inputs, nodes, strict=True))
        for node in traced.graph.nodes:
            if node.op == "call_function":
                known[node] = graph.node_copy(node, known.__getitem__)
                known[node].meta.update(place)
            elif node.op == "get_attr":
                raise AssertionError(f"{node.target} is a tensor that no argument brings")
    (result,) = traced.graph.output_node().args
    assert isinstance(result, Node)
    call.replace_all_uses_with(known[result])
    graph.erase_node(call)
