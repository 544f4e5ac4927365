"""What a Mixture-of-Experts layer *is*: frozen facts, one canonical line of text each.

Everything downstream of the understanding (op, passes, code generation, exports, plan) shares these and
nothing else. A spec travels as text inside the graph, so a printed graph, a saved file and an exported node
say the same:

    moe(top_k=6,experts=experts(count=64,hidden=2048,body="h=linear(x,p0); …"),router=router(top_k=6,…))

Letters: T tokens, D model width, F expert hidden width, E routed experts, K experts per token.
"""

from __future__ import annotations

import ast
from dataclasses import MISSING, dataclass, fields
from functools import cached_property, lru_cache
from threading import Lock
from typing import Any, Literal, TypeVar

from dsmoe_compiler.ir.body import ACTIVATIONS, GEMMS, Body, Step, parse_body

DTYPES = ("float64", "float32", "bfloat16", "float16")
# The operators of bodies that the field has names for.
_PLAIN = (
    ACTIVATIONS
    | GEMMS
    | {"x", "w", "p", "const", "add", "sub", "mul", "minimum", "maximum", "neg", "clamp", "cast", "slice"}
)


@dataclass(frozen=True)
class ExpertsSpec:
    """The routed experts: out[t] = Σ_k body(x[t], w[t,k], P[ids[t,k]]), summed over k in the body's own
    dtype.

    `count` is E, `hidden` D (the width of x), `body` the expert's maths with the routing weight `w` where the
    model applies it, `out_dtype` the dtype the sum is cast to (None: not cast).
    """

    count: int
    hidden: int
    body: Body
    out_dtype: str | None = None

    def __post_init__(self) -> None:
        _positive(self, "count", "hidden")
        _dtype(self, "out_dtype")
        if not self.body.param_count and self.count > 1:
            raise ValueError("experts whose body reads no parameter are one and the same")

    @cached_property
    def weighting(self) -> Literal["output", "inside", "none"]:
        """Where the routing weight meets the expert: on its output, somewhere inside, or nowhere."""
        if not self.body.uses("w"):
            return "none"
        steps, at = self.body.steps, self.body.result
        while steps[at].op == "cast":
            at = steps[at].args[0]
        if steps[at].op == "mul" and _is_weight(self.body, steps[at].args[1]):
            used = [s for i, s in enumerate(steps) if i != at for a in s.args if steps[a].op == "w"]
            if all(s.op == "cast" for s in used):
                return "output"
        return "inside"

    @cached_property
    def kind(self) -> str:
        """The field's name for the body: "SwiGLU", "GeGLU", "clamped SwiGLU", "ReLU FFN", … or "custom"."""
        return _kind(self.body)

    @cached_property
    def layout(self) -> str:
        """How gate and up lie in memory: "[gate;up]", "[up;gate]", "interleaved", "separate" or "" when not
        gated.
        """
        return _layout(self.body)

    def __str__(self) -> str:
        biased = " + bias" if self._biased else ""
        layout = f" {self.layout}" if self.layout else ""
        return f"{self.kind}{layout}{biased} D={self.hidden}{self._width}"

    @property
    def _biased(self) -> bool:
        steps = self.body.steps
        return any(s.op == "add" and any(steps[a].op == "p" for a in s.args) for s in steps)

    @property
    def _width(self) -> str:
        stops = [s.attrs for s in self.body.steps if s.op == "slice"]
        widths = {_slice_width(a) for a in stops}
        return f" F={widths.pop()}" if len(widths) == 1 and None not in widths else ""


