"""The layers that kernels are judged by: S1 … S6, each with its model's router and body, on the meta device.

D model width, F expert hidden width, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dsmoe_compiler.codegen.layer import Layer
from dsmoe_compiler.ir.body import parse_body
from dsmoe_compiler.ir.spec import ExpertsSpec, MoESpec, RouterSpec, SharedSpec, to_text
from dsmoe_compiler.runtime.layers import moe_layer

TOKENS = (1, 8, 64, 512, 4096, 16384)


@dataclass(frozen=True)
class Shape:
    """One model's layer: `shared` is the hidden width of its shared experts together, 0 without; `gpt_oss`:
    gate and up in alternate columns of transposed matrices, with biases and clamps.
    """

    name: str
    like: str
    hidden: int
    width: int
    experts: int
    router: RouterSpec
    shared: int = 0
    gpt_oss: bool = False

    @property
    def spec(self) -> MoESpec:
        """What the layer is."""
        experts = ExpertsSpec(self.experts, self.hidden, parse_body(self._body))
        shared = SharedSpec(parse_body(_SHARED), self.shared) if self.shared else None
        return MoESpec(self.router.top_k, experts, self.router, shared)

    @property
    def _body(self) -> str:
        f = self.width
        if not self.gpt_oss:
            return f"h=linear(x,p0); mul(linear(mul(silu(slice(h,0,{f},1)),slice(h,{f},{2 * f},1)),p1),w)"
        return (
            f"h=add(matmul(x,p0),p1); g=clamp(slice(h,0,{2 * f},2),None,7.0); "
            f"u=add(clamp(slice(h,1,{2 * f},2),-7.0,7.0),1.0); "
            "mul(add(matmul(mul(u,mul(g,sigmoid(mul(g,1.702)))),p2),p3),w)"
        )

    @property
    def params(self) -> list[tuple[int, ...]]:
        """The experts' tensors' sizes."""
        d, f, e = self.hidden, self.width, self.experts
        return [(e, d, 2 * f), (e, 2 * f), (e, f, d), (e, d)] if self.gpt_oss else [(e, 2 * f, d), (e, d, f)]

    @property
    def router_params(self) -> list[tuple[int, ...]]:
        """The router's tensors' sizes."""
        biases = int(self.router.logits_bias) + int(self.router.selection_bias)
        return [(self.experts, self.hidden), *[(self.experts,)] * biases]

    @property
    def shared_params(self) -> list[tuple[int, ...]]:
        """The shared experts' tensors' sizes."""
        d, f = self.hidden, self.shared
        return [(f, d), (f, d), (d, f)] if f else []

    def layer(self, dtype: torch.dtype = torch.bfloat16) -> Layer:
        """As code generation sees it."""
        x = torch.empty(1, self.hidden, dtype=dtype, device="meta")
        groups = (self.router_params, self.params, self.shared_params)
        router, params, shared = ([torch.empty(s, dtype=dtype, device="meta") for s in g] for g in groups)
        return moe_layer(x, router, params, shared, to_text(self.spec))


_SHARED = "linear(mul(silu(linear(x,p0)),linear(x,p1)),p2)"


def _softmax(top_k: int, renormalize: bool) -> RouterSpec:
    return RouterSpec(
        top_k=top_k,
        score="softmax",
        score_dtype="float32",
        renormalize=renormalize,
        weight_dtype="bfloat16",
    )


SHAPES: dict[str, Shape] = {
    s.name: s
    for s in (
        Shape("S1", "DeepSeekMoE-16B", 2048, 1408, 64, _softmax(6, False), shared=2816),
        Shape("S2", "Mixtral-8x7B", 4096, 14336, 8, _softmax(2, True)),
        Shape("S3", "Qwen3-30B-A3B", 2048, 768, 128, _softmax(8, True)),
        Shape(
            "S4",
            "DeepSeek-V3",
            7168,
            2048,
            256,
            RouterSpec(
                top_k=8,
                score="sigmoid",
                logits_dtype="float32",
                selection_bias=True,
                groups=8,
                top_groups=4,
                group_score="top2",
                renormalize=True,
                epsilon=1e-20,
                scale=2.5,
                weight_dtype="bfloat16",
            ),
            shared=2048,
        ),
        Shape("S5", "OLMoE", 2048, 1024, 64, _softmax(8, False)),
        Shape(
            "S6",
            "gpt-oss-120b",
            2880,
            2880,
            128,
            RouterSpec(top_k=4, score="softmax", select="logits", logits_bias=True),
            gpt_oss=True,
        ),
    )
}
