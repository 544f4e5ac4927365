"""What values mean, in the field's words: one phrase for each class of `values.Value`.

rows of the pairs sorted by expert: silu(x·gate_e) * (x·up_e), width 48
which pair each row is, of the pairs sorted by expert
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dsmoe_compiler.passes.lift import values
from dsmoe_compiler.passes.lift.formula import formula
from dsmoe_compiler.passes.lift.values import Domain, OneExpert, Pairs, Rows, Value

if TYPE_CHECKING:
    from dsmoe_compiler.passes.lift.state import Lift

_AXES = {"T": "token", "K": "slot", "P": "pair", "E": "expert", "Q": "pair, slot by slot,", "C": "place"}
_FEW = 4  # experts listed one by one


def describe(lift: Lift, found: Value) -> str:
    """The value in words. A class without a phrase of its own is called by its name."""
    phrase = PHRASES.get(type(found))
    if phrase is None:
        return re.sub(r"(?<!^)(?=[A-Z])", " ", type(found).__name__).lower()
    return phrase(lift, found)


def rows_of(domain: Domain) -> str:
    """Which rows there are: "rows of the pairs sorted by expert"."""
    if isinstance(domain, OneExpert):
        return f"rows of {_of_expert(domain)}"
    if isinstance(domain, Pairs) and domain.ids is None:
        return f"rows of the tokens, {domain.slots} times each"
    if isinstance(domain, Pairs):
        return f"rows of the {domain.words}"
    return f"rows of {domain.words}"


def _of_expert(domain: OneExpert) -> str:
    return f"expert {domain.expert}" + ("" if domain.slot is None else f" in slot {domain.slot}")


def _permutation(domain: Pairs | OneExpert) -> str:
    if isinstance(domain, OneExpert):
        return f"the pairs that chose {_of_expert(domain)}"
    return "the permutation that sorts the pairs by expert"


def _tokens(domain: Pairs | OneExpert) -> str:
    if isinstance(domain, OneExpert):
        return f"the tokens that chose {_of_expert(domain)}"
    return f"the token of each pair, {domain.words}"


def _rows(lift: Lift, rows: Rows) -> str:
    text = formula(lift.terms, rows.term, _tensors(lift))
    if rows.is_matrix:
        sizes = " x ".join(str(s) for s in rows.trail if s != 1)
        return f"{rows_of(rows.domain)}: the matrix {text}, {sizes}"
    if of_weights_alone(lift, rows):
        return f"routing weights of {rows.domain.words}: {text}"
    return f"{rows_of(rows.domain)}: {text}, width {rows.width}"


def of_weights_alone(lift: Lift, rows: Rows) -> bool:
    """Whether rows are made of nothing but routing weights: neither tokens nor experts are in them."""
    return not any(lift.terms.leaves(rows.term, op) for op in ("token", "expert", "own"))


def _tensors(lift: Lift) -> Mapping[str, str]:
    """What experts' parameters are called, by the names that terms have for them."""
    one = {
        name: lift.graph.parameter(node) or name
        for name, node in {**lift.params, **lift.own, **lift.shared}.items()
    }
    packs = {name: lift.graph.parameter(parts[0]) or name for name, parts in lift.packs.items()}
    return {name: _short(dotted) for name, dotted in {**one, **packs}.items()}


def _short(dotted: str) -> str:
    """w1 for "layers.3.experts.7.w1.weight"."""
    parts = [p for p in dotted.split(".") if not p.isdecimal()]
    if len(parts) > 1 and parts[-1] == "weight":
        return parts[-2]
    return ".".join(parts[-2:]) if len(parts) > 1 and parts[-1] == "bias" else parts[-1]


def _per(axes: str) -> str:
    return " and ".join(_AXES[a] for a in axes if a in _AXES)


def _visited(visits: Sequence[Any]) -> str:
    experts = sorted({v.expert for v in visits})
    if len(experts) <= _FEW:
        return f"expert{'s' * (len(experts) > 1)} {', '.join(map(str, experts))}"
    return f"{len(experts)} experts"


def _several(lift: Lift, parts: Sequence[Value | None]) -> str:
    phrases = [describe(lift, p) for p in parts if p is not None]
    return "; ".join(dict.fromkeys(phrases[:_FEW])) + ("; …" if len(phrases) > _FEW else "")


