"""What `com.microsoft::MoE` computes, as a function of standard operators that travels in the model.

onnxruntime runs its own kernel; whatever has none (`onnx.reference`, any runtime after onnx's inliner) runs
this: it runs every expert on every token, and weighs those that a token does not choose by 0.
Shapes: x (T, D), router_probs (T, E), fc1 (E, 2·F or F, D), b1 (E, 2·F or F), fc2 (E, D, F), b2 (E, D).
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import onnx_ir as ir

_TEXT = """
<domain: "com.microsoft", opset_import: ["": {opset}]>
MoE <k: int = 1, activation_type: string = "relu", activation_alpha: float = 1.0,
     activation_beta: float = 0.0, swiglu_limit: float = 3.4e38, swiglu_fusion: int = 1,
     normalize_routing_weights: int = 1, use_sparse_mixer: int = 0>
({inputs}) => (y)
{{
    zero = Constant <value_float: float = 0.0> ()
    zeroth = Constant <value_ints: ints = [0]> ()
    first = Constant <value_ints: ints = [1]> ()
    last = Constant <value_ints: ints = [-1]> ()
    two = Constant <value_ints: ints = [2]> ()
    end = Constant <value_ints: ints = [9223372036854775807]> ()
    alpha = Constant <value_float: float = @activation_alpha> ()
    beta = Constant <value_float: float = @activation_beta> ()
    limit = Constant <value_float: float = @swiglu_limit> ()
    least = Neg (limit)
{names}    slots = Constant <value_int: int = @k> ()
    slots_1 = Reshape (slots, first)

    scores = Softmax <axis: int = -1> (router_probs)
    chosen, ids = TopK <axis: int = -1> (scores, slots_1)
    total = ReduceSum (chosen, last)
    weights_TK = Div (chosen, total)
    nothing = Mul (scores, zero)
    weights_TE = ScatterElements <axis: int = 1> (nothing, ids, weights_TK)
    weights = Transpose <perm: ints = [1, 0]> (weights_TE)

    start = Mul (x, zero)
    y = Scan <num_scan_inputs: int = {scanned}, body: graph = expert (sum, weight, {each}) => (next) {{
        h = Gemm <transB: int = 1> (x, {fc1})
{activation}
        out = Gemm <transB: int = 1> ({row}, {fc2})
        column = Unsqueeze (weight, first)
        weighted = Mul (out, column)
        next = Add (sum, weighted)
    }}> (start, weights, {params})
}}
"""
# Each names its result after itself.
_ACTIVATIONS = {
    "swiglu": """
        gates = Slice (h, zeroth, end, first, two)
        ups = Slice (h, first, end, first, two)
        gate = Min (gates, limit)
        up = Clip (ups, least, limit)
        scaled = Mul (gate, alpha)
        opened = Sigmoid (scaled)
        swish = Mul (gate, opened)
        shifted = Add (up, beta)
        swiglu = Mul (swish, shifted)""",
    "silu": """
        sigmoid = Sigmoid (h)
        silu = Mul (h, sigmoid)""",
    "relu": """
        relu = Relu (h)""",
    "identity": """
        identity = Identity (h)""",
}


def moe_function(opset: int, activations: Sequence[str], *, biased: tuple[bool, bool]) -> ir.Function:
    """The function for nodes of these activations whose first and second products have biases or not: a
    function has all of its inputs.
    """
    inputs = ["fc1", *["b1"][: biased[0]], "fc2", *["b2"][: biased[1]]]
    chosen, row = _chosen(activations)
    proto = onnx.parser.parse_function(
        _TEXT.format(
            opset=opset,
            inputs=", ".join(["x", "router_probs", "fc1", "b1" if biased[0] else "no_b1", "fc2"])
            + (", b2" if biased[1] else ""),
            names=_names(activations),
            scanned=1 + len(inputs),
            each=", ".join(f"{name}_e" for name in inputs),
            params=", ".join(inputs),
            fc1="fc1_e, b1_e" if biased[0] else "fc1_e",
            fc2="fc2_e, b2_e" if biased[1] else "fc2_e",
            activation=chosen,
            row=row,
        )
    )
    function = ir.from_proto(proto)
    assert isinstance(function, ir.Function)
    return function


def _names(activations: Sequence[str]) -> str:
    """Which activation a node asks for, where nodes ask for several."""
    if len(activations) == 1:
        return ""
    lines = ["wanted = Constant <value_string: string = @activation_type> ()"]
    for a in activations[1:]:
        # Not Equal: `onnx.reference` takes strings of several lengths for several types.
        lines.append(f'is_{a} = RegexFullMatch <pattern: string = "{a}"> (wanted)')
    return "".join(f"    {line}\n" for line in lines)


def _chosen(activations: Sequence[str]) -> tuple[str, str]:
    """The text that computes the activation, and the name of its result."""
    first, *others = activations
    text, row = _ACTIVATIONS[first], first
    for a in others:
        text = f"""
        or_{a} = If (is_{a}) <
            then_branch = a_{a} () => ({a}) {{{_ACTIVATIONS[a]} }},
            else_branch = no_{a} () => ({row}) {{{text} }}>"""
        row = f"or_{a}"
    return text, row
