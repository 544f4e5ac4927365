"""Layers put together from stages, each of which may be the right one or a near miss.

At most two stages are twisted, so that a rule which does not prove what it relies on fuses the layer all the
same. Each class is a spelling: it takes (experts, x (T, D), ids (T, K), weights (T, K)).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from tests.passes.spellings import Experts, product


def other_ids(ids: Tensor, experts: int, change: str) -> Tensor:
    """Ids as the router gave them, or changed."""
    match change:
        case "":
            return ids
        case "next":
            return (ids + 1) % experts
        case "flipped":
            return ids.flip(-1)
        case "of another token":
            return ids.roll(1, 0)
        case "clamped":
            return ids.clamp(max=max(experts - 2, 0))
        case "halved":
            return ids // 2
        case "shifted":
            return ids - 1
        case "masked":
            return ids.masked_fill(ids == 0, -1)
        case "int32":
            return ids.int()
        case "in a table":
            return torch.arange(experts).flip(0)[ids]
        case "turned":
            return ids.t().reshape(ids.shape)
    raise ValueError(change)


IDS = (
    "",
    "next",
    "flipped",
    "of another token",
    "clamped",
    "halved",
    "shifted",
    "masked",
    "in a table",
    "turned",
)


def other_weights(weights: Tensor, change: str) -> Tensor:
    """Weights as the router gave them, or changed."""
    match change:
        case "":
            return weights
        case "flipped":
            return weights.flip(-1)
        case "turned":
            return weights.t().reshape(weights.shape)
        case "of another token":
            return weights.roll(1, 0)
        case "negative":
            return -weights
        case "of the first slot":
            return weights[:, :1].expand(weights.shape)
        case "rounded":
            return (weights * 2).round()
    raise ValueError(change)


WEIGHTS = ("", "flipped", "turned", "of another token", "negative", "of the first slot", "rounded")


def other_rows(x: Tensor, change: str) -> Tensor:
    """Tokens' rows, or others."""
    match change:
        case "":
            return x
        case "of another token":
            return x.roll(1, 0)
        case "backwards":
            return x.flip(0)
        case "of the mean":
            return x.mean(0, keepdim=True).expand(x.shape)
        case "longer":
            return torch.cat([x, x + 1])
        case "copied":
            return x.clone()
    raise ValueError(change)


ROWS = ("", "of another token", "backwards", "of the mean", "longer", "copied")


