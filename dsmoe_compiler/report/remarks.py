"""What one pass did to each layer and what it left, a line each, as LLVM's compilers say it:

experts.py:78: remark: [lift_experts] model.layers.0.mlp: fused 64 experts, top-6: SwiGLU …
mine.py:31: remark: [lift_experts] model.layers.1.mlp: missed: R301: aten.cos is not known (at %cos_1)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from dsmoe_compiler.ir.errors import Refusal
from dsmoe_compiler.ir.passes import LayerFacts, Remark
from dsmoe_compiler.ir.spec import MoESpec
from dsmoe_compiler.report.story import WHOLE_MODEL

Kind: TypeAlias = Literal["passed", "missed", "analysis"]


@dataclass(frozen=True)
class PassRemark:
    """`kind` is "passed" for something fused, "missed" for something left with a reason, else "analysis".

    `source` is the user's "file.py:123", or "" when the graph does not say.
    """

    kind: Kind
    step: str
    layer: str
    text: str
    source: str

    def __str__(self) -> str:
        said = f"missed: {self.text}" if self.kind == "missed" else self.text
        return f"{self.source or '<unknown>'}: remark: [{self.step}] {self.layer or WHOLE_MODEL}: {said}"


def remarks_of(
    step: str, before: Mapping[str, LayerFacts], after: Mapping[str, LayerFacts], said: Sequence[Remark]
) -> tuple[PassRemark, ...]:
    """A pass's remarks, in the order of the layers, then what it `said` itself.

    `before` and `after` are what was known of the layers around it.
    """
    layers = sorted(after.values(), key=lambda facts: facts.order)
    told = [remark for facts in layers for remark in _of_layer(step, before.get(facts.name), facts)]
    return (*told, *(_of_log(step, remark, after) for remark in said))


def _of_layer(step: str, before: LayerFacts | None, after: LayerFacts) -> Iterator[PassRemark]:
    for gained in _gained(before.spec if before else None, after):
        yield PassRemark("passed", step, after.name, gained, after.source)
    if after.refusal is not None and (before is None or before.refusal != after.refusal):
        yield _missed(step, after.name, "", after.refusal, after.source)
    for text in after.remarks[len(before.remarks) if before else 0 :]:  # validation took a rewrite back
        yield PassRemark("missed", step, after.name, text, after.source)


def _gained(before: MoESpec | None, after: LayerFacts) -> Iterator[str]:
    """The parts of the layer that are in the op now and were not."""
    spec = after.spec
    if spec is None:
        return
    if before is None or before.experts != spec.experts:
        yield f"fused {spec.experts.count} experts, top-{spec.top_k}: {spec.experts} ({after.idiom})"
    if spec.router and (before is None or before.router != spec.router):
        yield f"fused the router: {spec.router}"
    if spec.shared and (before is None or before.shared != spec.shared):
        gated = ", gated" if spec.shared.gated else ""
        yield f"fused the shared experts: F={spec.shared.width}{gated}"


def _of_log(step: str, remark: Remark, layers: Mapping[str, LayerFacts]) -> PassRemark:
    source = layers[remark.layer].source if remark.layer in layers else ""
    if remark.refusal is None:
        return PassRemark("analysis", step, remark.layer, remark.text, source)
    return _missed(step, remark.layer, remark.text, remark.refusal, source)


def _missed(step: str, layer: str, what: str, refusal: Refusal, source: str) -> PassRemark:
    """The refusal's line of source stands first in a remark, so it need not be said again."""
    text = "; ".join(part for part in (str(replace(refusal, source="")), what) if part)
    return PassRemark("missed", step, layer, text, refusal.source or source)
