"""Remarks: one for each part of a layer that a pass fused or left, none for what stayed as it was."""

from dataclasses import replace

from dsmoe_compiler.ir.errors import Refusal
from dsmoe_compiler.ir.passes import LayerFacts, Remark
from dsmoe_compiler.ir.spec import MoESpec
from dsmoe_compiler.report.remarks import PassRemark, remarks_of

WHY = Refusal("R301", "an operator is not known", "cos_1", "mine.py:7")


def told(before: LayerFacts | None, after: LayerFacts, *said: Remark) -> list[str]:
    """The remarks of a pass of that name, without what all of them say."""
    known = {} if before is None else {before.name: before}
    lines = [str(each) for each in remarks_of("a_pass", known, {after.name: after}, said)]
    return [line.replace(": remark: [a_pass] mlp: ", ": ") for line in lines if "[a_pass] mlp" in line]


def layer(spec: MoESpec | None, refusal: Refusal | None = None, name: str = "mlp") -> LayerFacts:
    return LayerFacts(name, "an idiom", spec, refusal, "mine.py:3")


def test_each_part_is_told_by_the_pass_that_fused_it(deepseek_moe_145b: MoESpec) -> None:
    whole = deepseek_moe_145b
    experts = replace(whole, router=None, shared=None)
    routed = replace(whole, shared=None)
    assert told(None, layer(experts)) == [
        "mine.py:3: fused 128 experts, top-12: SwiGLU [gate;up] D=4096 F=1408 (an idiom)"
    ]
    assert told(layer(experts), layer(routed)) == ["mine.py:3: fused the router: softmax→top-12"]
    assert told(layer(routed), layer(whole)) == ["mine.py:3: fused the shared experts: F=5632"]
    assert told(layer(whole), layer(whole)) == []


def test_a_refusal_stands_at_its_own_line_and_is_told_once() -> None:
    refused = layer(None, WHY)
    assert told(None, refused) == ["mine.py:7: missed: R301: an operator is not known (at %cos_1)"]
    assert told(refused, refused) == []


def test_a_rewrite_taken_back_is_missed(router_as_written: MoESpec) -> None:
    before = layer(router_as_written)
    after = replace(before, remarks=("R203: other numbers (at %moe)",))
    assert told(before, after) == ["mine.py:3: missed: R203: other numbers (at %moe)"]


def test_what_the_pass_says_itself(router_as_written: MoESpec) -> None:
    facts = layer(router_as_written)
    missed, noted = Remark("mlp", "router as written", WHY), Remark("mlp", "a fact")
    assert told(facts, facts, missed, noted) == [
        "mine.py:7: missed: R301: an operator is not known (at %cos_1); router as written",
        "mine.py:3: a fact",
    ]
    kinds = [each.kind for each in remarks_of("a_pass", {"mlp": facts}, {"mlp": facts}, (missed, noted))]
    assert kinds == ["missed", "analysis"]


def test_the_whole_model_and_an_unknown_line_have_names() -> None:
    assert str(PassRemark("passed", "a_pass", "", "done", "")) == "<unknown>: remark: [a_pass] (model): done"


def test_layers_are_told_in_their_order(router_as_written: MoESpec) -> None:
    second, first = (replace(layer(router_as_written, name=n), order=i) for n, i in (("b", 2), ("a", 1)))
    remarks = remarks_of("a_pass", {}, {"b": second, "a": first}, ())
    assert [each.layer for each in remarks] == ["a", "b"]
