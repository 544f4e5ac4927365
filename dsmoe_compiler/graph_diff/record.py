"""A comparison as a record for JSON, every name in full."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from dsmoe_compiler.graph_diff.change import Change
from dsmoe_compiler.graph_diff.compare import GraphDiff
from dsmoe_compiler.graph_diff.facts import GraphFacts, Layer, Tensor, TensorType, Value


def as_record(diff: GraphDiff) -> dict[str, Any]:
    """Sides, then what differs; None for what was not compared."""
    tensors = diff.tensors
    return {
        "same": diff.same,
        "a": _side(diff.a),
        "b": _side(diff.b),
        "not_compared": list(diff.left_out),
        "operators": None
        if diff.operators is None
        else [{"name": c.name, "a": c.before or 0, "b": c.after or 0} for c in diff.operators],
        "rewired": None if diff.rewired is None else asdict(diff.rewired),
        "layers": None if diff.layers is None else [_change(c) for c in diff.layers],
        "tensors": {
            "added": list(map(_tensor, tensors.added)),
            "removed": list(map(_tensor, tensors.removed)),
            "renamed": [{"a": _tensor(x), "b": _tensor(y)} for x, y in tensors.renamed],
            "changed": [_change(c) for c in tensors.changed],
            "turned": [_change(c) for c in tensors.turned],
            "rewritten": list(map(_tensor, tensors.rewritten)),
            "same": tensors.same,
            "unread": [asdict(each) for each in tensors.unread],
        },
        "inputs": [_change(c) for c in diff.inputs],
        "outputs": [_change(c) for c in diff.outputs],
        "properties": [_change(c) for c in diff.properties],
    }


def _side(facts: GraphFacts) -> dict[str, Any]:
    return {
        "source": facts.source,
        "form": facts.form,
        "vocabulary": facts.vocabulary,
        **asdict(facts.size),
        "operators": dict(sorted(facts.operators.items())),
        "tensors": len(facts.tensors),
        "inputs": list(map(_value, facts.inputs)),
        "outputs": list(map(_value, facts.outputs)),
        "layers": None if facts.layers is None else [asdict(layer) for layer in facts.layers],
        "properties": dict(facts.properties),
        "notes": list(facts.notes),
    }


def _change(change: Change[Any]) -> dict[str, Any]:
    return {"name": change.name, "a": _said(change.before), "b": _said(change.after)}


def _said(item: Layer | Tensor | Value | str | None) -> Any:
    match item:
        case Tensor():
            return _tensor(item)
        case Value():
            return _value(item)
        case Layer():
            return asdict(item)
    return item


def _tensor(tensor: Tensor) -> dict[str, Any]:
    return {"name": tensor.name, **_type(tensor.type), "bytes": tensor.bytes}


def _value(value: Value) -> dict[str, Any]:
    return {"name": value.name, **_type(value.type)}


def _type(type_: TensorType) -> dict[str, Any]:
    return {"dtype": type_.dtype, "shape": None if type_.shape is None else list(type_.shape)}