@dataclass(frozen=True)
class Sorted:
    """Pairs sorted by expert, grouped products, brought back."""

    ids: str
    sorted_by: str
    order: str
    counted: str
    counts_of: str
    divisor: str
    rows: str
    weights: str
    weighed: str
    back: str
    combine: str

    def __call__(self, experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        ids, count = other_ids(ids, experts.count, self.ids), experts.count
        weights, k = other_weights(weights, self.weights), ids.shape[-1]
        keys = other_ids(ids, count, self.sorted_by).reshape(-1)
        ordered, perm = torch.sort(keys, descending=self.order == "descending", stable=self.order == "stable")
        ends = self._ends(other_ids(ids, count, self.counts_of).reshape(-1), count)
        token = self._token(perm, k, x.shape[0])
        rows = other_rows(x, self.rows)[token]

        def gemm(name: str, rows: Tensor) -> Tensor:
            bias = experts.bias(name)
            found = product(rows, experts.in_out(name), ends)
            return found if bias is None else found + bias[ordered]

        own = weights.reshape(-1)[perm].unsqueeze(-1)
        if self.weighed == "before":
            rows = rows * own
        y = experts.body.run(rows, gemm)
        y = y * own if self.weighed == "sorted" else y
        y = y * weights.reshape(-1, 1) if self.weighed == "not sorted" else y
        out = self._combined(self._back(y, perm), token, x, k, weights)
        return out * weights[:, :1] if self.weighed == "at the end" else out

    def _ends(self, ids: Tensor, count: int) -> Tensor:
        match self.counted:
            case "histc":
                counts = torch.histc(ids.float(), bins=count, min=0, max=count - 1)
            case "histc of one more":
                counts = torch.histc(ids.float(), bins=count, min=0, max=count)
            case "bincount":
                counts = torch.bincount(ids.clamp(min=0), minlength=count)[:count]
            case "one-hot":
                counts = F.one_hot(ids.long().clamp(0, count - 1), count).sum(0)
            case "compared":
                counts = (ids.unsqueeze(-1) == torch.arange(count)).sum(0)
            case "added":
                counts = torch.zeros(count, dtype=torch.int64)
                counts = counts.index_add(0, ids.clamp(0, count - 1), torch.ones_like(ids))
            case "searched":
                return torch.searchsorted(ids.sort()[0], torch.arange(count), right=True).int()
            case "searched from the left":
                return torch.searchsorted(ids.sort()[0], torch.arange(count)).int()
            case "flags":
                counts = (ids.unsqueeze(-1) == torch.arange(count)).any(0)
            case _:
                raise ValueError(self.counted)
        return counts.cumsum(0).to(torch.int32)

    def _token(self, perm: Tensor, k: int, tokens: int) -> Tensor:
        match self.divisor:
            case "k":
                return perm // k
            case "one more":
                return perm // (k + 1)
            case "remainder":
                return perm % tokens
            case "rounded":
                return (perm / k).round().long().clamp(max=tokens - 1)
            case "shift":
                return perm // 2
        raise ValueError(self.divisor)

    def _back(self, y: Tensor, perm: Tensor) -> Tensor:
        at = torch.arange(perm.shape[0])
        match self.back:
            case "inverse":
                return y[torch.empty_like(perm).scatter_(0, perm, at)]
            case "written inverse":
                inverse = torch.empty_like(perm)
                inverse[perm] = at
                return y[inverse]
            case "argsort":
                return y[perm.argsort()]
            case "argsort twice":
                return y[perm.argsort().argsort()]
            case "argsort descending":
                return y[perm.argsort(descending=True)]
            case "written":
                return torch.empty_like(y).index_put((perm,), y)
            case "added":
                return torch.zeros_like(y).index_put((perm,), y, accumulate=True)
            case "written twice":
                return torch.zeros_like(y).index_put((perm // 2,), y)
            case "permuted":
                return y[perm]
            case "as it is":
                return y
        raise ValueError(self.back)

    def _combined(self, y: Tensor, token: Tensor, x: Tensor, k: int, weights: Tensor) -> Tensor:
        late = weights.unsqueeze(-1) if self.weighed == "late" else torch.ones(())
        match self.combine:
            case "slots":
                return (y.view(x.shape[0], k, -1) * late).sum(1)
            case "einsum":
                return torch.einsum("tk,tkd->td", weights, y.view(x.shape[0], k, -1))
            case "other slots":
                return (y.view(k, x.shape[0], -1) * (late.transpose(0, 1) if late.dim() else late)).sum(0)
            case "mean":
                return (y.view(x.shape[0], k, -1) * late).mean(1)
            case "tokens":
                return torch.zeros_like(x).index_add(0, token, y)
            case "onto x":
                return x.index_add(0, token, y)
            case "half":
                return torch.zeros_like(x).index_add(0, token, y, alpha=0.5)
        raise ValueError(self.combine)


@dataclass(frozen=True)
class Gathered:
    """Each pair with its own expert's weights."""

    ids: str
    down_ids: str
    rows: str
    repeated: str
    weights: str
    weighed: str
    shaped: str
    combine: str

    def __call__(self, experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        ids, weights = other_ids(ids, experts.count, self.ids), other_weights(weights, self.weights)
        tokens, k = ids.shape
        x = other_rows(x, self.rows)
        rows = self._repeated(x, k)
        flat = self._flat(ids)

        def gemm(name: str, rows: Tensor) -> Tensor:
            at = self._flat(other_ids(ids, experts.count, self.down_ids)) if name == "down" else flat
            bias, column = experts.bias(name), rows.unsqueeze(-1)
            found = torch.matmul(experts.in_out(name).transpose(-2, -1)[at], column).squeeze(-1)
            return found if bias is None else found + bias[at]

        if self.weighed == "before":
            rows = rows * weights.reshape(-1, 1)
        y = experts.body.run(rows, gemm)
        if self.weighed == "flat":
            y = y * weights.reshape(-1, 1)
        if self.weighed == "flat, turned":
            y = y * weights.t().reshape(-1, 1)
        if self.shaped == "slots first":
            y = y.view(k, tokens, -1).transpose(0, 1)
        elif self.shaped == "slots first as they are":
            y = y.view(k, tokens, -1).reshape(tokens, k, -1)
        else:
            y = y.view(tokens, k, -1)
        if self.weighed == "late":
            y = y * weights.unsqueeze(-1)
        match self.combine:
            case "sum":
                return y.sum(1)
            case "einsum":
                return torch.einsum("tk,tkd->td", weights, y)
            case "bmm":
                return torch.bmm(weights.unsqueeze(1), y).squeeze(1)
            case "over tokens":
                return y.sum(0)
            case "all but the last":
                return y[:, : max(k - 1, 1)].sum(1)
            case "unbound":
                out = torch.zeros_like(y[:, 0])
                for slot in range(k):
                    out = out + y[:, slot]
                return out
        raise ValueError(self.combine)

    def _repeated(self, x: Tensor, k: int) -> Tensor:
        match self.repeated:
            case "interleaved":
                return x.repeat_interleave(k, dim=0)
            case "expanded":
                return x.unsqueeze(1).expand(-1, k, -1).reshape(-1, x.shape[-1])
            case "tiled":
                return x.repeat(k, 1)
            case "indexed":
                return x[torch.arange(x.shape[0]).repeat_interleave(k)]
        raise ValueError(self.repeated)

    def _flat(self, ids: Tensor) -> Tensor:
        by_slot = (self.shaped, self.repeated) == ("slots first", "tiled")
        return ids.t().reshape(-1) if by_slot else ids.reshape(-1)


@dataclass(frozen=True)
class Dense:
    """Every expert for every token, weights zero where it was not chosen."""

    ids: str
    weights: str
    made: str
    then: str
    cast: str
    rows: str
    run: str
    turned: str
    weighed: str
    combine: str

    def __call__(self, experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        ids, weights = other_ids(ids, experts.count, self.ids), other_weights(weights, self.weights)
        dense = self._then(self._made(ids, weights, experts.count, x))
        if self.cast:
            dense = dense.to(getattr(torch, self.cast)).to(x.dtype)
        dense = dense.reshape(experts.count, -1) if self.turned == "reshaped" else dense.t()
        x = other_rows(x, self.rows)
        own = dense.unsqueeze(-1)
        y = self._everywhere(experts, x, own)
        if self.combine == "einsum":
            return torch.einsum("et,etd->td", dense, y)
        y = y * own if self.weighed == "after" else y
        y = y + own if self.weighed == "added" else y
        return y.mean(0) if self.combine == "mean" else y.sum(1 if self.combine == "over tokens" else 0)

    def _made(self, ids: Tensor, weights: Tensor, count: int, x: Tensor) -> Tensor:
        zeros = torch.zeros(ids.shape[0], count, dtype=weights.dtype)
        scores = torch.sigmoid(x[:, :1] + torch.arange(count))
        hot = F.one_hot(ids.long(), count) if self.made in ("one-hot", "one-hot of any", "masked") else zeros
        match self.made:
            case "scattered":
                return zeros.scatter(1, ids, weights)
            case "scattered onto ones":
                return (zeros + 1).scatter(1, ids, weights)
            case "scattered onto halves":
                return torch.full_like(zeros, 0.5).scatter(1, ids, weights)
            case "added":
                return zeros.scatter_add(1, ids, weights)
            case "scattered along tokens":
                return zeros.scatter(0, ids, weights)
            case "one-hot":
                return (hot.to(weights.dtype) * weights.unsqueeze(-1)).sum(1)
            case "one-hot of any":
                return hot.amax(1).to(weights.dtype) * scores
            case "masked":
                return hot.sum(1).to(weights.dtype) * scores
            case "marked":
                return zeros.scatter(1, ids, 1.0) * scores
            case "marked twice":
                return zeros.scatter(1, ids, 2.0) * scores
            case "filled":
                return torch.full_like(zeros, float("-inf")).scatter(1, ids, weights).sigmoid()
        raise ValueError(self.made)

    def _then(self, dense: Tensor) -> Tensor:
        match self.then:
            case "":
                return dense
            case "normalised":
                return dense / (dense.sum(-1, keepdim=True) + 1e-6)
            case "normalised over tokens":
                return dense / (dense.sum(0, keepdim=True) + 1e-6)
            case "softmax":
                return dense.softmax(-1)
            case "doubled":
                return dense * 2
            case "one more":
                return dense + 1
            case "squared":
                return dense * dense
            case "root":
                return dense.abs().sqrt()
            case "exponential":
                return dense.exp()
            case "inverted":
                return 1 - dense
        raise ValueError(self.then)

    def _everywhere(self, experts: Experts, x: Tensor, own: Tensor) -> Tensor:
        def gemm(name: str, rows: Tensor) -> Tensor:
            bias = experts.bias(name)
            found = torch.matmul(rows, experts.in_out(name))
            return found if bias is None else found + bias.unsqueeze(1)

        rows = {
            "expanded": lambda: x.unsqueeze(0).expand(experts.count, -1, -1),
            "repeated": lambda: x.repeat(experts.count, 1).view(experts.count, -1, x.shape[-1]),
            "broadcast": lambda: x,
            "interleaved": lambda: x.repeat_interleave(experts.count, 0).view(experts.count, -1, x.shape[-1]),
        }[self.run]()
        return experts.body.run(rows * own if self.weighed == "before" else rows, gemm)


@dataclass(frozen=True)
class Capacity:
    """GShard: each pair has a place in its expert's queue, one-hots take rows there and back."""

    ids: str
    weights: str
    queued: str
    first: str
    later: str
    kept: str
    seats: str
    weighed: str
    dispatched: str
    room: str

    def __call__(self, experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        ids, weights = other_ids(ids, experts.count, self.ids), other_weights(weights, self.weights)
        tokens, k = ids.shape
        room = {"two": 2, "all": tokens * k, "half": max(tokens // 2, 1)}[self.room]
        hot = F.one_hot(ids.long(), experts.count)
        places = self._places(hot)
        found = {"below": places < room, "up to": places <= room, "above": places > 0, "all": places > -9}
        keep = (hot * found[self.kept]).to(x.dtype)
        seats = self._seats((places * hot).sum(-1), room).to(x.dtype)
        if self.weighed == "renormalised":
            weights = weights * keep.sum(-1)
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-6)
        combine = torch.einsum("tk,tke,tkc->tec", weights, keep, seats)
        dispatch = {
            "": lambda: torch.einsum("tke,tkc->tec", keep, seats),
            "where weighed": lambda: (combine > 0).to(x.dtype),
            "where not zero": lambda: combine.bool().to(x.dtype),
            "weighed": lambda: combine,
            "without dropping": lambda: torch.einsum("tke,tkc->tec", hot.to(x.dtype), seats),
        }[self.dispatched]()
        if self.weighed == "not at all":
            combine = dispatch
        if self.weighed == "turned":
            combine = torch.einsum("tk,tke,tkc->tec", weights, keep.flip(1), seats)
        rows = torch.einsum("tec,td->ecd", dispatch, x)

        def gemm(name: str, rows: Tensor) -> Tensor:
            bias = experts.bias(name)
            found = torch.bmm(rows, experts.in_out(name))
            return found if bias is None else found + bias.unsqueeze(1)

        return torch.einsum("tec,ecd->td", combine, experts.body.run(rows, gemm))

    def _places(self, hot: Tensor) -> Tensor:
        """(T, K): how many pairs came before, in the order of the queue."""
        tokens, k, count = hot.shape
        match self.queued:
            case "token by token":
                flat = hot.reshape(tokens * k, count)
                places = self._counted(flat.cumsum(0), flat).view(tokens, k, count)
            case "slot by slot":
                flat = hot.transpose(0, 1).reshape(tokens * k, count)
                places = self._counted(flat.cumsum(0), flat).view(k, tokens, count).transpose(0, 1)
            case "each slot after those before":
                before, found = torch.zeros(count, dtype=hot.dtype), list[Tensor]()
                for slot in range(k):
                    own = hot[:, slot]
                    found.append(self._counted(own.cumsum(0), own) + before)
                    before = before + own.sum(0) if self.later == "counted" else before
                places = torch.stack(found, dim=1)
            case "each slot alone":
                places = self._counted(hot.cumsum(0), hot)
            case "backwards":
                flat = hot.reshape(tokens * k, count).flip(0)
                places = self._counted(flat.cumsum(0), flat).flip(0).view(tokens, k, count)
            case "over experts":
                places = self._counted(hot.cumsum(-1), hot)
            case _:
                raise ValueError(self.queued)
        return places

    def _seats(self, place: Tensor, room: int) -> Tensor:
        """(T, K, C): 1 at each pair's place."""
        match self.seats:
            case "clamped":
                return F.one_hot(place.clamp(0, room - 1), room)
            case "clamped above":
                return F.one_hot(place.clamp(max=room - 1), room)
            case "compared":
                return place.unsqueeze(-1) == torch.arange(room)
            case "one more":
                return F.one_hot(place.clamp(0, room), room + 1)
            case "masked":
                return F.one_hot(place * (place < room), room)
            case "from one":
                return place.unsqueeze(-1) == torch.arange(1, room + 1)
            case "remainder":
                return F.one_hot(place % room, room)
        raise ValueError(self.seats)

    def _counted(self, upto: Tensor, hot: Tensor) -> Tensor:
        """Places from 0, or from 1."""
        return {"0": upto - 1, "0 by others": upto - hot, "1": upto, "2": upto + 1}[self.first]


Twisted = Sorted | Gathered | Dense | Capacity


@dataclass(frozen=True)
class Stage:
    """What a stage may be: right, or twisted (which may be right as well, by another way)."""

    right: tuple[str, ...]
    twists: tuple[str, ...]


def _changed(changes: tuple[str, ...]) -> Stage:
    return Stage(changes[:1], changes[1:])


_SORTED = {
    "ids": _changed((*IDS, "int32")),
    "sorted_by": Stage(("",), ("next", "of another token", "flipped", "turned")),
    "order": Stage(("", "stable"), ("descending",)),
    "counted": Stage(
        ("histc", "bincount", "one-hot", "compared", "added", "searched"),
        ("histc of one more", "searched from the left", "flags"),
    ),
    "counts_of": Stage(("",), ("flipped", "next", "of another token", "clamped")),
    "divisor": Stage(("k",), ("one more", "remainder", "rounded", "shift")),
    "rows": _changed(ROWS),
    "weights": _changed(WEIGHTS),
    "weighed": Stage(("sorted", "late"), ("before", "not sorted", "at the end", "nowhere")),
    "back": Stage(
        ("inverse", "written inverse", "argsort", "written"),
        ("argsort twice", "argsort descending", "added", "written twice", "permuted", "as it is"),
    ),
    "combine": Stage(("slots",), ("tokens", "einsum", "other slots", "mean", "onto x", "half")),
}
_GATHERED = {
    "ids": _changed((*IDS, "int32")),
    "down_ids": Stage(("",), ("next", "flipped", "shifted")),
    "rows": _changed(ROWS),
    "repeated": Stage(("interleaved", "expanded"), ("tiled", "indexed")),
    "weights": _changed(WEIGHTS),
    "weighed": Stage(("flat", "late"), ("before", "flat, turned", "nowhere")),
    "shaped": Stage(("slots last",), ("slots first", "slots first as they are")),
    "combine": Stage(("sum",), ("einsum", "bmm", "over tokens", "all but the last", "unbound")),
}
_DENSE = {
    "ids": _changed(IDS),
    "weights": _changed(WEIGHTS),
    "made": Stage(
        ("scattered", "one-hot", "marked"),
        (
            *("scattered onto ones", "scattered onto halves", "added", "scattered along tokens"),
            *("one-hot of any", "masked", "marked twice", "filled"),
        ),
    ),
    "then": Stage(
        ("",),
        (
            *("normalised", "normalised over tokens", "softmax", "doubled", "one more", "squared", "root"),
            *("exponential", "inverted"),
        ),
    ),
    "cast": Stage(("",), ("bfloat16", "bool", "int64")),
    "rows": _changed(ROWS),
    "run": Stage(("expanded", "repeated", "broadcast"), ("interleaved",)),
    "turned": Stage(("",), ("reshaped",)),
    "weighed": Stage(("after",), ("before", "added", "nowhere")),
    "combine": Stage(("sum",), ("einsum", "mean", "over tokens")),
}
_CAPACITY = {
    "ids": _changed(("", "next", "flipped", "of another token", "clamped", "halved", "in a table")),
    "weights": _changed(WEIGHTS),
    "queued": Stage(
        ("token by token", "slot by slot", "each slot after those before"),
        ("each slot alone", "backwards", "over experts"),
    ),
    "first": Stage(("0", "0 by others"), ("1", "2")),
    "later": Stage(("counted",), ("not counted",)),
    "kept": Stage(("below",), ("up to", "above", "all")),
    "seats": Stage(("clamped above", "compared"), ("clamped", "one more", "masked", "from one", "remainder")),
    "weighed": Stage(("",), ("renormalised", "not at all", "turned")),
    "dispatched": Stage(("",), ("where weighed", "where not zero", "weighed", "without dropping")),
    "room": Stage(("two", "all", "half"), ("two",)),
}
STAGES: dict[type[Twisted], dict[str, Stage]] = {
    Sorted: _SORTED,
    Gathered: _GATHERED,
    Dense: _DENSE,
    Capacity: _CAPACITY,
}


@st.composite
def twisted(draw: st.DrawFn) -> Twisted:
    """A layer whose stages are right but for at most two."""
    kind = draw(st.sampled_from(list(STAGES)))
    stages = STAGES[kind]
    chosen = draw(st.lists(st.sampled_from(list(stages)), max_size=2, unique=True))
    options = {name: s.twists if name in chosen else s.right for name, s in stages.items()}
    return kind(**{name: draw(st.sampled_from(those)) for name, those in options.items()})