@dataclass(frozen=True)
class RouterSpec:
    """From a token's logits to K expert ids and weights.

    `score` turns logits into scores over all E experts before top-k (`select="scores"`) or over the K
    selected logits after it (`select="logits"`). Selection may add a bias that does not weigh
    (`selection_bias`, DeepSeek-V3 eq. 16) and keep only the best `top_groups` of `groups` groups, each group
    scored by its best or its two best experts, rejected experts' scores replaced by `group_fill`. Weights are
    the selected (unbiased) scores, or what top-k ranked (`weigh="ranked"`: a rejected expert that is chosen
    all the same weighs `group_fill`, DeepSeek-V2 §2.2), divided by their sum + `epsilon` when `renormalize`,
    times `scale`, cast to `weight_dtype`. `logits_dtype` is the dtype x and the router's weight are cast to
    before the product, `score_dtype` that of the scores; None: as they come.
    """

    top_k: int
    score: Literal["softmax", "sigmoid"]
    select: Literal["scores", "logits"] = "scores"
    renormalize: bool = False
    epsilon: float = 0.0
    scale: float = 1.0
    logits_bias: bool = False
    selection_bias: bool = False
    groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2"] = "max"
    group_fill: float = 0.0
    weigh: Literal["scores", "ranked"] = "scores"
    logits_dtype: str | None = None
    score_dtype: str | None = None
    weight_dtype: str | None = None

    def __post_init__(self) -> None:
        _positive(self, "top_k", "groups", "top_groups")
        _dtype(self, "logits_dtype", "score_dtype", "weight_dtype")
        if self.top_groups > self.groups:
            raise ValueError(f"router keeps {self.top_groups} of {self.groups} groups")
        if self.select == "logits" and (self.selection_bias or self.groups > 1):
            raise ValueError("a router that scores after top-k has neither selection bias nor groups")
        if self.weigh == "ranked" and (self.selection_bias or self.groups == 1):
            raise ValueError("what is ranked weighs: scores of groups, without a bias that only selects")

    def __str__(self) -> str:
        order = (
            f"{self.score}→top-{self.top_k}" if self.select == "scores" else f"top-{self.top_k}→{self.score}"
        )
        if self.selection_bias:
            order = order.replace("→", "+bias→")
        if self.groups > 1:
            order += f" in {self.top_groups}/{self.groups} groups by {self.group_score}"
        renormalized = ", renormalized" if self.renormalize else ""
        scaled = f", ×{self.scale:g}" if self.scale != 1.0 else ""
        return order + renormalized + scaled


@dataclass(frozen=True)
class SharedSpec:
    """Shared experts: body(x) is added to every token's routed sum. Its `p0`, `p1`, … are whole tensors.

    `width` is the hidden width of all shared experts together (S·F), `gated` whether a per-token sigmoid
    scales them.
    """

    body: Body
    width: int
    gated: bool = False

    def __post_init__(self) -> None:
        _positive(self, "width")
        if self.body.uses("w"):
            raise ValueError("shared experts have no routing weight")

    def __str__(self) -> str:
        return f"shared {self.width} wide" + (", sigmoid-gated" if self.gated else "")


@dataclass(frozen=True)
class MoESpec:
    """A whole layer: `router` is None where it stayed in the graph as written, `shared` where there is
    none.
    """

    top_k: int
    experts: ExpertsSpec
    router: RouterSpec | None = None
    shared: SharedSpec | None = None

    def __post_init__(self) -> None:
        _positive(self, "top_k")
        if self.router and self.router.top_k != self.top_k:
            raise ValueError(f"the router selects {self.router.top_k} experts, the layer {self.top_k}")

    def __str__(self) -> str:
        router = str(self.router) if self.router else f"top-{self.top_k}, router as written"
        shared = f" | {self.shared}" if self.shared else ""
        return f"E={self.experts.count} {router} | {self.experts}{shared}"

    @property
    def text(self) -> str:
        """The canonical line; `parse` reads it back."""
        return to_text(self)


Spec = TypeVar("Spec", MoESpec, ExpertsSpec, RouterSpec, SharedSpec)
_NAMES: dict[str, type] = {"moe": MoESpec, "experts": ExpertsSpec, "router": RouterSpec, "shared": SharedSpec}


def to_text(spec: object) -> str:
    """The canonical line of any spec: its name and every field that is not at its default."""
    name = next(n for n, kind in _NAMES.items() if kind is type(spec))
    parts = []
    for f in fields(spec):  # type: ignore[arg-type]
        value = getattr(spec, f.name)
        if f.default is MISSING or value != f.default:
            parts.append(f"{f.name}={_value_text(value)}")
    return f"{name}({','.join(parts)})"