def _one_hot(lift: Lift, hot: values.OneHot) -> str:
    what = "1" if hot.weight is None else "the pair's weight"
    placed = " at its place in the expert's queue" if hot.place is not None else ""
    return f"{what} where a pair chose an expert{placed}, 0 elsewhere: one-hot over {hot.experts} experts"


PHRASES: Mapping[type[Any], Callable[[Lift, Any], str]] = {
    values.Rows: _rows,
    values.ExpertsLast: lambda lift, v: f"{_rows(lift, v.rows)}, the experts' dimension last",
    values.Parts: lambda lift, v: _several(lift, v.items),
    values.SortedIds: lambda lift, v: "the experts of the pairs, sorted",
    values.Permutation: lambda lift, v: _permutation(v.domain),
    values.InversePermutation: lambda lift, v: f"the inverse of {_permutation(v.domain)}",
    values.TokenOf: lambda lift, v: _tokens(v.domain),
    values.SlotOf: lambda lift, v: f"the slots in which tokens chose {_of_expert(v.domain)}",
    values.Along: lambda lift, v: f"where {_tokens(v.domain)} lie along dimension {v.axis}",
    values.Folded: lambda lift, v: _rows(lift, v.rows),
    values.Counts: lambda lift, v: f"how many pairs each of {v.experts} experts has",
    values.Offsets: lambda lift, v: f"where each of {v.experts} experts' rows end among the sorted",
    values.OneHot: _one_hot,
    values.Queue: lambda lift, v: f"each pair's place in its expert's queue, counted from {v.start}",
    values.OwnPlaces: lambda lift, v: "each pair's place in the queue of its expert, 0 for other experts",
    values.Place: lambda lift, v: "each pair's place in its expert's queue",
    values.PlaceHot: lambda lift, v: "one-hot of each pair's place in its expert's queue",
    values.Within: lambda lift, v: "where a pair's place is within its expert's capacity",
    values.Flags: lambda lift, v: "1 for the pairs that are kept, 0 for those that are dropped",
    values.KeptWeights: lambda lift, v: "the kept pairs' weights, 0 for those that are dropped",
    values.Totals: lambda lift, v: "how many pairs chose each expert, as a row",
    values.Dispatch: lambda lift, v: "which pair sits in which capacity slot of which expert",
    values.MultiHot: lambda lift, v: f"1 where a token chose one of {v.experts} experts, 0 elsewhere",
    values.Mask: lambda lift, v: f"where a {_per(v.axes)} chose expert {v.expert}",
    values.Outside: lambda lift, v: f"where a {_per(v.mask.axes)} did not choose expert {v.mask.expert}",
    values.Coordinates: lambda lift, v: _several(lift, v.items),
    values.Spread: lambda lift, v: f"{describe(lift, v.at)}, for each of {v.width} numbers of a row",
    values.Count: lambda lift, v: f"how many pairs chose experts {v.first} to {v.stop - 1}",
    values.Column: lambda lift, v: (
        f"a number a token, where it chose {_of_expert(v.domain)}: "
        f"{formula(lift.terms, v.term, _tensors(lift))}"
    ),
    values.MaskedWeights: lambda lift, v: f"the weights of pairs of {_of_expert(v.domain)}, else 0",
    values.PartialSum: lambda lift, v: f"each token's sum over {_visited(v.visits)}, width {v.width}",
    values.SlotSum: lambda lift, v: (
        f"each token's sum over {len(v.terms)} of its {v.slots} slots, width {v.width}"
    ),
    values.DenseSum: lambda lift, v: (
        f"each token's sum over {_visited(v.visits)}, each run on every token, width {v.width}"
    ),
    values.PartialRows: lambda lift, v: f"the pairs' rows, those of {_visited(v.visits)} written so far",
    values.Filled: lambda lift, v: f"a fresh tensor of {v.number:g}",
    values.Scratch: lambda lift, v: "a fresh tensor without content",
    values.Range: lambda lift, v: "0, 1, 2, …",
    values.Combined: lambda lift, v: f"each token's sum over {_rows(lift, v.rows)}",
}
