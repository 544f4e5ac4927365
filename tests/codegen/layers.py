"""Layers of all kinds with numbers in them, and what they are to compute.

Letters: T tokens, D model width, F expert hidden width, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dsmoe_compiler.codegen.layer import Layer
from dsmoe_compiler.ir import ops, reference
from dsmoe_compiler.ir.body import parse_body
from dsmoe_compiler.ir.spec import ExpertsSpec, MoESpec, RouterSpec, SharedSpec, to_text
from dsmoe_compiler.runtime.layers import experts_layer, moe_layer

# What lies between the products, of gate `g` and up `u`, or of `u` alone.
MIDDLES = {
    "swiglu": "mul(silu({g}),{u})",
    "geglu": "mul(gelu({g}),{u})",
    "relu": "relu({u})",
    "gpt_oss": (
        "mul(add(clamp({u},-1.0,1.0),1.0),mul(clamp({g},None,1.0),sigmoid(mul(clamp({g},None,1.0),1.702))))"
    ),
    "odd": "mul(where(gt({g},0.0),log1p(abs({g})),elu({g},0.5,1.0,1.0)),softplus({u},1.0,20.0))",
}
LAYOUTS = ("stacked", "reversed", "interleaved", "separate")
ROUTERS = {
    "softmax": RouterSpec(top_k=1, score="softmax", logits_dtype="float32", renormalize=True),
    "groups": RouterSpec(
        top_k=1,
        score="sigmoid",
        logits_dtype="float32",
        selection_bias=True,
        groups=2,
        top_groups=2,
        group_score="top2",
        renormalize=True,
        epsilon=1e-20,
        scale=2.5,
    ),
    "selected": RouterSpec(
        top_k=1, score="softmax", select="logits", logits_dtype="float32", logits_bias=True
    ),
}


@dataclass(frozen=True)
class Made:
    """A layer with its tensors: `spec` is the operator's, `router` is empty where `ids` and `weights` are
    given.
    """

    spec: ExpertsSpec | MoESpec
    x: Tensor
    ids: Tensor
    weights: Tensor
    params: list[Tensor]
    router: list[Tensor]
    shared: list[Tensor]

    @property
    def layer(self) -> Layer:
        """As code generation sees it."""
        if isinstance(self.spec, MoESpec):
            return moe_layer(self.x, self.router, self.params, self.shared, to_text(self.spec))
        return experts_layer(self.x, self.ids, self.weights, self.params, to_text(self.spec))

    def given(self, added: bool) -> dict[str, object]:
        """What the layer's host function is called with; `added`: the shared experts' output with it."""
        if not isinstance(self.spec, MoESpec):
            return {"x": self.x, "ids": self.ids, "weights": self.weights, "params": self.params}
        given: dict[str, object] = {"x": self.x, "router": self.router, "params": self.params}
        if self.spec.shared:
            output = reference.shared_experts(self.x, self.shared, self.spec.shared)
            given |= {"added": output} if added else {"shared": self.shared}
        return given

    def operator(self) -> Tensor:
        """What the operator itself gives."""
        text = to_text(self.spec)
        if isinstance(self.spec, MoESpec):
            out = ops.MOE(self.x, self.router, self.params, self.shared, text)
        else:
            out = ops.EXPERTS(self.x, self.ids, self.weights, self.params, text)
        assert isinstance(out, Tensor)
        return out

    def expected(self) -> Tensor:
        """The exact answer: routed as the model routes, everything after in float64."""
        if not isinstance(self.spec, MoESpec):
            return _experts(self, self.ids, self.weights, self.spec)
        weights, ids = reference.route_tokens(self.x, self.router, self.spec)
        out = _experts(self, ids, weights, self.spec.experts)
        if self.spec.shared:
            out = out + reference.shared_experts(self.x.double(), _double(self.shared), self.spec.shared)
        return out


def make(
    *,
    body: str = "swiglu",
    layout: str = "stacked",
    transposed: bool = False,
    biased: bool = False,
    weighs: str = "output",
    router: str = "",
    shared: str = "",
    tokens: int = 7,
    sizes: tuple[int, int] = (32, 48),
    experts: int = 4,
    top_k: int = 2,
    dtype: str = "float32",
    load: str = "random",
    device: str = "cpu",
    seed: int = 0,
) -> Made:
    """A layer of this kind. `weighs`: where the routing weight meets the expert ("output", "input",
    "middle"); `shared`: "" or "plain" or "gated"; `load`: how ids fall where there is no router ("random",
    "one", "dropped").
    """
    torch.manual_seed(seed)
    hidden, width = sizes
    of_type = getattr(torch, dtype)
    gated = "{g}" in MIDDLES[body]
    text, shapes = _body(body, layout if gated else "stacked", transposed, biased, weighs, hidden, width)
    params = [(torch.randn(experts, *s, device=device) * 0.3).to(of_type) for s in shapes]
    x = torch.randn(tokens, hidden, device=device).to(of_type)
    spec = ExpertsSpec(experts, hidden, parse_body(text))
    if not router:
        ids = _ids(load, tokens, experts, top_k, device)
        weights = torch.rand(tokens, top_k, device=device).to(
            torch.float32 if weighs == "output" else of_type
        )
        return Made(spec, x, ids, weights, params, [], [])
    routing = ROUTERS[router]
    groups = 2 if routing.groups > 1 and experts % 2 == 0 and experts > 2 else 1
    # A product takes rows and matrices of one dtype: a weight before it has theirs.
    of_weights = None if weighs == "output" else dtype
    routing = replace(routing, top_k=top_k, groups=groups, top_groups=groups, weight_dtype=of_weights)
    tensors = [torch.randn(experts, hidden, device=device).to(of_type)]
    if routing.logits_bias:
        tensors.append(torch.randn(experts, device=device).to(of_type))
    if routing.selection_bias:
        tensors.append(torch.randn(experts, device=device) * 0.1)
    always, always_params = _shared(shared, hidden, 2 * width, of_type, device)
    whole = MoESpec(top_k=top_k, experts=spec, router=routing, shared=always)
    empty = torch.empty(0, device=device)
    return Made(whole, x, empty, empty, params, tensors, always_params)


def _body(
    name: str, layout: str, transposed: bool, biased: bool, weighs: str, hidden: int, width: int
) -> tuple[str, list[tuple[int, ...]]]:
    """The body's text and its tensors' shapes."""
    product = "matmul" if transposed else "linear"
    shapes = list[tuple[int, ...]]()

    def matrix(row: str, outputs: int, inputs: int) -> str:
        shapes.append((inputs, outputs) if transposed else (outputs, inputs))
        text = f"{product}({row},p{len(shapes) - 1})"
        if biased:
            shapes.append((outputs,))
            text = f"add({text},p{len(shapes) - 1})"
        return text

    row = {"input": "mul(x,w)", "input's sigmoid": "mul(x,sigmoid(w))"}.get(weighs, "x")
    if "{g}" not in MIDDLES[name]:
        lets, gate, up = "", "", matrix(row, width, hidden)
    elif layout == "separate":
        lets, gate, up = "", matrix(row, width, hidden), matrix(row, width, hidden)
    else:
        lets = f"h={matrix(row, 2 * width, hidden)}; "
        first, second = f"slice(h,0,{width},1)", f"slice(h,{width},{2 * width},1)"
        if layout == "interleaved":
            first, second = f"slice(h,0,{2 * width},2)", f"slice(h,1,{2 * width},2)"
        gate, up = (second, first) if layout == "reversed" else (first, second)
    middle = MIDDLES[name].format(g=gate, u=up)
    if weighs == "middle":
        middle = f"mul({middle},w)"
    last = matrix(middle, hidden, width)
    return lets + (f"mul({last},w)" if weighs == "output" else last), shapes


def _shared(
    kind: str, hidden: int, width: int, dtype: torch.dtype, device: str
) -> tuple[SharedSpec | None, list[Tensor]]:
    if not kind:
        return None, []
    shapes = [(width, hidden), (width, hidden), (hidden, width)]
    text = "linear(mul(silu(linear(x,p0)),linear(x,p1)),p2)"
    if kind == "gated":
        shapes.append((1, hidden))
        text = f"mul({text},sigmoid(linear(x,p3)))"
    params = [(torch.randn(s, device=device) * 0.3).to(dtype) for s in shapes]
    return SharedSpec(parse_body(text), width, gated=kind == "gated"), params


def _ids(load: str, tokens: int, experts: int, top_k: int, device: str) -> Tensor:
    """Which experts the tokens choose: at random; all the same first ones; at random with some dropped."""
    if not tokens:
        return torch.empty(0, top_k, dtype=torch.int64, device=device)
    if load == "one":
        return torch.arange(top_k, device=device).expand(tokens, top_k).contiguous()
    ids = torch.rand(tokens, experts, device=device).topk(top_k, dim=-1).indices
    return ids.masked_fill(torch.rand(ids.shape, device=device) < 0.3, -1) if load == "dropped" else ids


def _experts(made: Made, ids: Tensor, weights: Tensor, spec: ExpertsSpec) -> Tensor:
    return reference.experts(made.x.double(), ids, weights.double(), _double(made.params), spec)


def _double(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.double() for t in tensors]