# Before Python 3.11.8, two threads that build syntax trees at once corrupt one counter of the interpreter and
# get a SystemError (CPython issue 106905). An op reads its spec where it runs, in whichever thread that is.
_ONE_AT_A_TIME = Lock()


def parse(text: str, kind: type[Spec]) -> Spec:
    """The inverse of `to_text`. Raises ValueError when `text` is not a `kind`."""
    try:
        value = _parsed(text)
    except (SyntaxError, TypeError, KeyError) as e:
        raise ValueError(f"not a spec: {text!r}") from e
    if not isinstance(value, kind):
        raise ValueError(f"not a {kind.__name__}: {text!r}")
    return value


@lru_cache(maxsize=1024)
def _parsed(text: str) -> Any:
    with _ONE_AT_A_TIME:
        return _read(ast.parse(text, mode="eval").body)


def _value_text(value: object) -> str:
    if isinstance(value, Body):
        return f'"{value}"'
    if isinstance(value, str):
        return f'"{value}"'
    if type(value) in _NAMES.values():
        return to_text(value)
    return repr(value).replace("inf", "1e999")


def _read(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        values = {k.arg: _read(k.value) for k in node.keywords if k.arg}
        if "body" in values:
            values["body"] = parse_body(values["body"])
        return _NAMES[node.func.id](**values)
    return ast.literal_eval(node)


def _positive(spec: object, *names: str) -> None:
    for name in names:
        value = getattr(spec, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{type(spec).__name__}.{name} is a positive integer, got {value!r}")


def _dtype(spec: object, *names: str) -> None:
    for name in names:
        value = getattr(spec, name)
        if value is not None and value not in DTYPES:
            raise ValueError(f"{type(spec).__name__}.{name} is one of {', '.join(DTYPES)}, got {value!r}")


def _is_weight(body: Body, at: int) -> bool:
    while body.steps[at].op == "cast":
        at = body.steps[at].args[0]
    return body.steps[at].op == "w"


def _slice_width(attrs: tuple[Any, ...]) -> int | None:
    start, stop, step = attrs
    return None if stop is None else -(-(stop - start) // step)


def _gating(body: Body) -> Step | None:
    """The product of activated gate and up: a `mul` of two row values, one of which passed an activation."""
    for step in body.steps:
        if step.op == "mul" and all(_below(body, a) & GEMMS for a in step.args):
            return step
    return None


def _below(body: Body, at: int) -> set[str]:
    """The operators between a step and the GEMMs under it, the GEMMs included."""
    return {step.op for step in _down_to_gemms(body, [at])}


def _kind(body: Body) -> str:
    ops = {s.op for s in body.steps}
    activations = sorted(ops & ACTIVATIONS)
    if len(activations) != 1 or ops - _PLAIN:
        return "custom"
    names = {"silu": "SwiGLU", "gelu": "GeGLU", "gelu_tanh": "GeGLU(tanh)", "relu": "ReGLU", "sigmoid": "GLU"}
    clamped = "clamped " if "clamp" in ops else ""
    gating = _gating(body)
    if gating is None:
        return f"{clamped}{activations[0]} FFN"
    if activations == ["sigmoid"] and any(s.op == "const" for s in body.steps):
        return f"{clamped}SwiGLU"  # gate · sigmoid(α · gate) · (up + 1)
    return clamped + names.get(activations[0], f"{activations[0]} GLU")


def _layout(body: Body) -> str:
    steps = body.steps
    if not any(s.op == "slice" for s in steps):
        return "separate" if _gating(body) else ""
    if any(s.op == "slice" and s.attrs[2] == 2 for s in steps):
        return "interleaved"
    gate = [
        s
        for s in _down_to_gemms(body, [i for i, s in enumerate(body.steps) if s.op in ACTIVATIONS])
        if s.op == "slice"
    ]
    return "[gate;up]" if gate and gate[0].attrs[0] == 0 else "[up;gate]"


def _down_to_gemms(body: Body, start: list[int]) -> list[Step]:
    """The steps from `start` down to the GEMMs they depend on, those included."""
    found, stack = list[Step](), list(start)
    while stack:
        step = body.steps[stack.pop()]
        found.append(step)
        if step.op not in GEMMS:
            stack.extend(step.args)
    return found
