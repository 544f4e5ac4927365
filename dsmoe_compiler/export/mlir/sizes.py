"""The sizes in a graph, as torch-mlir can take them."""

from __future__ import annotations

import torch
from torch import SymFloat, SymInt
from torch.fx import Graph

from dsmoe_compiler.ir.errors import InputError


def settle_sizes(graph: Graph) -> None:
    """Let the values' shapes hold symbols only for what varies.

    A size that was made a symbol and then met a number is still a symbol in the fake tensor of an input,
    though it stands for that number now. torch-mlir goes by what the size is, types the input with `?` there,
    and its passes fail where the number comes up.
    """
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and any(_is_settled(s) for s in value.shape):
            shape, stride = map(_settled, value.shape), map(_settled, value.stride())
            node.meta["val"] = value.new_empty_strided(tuple(shape), tuple(stride))
            node.meta.pop("tensor_meta", None)  # torch-mlir would look there first


def require_integers(graph: Graph) -> None:
    """Raises InputError where a size is computed in floating point, as a capacity of 1.25 · T / E tokens is:
    torch-mlir's importer has no words for that.
    """
    for node in graph.nodes:
        if isinstance(node.meta.get("val"), SymFloat):
            raise InputError(
                f"the program computes a size in floating point (%{node.name}), which torch-mlir cannot "
                "express; give dynamic_shapes=None, for one size"
            )


def _is_settled(size: int | SymInt) -> bool:
    return isinstance(size, SymInt) and bool(size.node.expr.is_number)


def _settled(size: int | SymInt) -> int | SymInt:
    return int(size) if _is_settled(size) else size
