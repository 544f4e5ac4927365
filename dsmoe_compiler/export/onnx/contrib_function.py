"""What `com.microsoft::MoE` and `QMoE` compute: functions of standard operators that travel in the model.

onnxruntime runs its own kernels; whatever has none (`onnx.reference`, any runtime after onnx's inliner)
runs these: every expert on every token, weighed by 0 where the token did not choose it. A function is made
for the nodes of one model: of the operator's inputs it reads those that they have.
Shapes: x (T, D), router_probs (T, E), fc1 (E, 2·F or F, D), b1 (E, 2·F or F), fc2 (E, D, F), b2 (E, D);
codes, scales and zero points as in `contrib_quantized`.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

import onnx
import onnx_ir as ir

from dsmoe_compiler.export.onnx.quantize import Blockwise

_TEXT = """
<domain: "com.microsoft", opset_import: ["": {opset}]>
{name} <k: int = 1, activation_type: string = "relu", activation_alpha: float = 1.0,
     activation_beta: float = 0.0, swiglu_limit: float = 3.4e38, swiglu_fusion: int = 1,
     normalize_routing_weights: int = 1, use_sparse_mixer: int = 0{more}>
(x, router_probs, {inputs}) => (y)
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
    y = Scan <num_scan_inputs: int = {scanned}, body: graph = expert (sum, weight, {each}) => (next)
    {{{weights}
        h = Gemm <transB: int = 1> (x, {fc1})
{activation}
        out = Gemm <transB: int = 1> ({row}, {fc2})
        column = Unsqueeze (weight, first)
        weighted = Mul (out, column)
        next = Add (sum, weighted)
    }}> (start, weights, {params})
}}
"""
_QUANTIZED_ATTRIBUTES = ", expert_weight_bits: int = 4, block_size: int = 32, accuracy_level: int = 0"
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


# Unsigned numbers of 8 bits, or of 4 bits two a byte, in float32.
_NUMBERS = {
    8: """
        {to} = Cast <to: int = 1> ({of})""",
    4: """
        {of}_mask = Constant <value: tensor = uint8 {{15}}> ()
        {of}_four = Constant <value: tensor = uint8 {{4}}> ()
        {of}_low = BitwiseAnd ({of}, {of}_mask)
        {of}_high = BitShift <direction: string = "RIGHT"> ({of}, {of}_four)
        {of}_lows = Unsqueeze ({of}_low, last)
        {of}_highs = Unsqueeze ({of}_high, last)
        {of}_pairs = Concat <axis: int = 2> ({of}_lows, {of}_highs)
        {of}_rows = Constant <value_ints: ints = [0, -1]> ()
        {of}_flat = Reshape ({of}_pairs, {of}_rows)
        {to} = Cast <to: int = 1> ({of}_flat)""",
}
_MATRIX = """{numbers}
        blocked{i} = Constant <value_ints: ints = [0, -1, {block}]> ()
        flat{i} = Constant <value_ints: ints = [0, -1]> ()
        blocks{i} = Reshape (numbers{i}, blocked{i}){middle}
        centred{i} = Sub (blocks{i}, middle{i})
        scales{i} = Unsqueeze (s{i}_e, last)
        matrix{i} = Mul (centred{i}, scales{i})
        w{i} = Reshape (matrix{i}, flat{i})"""
_MIDDLE = """
        middle{i} = Constant <value_float: float = {middle}> ()"""
_ZEROS = """{numbers}
        shape{i} = Shape (s{i}_e)
        count{i} = Gather (shape{i}, first)
        kept{i} = Slice (zeros{i}, zeroth, count{i}, first)
        middle{i} = Unsqueeze (kept{i}, last)"""


def moe_function(
    opset: int,
    activations: Sequence[str],
    inputs: Sequence[str],
    unread: Container[str],
    form: Blockwise | None,
) -> ir.Function:
    """The function for nodes of these activations. `inputs` are the operator's after router_probs, of which
    nodes leave out those in `unread`; with a `form` it is QMoE, of codes in that form.
    """
    read = [name for name in inputs if name not in unread]
    activation, row = _chosen(activations)
    matrix = "fc{}_e" if form is None else "w{}"
    first, second = (matrix.format(i) + (f", b{i}_e" if f"b{i}" in read else "") for i in (1, 2))
    proto = onnx.parser.parse_function(
        _TEXT.format(
            name="MoE" if form is None else "QMoE",
            opset=opset,
            more="" if form is None else _QUANTIZED_ATTRIBUTES,
            inputs=", ".join(inputs),
            names=_names(activations),
            scanned=1 + len(read),
            each=", ".join(f"{name}_e" for name in read),
            params=", ".join(read),
            weights="" if form is None else "".join(_matrix(i, form) for i in (1, 2)),
            fc1=first,
            fc2=second,
            activation=activation,
            row=row,
        )
    )
    function = ir.from_proto(proto)
    assert isinstance(function, ir.Function)
    return function


def _matrix(product: int, form: Blockwise) -> str:
    """The text that makes w1 or w2 of an expert's whole numbers."""
    if form.symmetric:
        middle = _MIDDLE.format(i=product, middle=float(1 << form.bits - 1))
    else:
        zeros = _NUMBERS[form.bits].format(of=f"z{product}_e", to=f"zeros{product}")
        middle = _ZEROS.format(i=product, numbers=zeros)
    numbers = _NUMBERS[form.bits].format(of=f"fc{product}_e", to=f"numbers{product}")
    return _MATRIX.format(i=product, numbers=numbers, block=form.block, middle=middle)


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
