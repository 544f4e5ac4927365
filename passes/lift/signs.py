"""Which values hold no number below 0, whatever the model's weights and inputs are."""

from __future__ import annotations

from torch.fx import Node

from dsmoe_compiler.ir.graph import CASTS, COPIES, VIEWS, is_tensor, value
from dsmoe_compiler.passes.lift.state import argument, operator_name

_NEVER = frozenset(
    f"aten::{name}"
    for name in (
        "softmax",
        "_softmax",
        "sigmoid",
        "exp",
        "relu",
        "abs",
        "square",
        "sqrt",
        "one_hot",
    )
)
_OF_FIRST = frozenset(
    f"aten::{name}"
    for name in (
        *("sum", "mean", "amax", "amin", "max", "min", "topk", "sort", "gather", "index", "select", "slice"),
        *(
            "unsqueeze",
            "squeeze",
            "expand",
            "transpose",
            "permute",
            "t",
            "unbind",
            "chunk",
            "split",
            "cumsum",
        ),
    )
)
_PARTS = frozenset({"aten::unbind", "aten::chunk", "aten::split"})  # each of several like the whole
_OF_BOTH = frozenset({"aten::mul", "aten::div", "aten::add", "aten::minimum"})


def never_below_zero(node: object) -> bool:
    """Whether a value, or the first of several, holds no number below 0."""
    if isinstance(node, (int, float)):
        return node >= 0
    if not isinstance(node, Node) or node.op != "call_function":
        return False
    if is_tensor(node) and str(value(node).dtype) in ("torch.bool", "torch.uint8"):
        return True
    name = operator_name(node)
    if name in _NEVER:
        return True
    if name == "getitem":
        several = isinstance(node.args[0], Node) and operator_name(node.args[0]) in _PARTS
        return (several or bool(node.args[1] == 0)) and never_below_zero(node.args[0])
    if name in ("aten::clamp", "aten::clamp_min"):
        low, high = argument(node, "min"), argument(node, "max")
        if high is not None and not never_below_zero(high):
            return False
        return (isinstance(low, (int, float)) and low >= 0) or never_below_zero(node.args[0])
    if name == "aten::softplus":
        return bool(argument(node, "beta") > 0)
    if name in ("aten::max", "aten::min") and len(node.args) > 1 and isinstance(node.args[1], Node):
        return all(never_below_zero(a) for a in node.args[:2])
    if name in _OF_BOTH:
        plain = argument(node, "alpha", 1) == 1 and not argument(node, "rounding_mode")
        return plain and all(never_below_zero(a) for a in node.args[:2])
    if name in _OF_FIRST or node.target in CASTS | COPIES | VIEWS:
        return never_below_zero(node.args[0])
    if name == "aten::einsum":
        return all(never_below_zero(a) for a in argument(node, "tensors"))
    return False
