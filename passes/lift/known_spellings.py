"""The spellings that fuse, a line each, and which of them a value is on the way to."""

from __future__ import annotations

from dsmoe_compiler.ir.explanation import Spelling
from dsmoe_compiler.passes.lift import values
from dsmoe_compiler.passes.lift.values import Capacity, Everywhere, OneExpert, Pairs, Value

SORTED = Spelling(
    "sorted, grouped GEMM",
    "perm = ids.view(-1).argsort()\n"
    "y = grouped_mm(x[perm // K], W, offsets) * w.view(-1)[perm].unsqueeze(-1)\n"
    "out = y[perm.argsort()].view(T, K, D).sum(1)",
    "offsets that count the ids that were sorted, tokens at perm // K, and the inverse of the same "
    "permutation before the sum over the slots (or index_add onto zeros at perm // K)",
)
GATHERED = Spelling(
    "gathered weights, batched GEMM",
    "y = bmm(W[ids.view(-1)], x.repeat_interleave(K, 0).unsqueeze(-1)).squeeze(-1)\n"
    "out = (y * w.view(-1, 1)).view(T, K, D).sum(1)",
    "each row multiplied by the tensors of its own expert, and a sum over the slots",
)
LOOP = Spelling(
    "loop over experts",
    "tokens, slots = where(ids == e)\n"
    "out.index_add_(0, tokens, expert_e(x[tokens]) * w[tokens, slots, None])",
    "every expert visited once, all of them the same operators on tensors of their own, and their rows "
    "added to their own tokens",
)
SEGMENTS = Spelling(
    "sorted rows cut by counts",
    "rows, counts = x[perm // K], bincount(ids).tolist()\n"
    "y = cat([expert_e(rows_e) for rows_e in rows.split(counts)])\n"
    "out[perm] = y",
    "the counts of the ids that were sorted, every expert's segment in order, and rows brought back to "
    "their pairs before the sum over the slots",
)
DENSE = Spelling(
    "dense, weights zeroed",
    'dense = zeros(T, E).scatter(1, ids, w)\nout = einsum("te,etd->td", dense, every expert on every token)',
    "ids that differ within a token, weights that are 0 off the ids, and nothing after them that is not 0 "
    "there",
)
DENSE_GATHERED = Spelling(
    "dense, rows gathered",
    "every = stack([expert(x) for expert in experts], 1)\n"
    "out = (every.gather(1, ids.unsqueeze(-1).expand(-1, -1, D)) * w.unsqueeze(-1)).sum(1)",
    "experts of the same operators on one value, and the pairs' rows picked at the ids",
)
CAPACITY = Spelling(
    "capacity, one-hot dispatch",
    "place = cumsum(one_hot(ids)) - 1\n"
    'rows = einsum("tec,td->ecd", dispatch, x)\n'
    'out = einsum("tec,ecd->td", combine, experts(rows))',
    "places counted in the experts' queues, no two pairs in one place, and the same pairs dispatched and "
    "combined",
)
SPELLINGS = (SORTED, GATHERED, LOOP, SEGMENTS, DENSE, DENSE_GATHERED, CAPACITY)

_OF_LOOPS = (values.Mask, values.Outside, values.Coordinates, values.SlotOf, values.Along)
_OF_COLUMNS = (values.Column, values.MaskedWeights)
_OF_SORTS = (values.SortedIds, values.Counts, values.Offsets, values.InversePermutation)
_OF_QUEUES = (
    *(values.Queue, values.OwnPlaces, values.Place, values.PlaceHot, values.Within, values.Totals),
    *(values.Flags, values.KeptWeights, values.Dispatch),
)


def nearest(found: Value) -> tuple[Spelling, ...]:
    """The known spellings in which a value like this one is met; none where it could be of any."""
    match found:
        case values.Rows() | values.Permutation() | values.TokenOf():
            return _of_rows(found.domain)
        case values.ExpertsLast() | values.Combined():
            return _of_rows(found.rows.domain)
        case values.OneHot(place=None, weight=None):
            return (LOOP, DENSE, CAPACITY)
        case values.OneHot(place=None) | values.MultiHot():
            return (DENSE,)
        case values.OneHot():
            return (CAPACITY,)
        case values.PartialSum():
            return (LOOP,)
        case values.SlotSum():
            return (GATHERED,)
        case values.PartialRows() | values.Count():
            return (LOOP, SEGMENTS)
        case values.DenseSum():
            return (DENSE,)
        case values.Parts() | values.Coordinates():
            return next((nearest(item) for item in found.items if item is not None), ())
        case values.Spread():
            return nearest(found.at)
        case values.Folded():
            return nearest(found.rows)
    if isinstance(found, _OF_LOOPS):
        return (LOOP,)
    if isinstance(found, _OF_COLUMNS):
        return (LOOP, DENSE)
    if isinstance(found, _OF_SORTS):
        return (SORTED, SEGMENTS)
    return (CAPACITY,) if isinstance(found, _OF_QUEUES) else ()


def _of_rows(domain: values.Domain) -> tuple[Spelling, ...]:
    match domain:
        case Pairs(order=None):
            return (GATHERED,)
        case Pairs():
            return (SORTED, SEGMENTS)
        case Everywhere():
            return (DENSE, DENSE_GATHERED)
        case Capacity():
            return (CAPACITY,)
        case OneExpert(order=str()):
            return (LOOP,)
        case OneExpert(order=Capacity()):
            return (CAPACITY,)
    return (SEGMENTS,)
