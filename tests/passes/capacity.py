"""Capacity dispatch as people write it, and what looks like it: few slots an expert, who is late is dropped.

A `Dispatched` takes (layer, x) and gives the layer's answer. Letters: T tokens, K ids a token, E experts, C
slots an expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HIDDEN, EXPERTS, CAPACITY = 16, 12, 4, 3


class Layer(nn.Module):
    """A router, experts as a list and as two tensors, and a way to bring tokens to them."""

    def __init__(self, spelling: Dispatched) -> None:
        super().__init__()
        self.spelling = spelling
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH))
            for _ in range(EXPERTS)
        )
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN) / 4)
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH) / 4)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        if self.spelling in GROUPED:
            return self.spelling(self, x)
        return self.spelling(self, x.reshape(-1, x.shape[-1])).view(x.shape)

    def scores(self, x: Tensor) -> Tensor:
        """(T, E), summing to 1."""
        scores: Tensor = self.gate(x).softmax(-1)
        return scores

    def top2(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """weights and ids (T, 2)."""
        weights, ids = self.scores(x).topk(2, dim=-1)
        return weights / weights.sum(-1, keepdim=True), ids

    def stacked(self, rows: Tensor) -> Tensor:
        """(E, C, D), the experts' weights as two tensors."""
        return torch.bmm(F.relu(torch.bmm(rows, self.up)), self.down)

    def listed(self, rows: Tensor) -> Tensor:
        """(E, C, D), the experts as a list."""
        return torch.stack([expert(rows[e]) for e, expert in enumerate(self.experts)])


Dispatched: TypeAlias = Callable[[Layer, Tensor], Tensor]


def _hot(place: Tensor, capacity: int = CAPACITY) -> Tensor:
    """1 at the place; none where there is no such place."""
    return (place.unsqueeze(-1) == torch.arange(capacity)).float()


def _places(hot: Tensor) -> Tensor:
    """(T, K, E) places from 0, first choices first."""
    slots, experts = hot.shape[1:]
    flat = hot.transpose(0, 1).reshape(-1, experts)
    return (flat.cumsum(0) - flat).reshape(slots, -1, experts).transpose(0, 1)


def choices_first(layer: Layer, x: Tensor) -> Tensor:
    weights, ids = layer.top2(x)
    hot = F.one_hot(ids, EXPERTS)
    places = _places(hot)
    keep = (hot * (places < CAPACITY)).float()
    slot = F.one_hot((places * hot).sum(-1).clamp(max=CAPACITY - 1), CAPACITY).float()
    dispatch = torch.einsum("tke,tkc->tec", keep, slot)
    combine = torch.einsum("tk,tke,tkc->tec", weights, keep, slot)
    rows = layer.listed(torch.einsum("tec,td->ecd", dispatch, x))
    return torch.einsum("tec,ecd->td", combine, rows)


def tokens_first(layer: Layer, x: Tensor) -> Tensor:
    """Places in the pairs' own order, counted from 1; the dispatch is where the combine is not 0."""
    weights, ids = layer.top2(x)
    hot = F.one_hot(ids, EXPERTS)
    places = hot.view(-1, EXPERTS).cumsum(0).view(-1, 2, EXPERTS)
    keep = hot * (places <= CAPACITY)
    slot = _hot((places * hot).sum(-1) - 1)
    combine = torch.einsum("tk,tke,tkc->tec", weights, keep.float(), slot)
    rows = torch.einsum("tec,td->ecd", (combine > 0).float(), x)
    return torch.einsum("tec,ecd->td", combine, layer.stacked(rows))


def capacity_grows(layer: Layer, x: Tensor) -> Tensor:
    """As many slots as the number of tokens asks for."""
    capacity = 2 * x.shape[0] // EXPERTS + 1
    weights, ids = layer.top2(x)
    hot = F.one_hot(ids, EXPERTS)
    places = _places(hot)
    keep = (hot * (places < capacity)).float()
    slot = F.one_hot((places * hot).sum(-1).clamp(max=capacity - 1), capacity).float()
    dispatch = torch.einsum("tke,tkc->tec", keep, slot)
    combine = torch.einsum("tk,tke,tkc->tec", weights, keep, slot)
    return torch.einsum("tec,ecd->td", combine, layer.stacked(torch.einsum("tec,td->ecd", dispatch, x)))


def top1_of_scores(layer: Layer, x: Tensor) -> Tensor:
    """One choice; scores times the mask are the weights."""
    scores = layer.scores(x)
    mask = F.one_hot(scores.argmax(1), EXPERTS)
    places = mask.cumsum(0) - 1
    mask = mask * torch.lt(places, CAPACITY)
    own = (places * mask).sum(1)
    combine = torch.einsum("te,tc->tec", scores * mask.float(), F.one_hot(own, CAPACITY).float())
    rows = torch.einsum("tec,td->ecd", combine.bool().type_as(x), x)
    return torch.einsum("tec,ecd->td", combine, layer.stacked(rows))


def top2_by_two(layer: Layer, x: Tensor) -> Tensor:
    """The second choice's places start where the first choice's end; two one-hots are added."""
    logits = layer.gate(x)
    scores = logits.softmax(1)
    first = F.one_hot(scores.argmax(1), EXPERTS)
    second = F.one_hot(logits.masked_fill(first.bool(), float("-inf")).argmax(1), EXPERTS)
    places1, places2 = first.cumsum(0) - 1, second.cumsum(0) - 1
    places2 = places2 + first.sum(0, keepdim=True)
    first, second = first * torch.lt(places1, CAPACITY), second * torch.lt(places2, CAPACITY)
    own1, own2 = (places1 * first).sum(1), (places2 * second).sum(1)
    gates1, gates2 = (torch.einsum("te,te->t", scores, m.float()) for m in (first, second))
    total = (gates1 + gates2).clamp(min=torch.finfo(torch.float32).eps)
    combine = torch.zeros(())
    for gates, mask, own in ((gates1, first, own1), (gates2, second, own2)):
        weighed = torch.einsum("t,te->te", gates / total, mask.float())
        combine = combine + torch.einsum("te,tc->tec", weighed, F.one_hot(own, CAPACITY).float())
    rows = torch.einsum("tec,td->ecd", combine.bool().float(), x)
    return torch.einsum("tec,ecd->td", combine, layer.stacked(rows))


def top2_in_floats(layer: Layer, x: Tensor) -> Tensor:
    """Masks and places in floating point, products by broadcasting; the second after who found room."""
    gates1, ids1 = layer.scores(x).max(-1)
    first = F.one_hot(ids1, EXPERTS).float()
    gates2, ids2 = (layer.scores(x) * (1 - first)).max(-1)
    second = F.one_hot(ids2, EXPERTS).float()
    own1 = (first.cumsum(0) - first) * first
    first = first * (own1 < CAPACITY).float()
    kept1, own1 = first.sum(-1), own1.sum(-1)
    own2 = (second.cumsum(0) - second + first.sum(0, keepdim=True)) * second
    second = second * (own2 < CAPACITY).float()
    kept2, own2 = second.sum(-1), own2.sum(-1)
    combine = torch.zeros(())
    for gates, kept, ids, own in ((gates1, kept1, ids1, own1), (gates2, kept2, ids2, own2)):
        number = (gates * kept)[:, None, None] * kept[:, None, None]
        combine = combine + number * F.one_hot(ids, EXPERTS)[..., None] * _hot(own.long())[..., None, :]
    rows = layer.listed(torch.einsum("tec,td->ecd", combine.bool().to(combine), x))
    return torch.einsum("tec,ecd->td", combine, rows)


def positive_by_parts(layer: Layer, x: Tensor) -> Tensor:
    """Weights are taken apart slot by slot; who weighs anything is dispatched."""
    best, ids = layer.scores(x).topk(2)
    first, second = (F.one_hot(own, EXPERTS).float() for own in ids.unbind(-1))
    own1, own2 = first.cumsum(0) - first, second.cumsum(0) - second + first.sum(0, keepdim=True)
    first, second = first * (own1 < CAPACITY), second * (own2 < CAPACITY)
    combine = torch.zeros(())
    weights = (best / best.sum(-1, keepdim=True)).unbind(-1)
    for weight, mask, own in zip(weights, (first, second), (own1, own2), strict=True):
        weighed = weight[:, None, None] * mask[..., None]
        combine = combine + weighed * _hot((own * mask).sum(-1).long())[:, None, :]
    rows = torch.einsum("tec,td->ecd", (combine > 0).float(), x)
    return torch.einsum("tec,ecd->td", combine, layer.stacked(rows))


def flattened(layer: Layer, x: Tensor) -> Tensor:
    """One-hots by broadcasting, the slots of all experts as one dimension of two matrix products."""
    weights, ids = layer.top2(x)
    hot = F.one_hot(ids, EXPERTS)
    places = _places(hot)
    slot = F.one_hot((places * hot).sum(-1).clamp(max=CAPACITY - 1), CAPACITY)
    keep = hot * (places < CAPACITY)
    combine = (weights[:, :, None, None] * keep[..., None] * slot[:, :, None]).sum(1)
    dispatch = (keep[..., None] * slot[:, :, None]).sum(1).float()
    rows = (dispatch.reshape(-1, EXPERTS * CAPACITY).t() @ x).view(EXPERTS, CAPACITY, -1)
    rows = layer.stacked(rows).view(EXPERTS * CAPACITY, -1)
    return combine.reshape(-1, EXPERTS * CAPACITY) @ rows


def places_gathered(layer: Layer, x: Tensor) -> Tensor:
    """Each pair's place is read at its id; a batched product over the slots."""
    weights, ids = layer.top2(x)
    places = F.one_hot(ids.t().reshape(-1), EXPERTS).cumsum(0) - 1
    own = places.gather(1, ids.t().reshape(-1, 1)).view(2, -1).t()
    keep, hot = own < CAPACITY, F.one_hot(ids, EXPERTS).float()
    slot = _hot(own.clamp(max=CAPACITY - 1))
    combine = torch.matmul((hot * (weights * keep).unsqueeze(-1)).transpose(1, 2), slot)
    dispatch = torch.matmul((hot * keep.unsqueeze(-1).float()).transpose(1, 2), slot)
    rows = layer.stacked(torch.einsum("tec,td->ecd", dispatch, x))
    return torch.einsum("tec,ecd->td", combine, rows)


def second_if_worth_it(layer: Layer, x: Tensor) -> Tensor:
    """A second choice of little weight takes no place."""
    weights, ids = layer.top2(x)
    take = torch.stack([torch.ones_like(ids[:, 0]).bool(), weights[:, 1] > 0.3], -1)
    hot = F.one_hot(ids, EXPERTS) * take.unsqueeze(-1)
    places = _places(hot)
    keep = (hot * (places < CAPACITY)).float()
    slot = F.one_hot((places * hot).sum(-1).clamp(max=CAPACITY - 1), CAPACITY).float()
    dispatch = torch.einsum("tke,tkc->tec", keep, slot)
    combine = torch.einsum("tk,tke,tkc->tec", weights, keep, slot)
    return torch.einsum("tec,ecd->td", combine, layer.stacked(torch.einsum("tec,td->ecd", dispatch, x)))


def masked_scores(layer: Layer, x: Tensor) -> Tensor:
    """Scores of the chosen alone, at one-hots slot by slot; slots before tokens in a matrix product."""
    logits = layer.gate(x)
    top, ids = logits.topk(2, dim=-1)
    scores = torch.full_like(logits, float("-inf")).scatter(-1, ids, top).softmax(-1)
    mask = F.one_hot(ids, EXPERTS).permute(1, 0, 2)
    places = (mask.reshape(-1, EXPERTS).cumsum(0) - 1).reshape(2, -1, EXPERTS)
    mask = mask * torch.lt(places, CAPACITY)
    own = F.one_hot((mask * places).sum(-1), CAPACITY)
    combine = ((mask * scores.view(1, -1, EXPERTS)).unsqueeze(3) * own.unsqueeze(2)).sum(0)
    rows = layer.stacked(combine.bool().permute(1, 2, 0).type_as(x) @ x)
    return combine.view(x.shape[0], -1) @ rows.view(-1, WIDTH)


def _of_sequences(layer: Layer, x: Tensor, before: Callable[[Tensor], Tensor]) -> Tensor:
    """(B, S, D): two choices of which each sequence has slots of its own, (B, S, E, C)."""
    gates1, ids1 = layer.scores(x).max(-1)
    first = F.one_hot(ids1, EXPERTS).float()
    gates2, ids2 = (layer.scores(x) * (1 - first)).max(-1)
    second = F.one_hot(ids2, EXPERTS).float()
    own1 = (first.cumsum(-2) - first) * first
    first = first * (own1 < CAPACITY).float()
    own2 = (second.cumsum(-2) - second + before(first)) * second
    second = second * (own2 < CAPACITY).float()
    combine = torch.zeros(())
    for gates, mask, ids, own in ((gates1, first, ids1, own1), (gates2, second, ids2, own2)):
        number, place = (gates * mask.sum(-1))[..., None, None], _hot(own.sum(-1).long())
        kept = mask.sum(-1)[..., None, None]
        combine = combine + number * kept * F.one_hot(ids, EXPERTS)[..., None] * place[..., None, :]
    return combine


def groups_of_tokens(layer: Layer, x: Tensor) -> Tensor:
    """GShard's groups: every sequence has slots of its own with every expert."""
    combine = _of_sequences(layer, x, lambda first: first.sum(-2, keepdim=True))
    rows = torch.einsum("bsd,bsec->ebcd", x, combine.bool().to(combine))
    out = layer.stacked(rows.reshape(EXPERTS, -1, WIDTH)).reshape(rows.shape)
    return torch.einsum("ebcd,bsec->bsd", out, combine)


def groups_by_einsum(layer: Layer, x: Tensor) -> Tensor:
    """The five products of GShard's algorithm 1, top-1."""
    scores = torch.einsum("gsm,me->gse", x, layer.gate.weight.t()).softmax(-1)
    gates, ids = scores.max(-1)
    mask = F.one_hot(ids, EXPERTS)
    places = mask.cumsum(1) - 1
    mask = mask * (places < CAPACITY)
    own = F.one_hot((places * mask).sum(-1), CAPACITY)
    combine = torch.einsum("gs,gse,gsc->gsec", gates, mask.float(), own.float())
    rows = torch.einsum("gsec,gsm->egcm", (combine > 0).float(), x)
    rows = torch.einsum("egcm,emh->egch", rows, layer.up).relu()
    rows = torch.einsum("egch,ehm->gecm", rows, layer.down)
    return torch.einsum("gsec,gecm->gsm", combine, rows)


SPELLINGS: list[Dispatched] = [
    choices_first,
    tokens_first,
    capacity_grows,
    top1_of_scores,
    top2_by_two,
    top2_in_floats,
    positive_by_parts,
    flattened,
    places_gathered,
    second_if_worth_it,
    masked_scores,
    groups_of_tokens,
    groups_by_einsum,
]


# -- what looks like it --------------------------------------------------------------------------------------


def _applied(layer: Layer, x: Tensor, dispatch: Tensor, combine: Tensor) -> Tensor:
    rows = layer.stacked(torch.einsum("tec,td->ecd", dispatch, x))
    return torch.einsum("tec,ecd->td", combine, rows)


def late_pairs_share_the_last(layer: Layer, x: Tensor) -> Tensor:
    """Nobody is kept out of the dispatch: who comes late sits in the last slot, too."""
    weights, ids = layer.top2(x)
    hot = F.one_hot(ids, EXPERTS)
    places = _places(hot)
    keep = (hot * (places < CAPACITY)).float()
    slot = F.one_hot((places * hot).sum(-1).clamp(max=CAPACITY - 1), CAPACITY).float()
    dispatch = torch.einsum("tke,tkc->tec", hot.float(), slot)
    return _applied(layer, x, dispatch, torch.einsum("tk,tke,tkc->tec", weights, keep, slot))


def combined_where_not_dispatched(layer: Layer, x: Tensor) -> Tensor:
    """Pairs that were kept out are combined from a slot another sits in."""
    weights, ids = layer.top2(x)
    hot = F.one_hot(ids, EXPERTS)
    places = _places(hot)
    keep = (hot * (places < CAPACITY)).float()
    slot = F.one_hot((places * hot).sum(-1).clamp(max=CAPACITY - 1), CAPACITY).float()
    dispatch = torch.einsum("tke,tkc->tec", keep, slot)
    return _applied(layer, x, dispatch, torch.einsum("tk,tke,tkc->tec", weights, hot.float(), slot))


def places_of_other_ids(layer: Layer, x: Tensor) -> Tensor:
    weights, ids = layer.top2(x)
    hot, other = F.one_hot(ids, EXPERTS), F.one_hot((ids + 1) % EXPERTS, EXPERTS)
    places = _places(other)
    keep = (hot * (places < CAPACITY)).float()
    slot = _hot((places * hot).sum(-1))
    dispatch = torch.einsum("tke,tkc->tec", keep, slot)
    return _applied(layer, x, dispatch, torch.einsum("tk,tke,tkc->tec", weights, keep, slot))


def second_starts_at_zero(layer: Layer, x: Tensor) -> Tensor:
    """Each slot's pairs are counted for themselves, and share places with the other's."""
    weights, ids = layer.top2(x)
    hot = F.one_hot(ids, EXPERTS)
    places = hot.cumsum(0) - 1
    keep = (hot * (places < CAPACITY)).float()
    slot = _hot((places * hot).sum(-1))
    dispatch = torch.einsum("tke,tkc->tec", keep, slot)
    return _applied(layer, x, dispatch, torch.einsum("tk,tke,tkc->tec", weights, keep, slot))


def _two(layer: Layer, x: Tensor, before: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Two choices, the second's places moved by what `before` makes of the two masks."""
    weights, ids = layer.top2(x)
    first, second = (F.one_hot(ids[:, k], EXPERTS) for k in (0, 1))
    places1, places2 = first.cumsum(0) - 1, second.cumsum(0) - 1
    places2 = places2 + before(first, second)
    combine = torch.zeros(())
    for k, (mask, places) in enumerate(((first, places1), (second, places2))):
        kept = mask * (places < CAPACITY)
        own = _hot((places * kept).sum(1))
        combine = combine + torch.einsum("t,te,tc->tec", weights[:, k], kept.float(), own)
    return _applied(layer, x, combine.bool().float(), combine)


def second_after_nobody(layer: Layer, x: Tensor) -> Tensor:
    return _two(layer, x, lambda first, second: torch.zeros(1, EXPERTS, dtype=torch.long))


def second_after_itself(layer: Layer, x: Tensor) -> Tensor:
    return _two(layer, x, lambda first, second: second.sum(0, keepdim=True))


def second_after_half_of_the_first(layer: Layer, x: Tensor) -> Tensor:
    """Only some of the first choices are counted, and not the first ones in their queues."""
    return _two(layer, x, lambda first, second: (first * (x[:, :1] > 0)).sum(0, keepdim=True))


def dispatched_where_positive(layer: Layer, x: Tensor) -> Tensor:
    """Weights may be negative: these pairs are combined, and were not dispatched."""
    weights, ids = layer.top2(x)
    weights = weights - 0.4
    hot = F.one_hot(ids, EXPERTS)
    places = _places(hot)
    keep = (hot * (places < CAPACITY)).float()
    combine = torch.einsum("tk,tke,tkc->tec", weights, keep, _hot((places * hot).sum(-1)))
    return _applied(layer, x, (combine > 0).float(), combine)


def dispatched_by_other_weights(layer: Layer, x: Tensor) -> Tensor:
    """Pairs whose other weight is 0 are combined, and were not dispatched."""
    weights, ids = layer.top2(x)
    hot = F.one_hot(ids, EXPERTS)
    places = _places(hot)
    keep, slot = (hot * (places < CAPACITY)).float(), _hot((places * hot).sum(-1))
    other = torch.einsum("tk,tke,tkc->tec", (weights - 0.5).relu(), keep, slot)
    return _applied(layer, x, other.bool().float(), torch.einsum("tk,tke,tkc->tec", weights, keep, slot))


def dispatched_next_door(layer: Layer, x: Tensor) -> Tensor:
    """Rows are read one slot after the one they were put in."""
    weights, ids = layer.top2(x)
    hot = F.one_hot(ids, EXPERTS)
    places = _places(hot)
    keep = (hot * (places < CAPACITY - 1)).float()
    own = (places * hot).sum(-1)
    dispatch = torch.einsum("tke,tkc->tec", keep, _hot(own))
    return _applied(layer, x, dispatch, torch.einsum("tk,tke,tkc->tec", weights, keep, _hot(own + 1)))


def room_for_one_more(layer: Layer, x: Tensor) -> Tensor:
    """One pair more than there are slots is kept, and shares the last."""
    weights, ids = layer.top2(x)
    hot = F.one_hot(ids, EXPERTS)
    places = _places(hot)
    keep = (hot * (places <= CAPACITY)).float()
    slot = F.one_hot((places * hot).sum(-1).clamp(max=CAPACITY - 1), CAPACITY).float()
    dispatch = torch.einsum("tke,tkc->tec", keep, slot)
    return _applied(layer, x, dispatch, torch.einsum("tk,tke,tkc->tec", weights, keep, slot))


def room_in_another_order(layer: Layer, x: Tensor) -> Tensor:
    """Who is kept was counted token by token, who sits where slot by slot."""
    weights, ids = layer.top2(x)
    hot = F.one_hot(ids, EXPERTS)
    places = _places(hot)
    keep = (hot * (hot.view(-1, EXPERTS).cumsum(0).view(-1, 2, EXPERTS) <= CAPACITY)).float()
    slot = F.one_hot((places * hot).sum(-1).clamp(max=CAPACITY - 1), CAPACITY).float()
    dispatch = torch.einsum("tke,tkc->tec", keep, slot)
    return _applied(layer, x, dispatch, torch.einsum("tk,tke,tkc->tec", weights, keep, slot))


def pairs_counted_twice(layer: Layer, x: Tensor) -> Tensor:
    """What multiplies the one-hot is no mask: some pairs are dispatched twice as large."""
    weights, ids = layer.top2(x)
    hot = F.one_hot(ids, EXPERTS)
    places = _places(hot)
    keep = (hot * (2 - places).clamp(min=0)).float()
    slot = _hot((places * hot).sum(-1))
    dispatch = torch.einsum("tke,tkc->tec", keep, slot)
    return _applied(layer, x, dispatch, torch.einsum("tk,tke,tkc->tec", weights, keep, slot))


def another_experts_rows(layer: Layer, x: Tensor) -> Tensor:
    """The experts' slots are handed round by one."""
    weights, ids = layer.top2(x)
    hot = F.one_hot(ids, EXPERTS)
    places = _places(hot)
    keep, slot = (hot * (places < CAPACITY)).float(), _hot((places * hot).sum(-1))
    rows = torch.einsum("tec,td->ecd", torch.einsum("tke,tkc->tec", keep, slot), x)
    rows = torch.stack([expert(rows[(e + 1) % EXPERTS]) for e, expert in enumerate(layer.experts)])
    return torch.einsum("tec,ecd->td", torch.einsum("tk,tke,tkc->tec", weights, keep, slot), rows)


def slots_mixed(layer: Layer, x: Tensor) -> Tensor:
    """A slot's row depends on the expert's other slots."""
    weights, ids = layer.top2(x)
    hot = F.one_hot(ids, EXPERTS)
    places = _places(hot)
    keep, slot = (hot * (places < CAPACITY)).float(), _hot((places * hot).sum(-1))
    rows = layer.stacked(torch.einsum("tec,td->ecd", torch.einsum("tke,tkc->tec", keep, slot), x))
    rows = rows - rows.mean(1, keepdim=True)
    return torch.einsum("tec,ecd->td", torch.einsum("tk,tke,tkc->tec", weights, keep, slot), rows)


def late_pairs_masked_by_junk(layer: Layer, x: Tensor) -> Tensor:
    """A pair that takes no place counts as the first: its weight is kept, and another sits there."""
    weights, ids = layer.top2(x)
    hot = F.one_hot(ids, EXPERTS)
    taken = hot * (x[:, :2] > 0).unsqueeze(-1)
    own = (_places(taken) * taken).sum(-1)
    kept, slot = weights * (own < CAPACITY), _hot(own)
    combine = torch.einsum("tk,tke,tkc->tec", kept, hot.float(), slot)
    dispatch = torch.einsum("tke,tkc->tec", taken.float(), slot)
    return _applied(layer, x, dispatch, combine)


def something_added(layer: Layer, x: Tensor) -> Tensor:
    """Every slot also holds a little of every token."""

    def dispatch(k: int, places: Tensor) -> Tensor:
        mask = hot[:, k] * (places < CAPACITY)
        return torch.einsum("te,tc->tec", mask.float(), _hot((places * mask).sum(1)))

    weights, ids = layer.top2(x)
    hot = F.one_hot(ids, EXPERTS)
    first = hot[:, 0].cumsum(0) - 1
    both = dispatch(0, first) + dispatch(1, hot[:, 1].cumsum(0) - 1 + hot[:, 0].sum(0, keepdim=True))
    return _applied(layer, x, both + 0.1 * x[:, :1, None].sigmoid().expand_as(both), both)


def weighed_by_a_layer(layer: Layer, x: Tensor) -> Tensor:
    """The weights are what another layer gives, which is a leaf of its own."""
    _, ids = layer.top2(x)
    weights = choices_first(layer, x)[:, :2].sigmoid()
    hot = F.one_hot(ids, EXPERTS)
    places = _places(hot)
    keep, slot = (hot * (places < CAPACITY)).float(), _hot((places * hot).sum(-1))
    dispatch = torch.einsum("tke,tkc->tec", keep, slot)
    return _applied(layer, x, dispatch, torch.einsum("tk,tke,tkc->tec", weights, keep, slot))


def weights_turned(layer: Layer, x: Tensor) -> Tensor:
    """Slot by slot, as many tokens as slots: weights and masks change sides together, or not."""
    weights, ids = layer.top2(x)
    hot = F.one_hot(ids, EXPERTS)
    own = (_places(hot) * hot).sum(-1)
    kept = weights.t() * (own < CAPACITY).t()
    slot = _hot(own.clamp(max=CAPACITY - 1))
    dispatch = torch.einsum("tke,tkc->tec", (hot * (own < CAPACITY).unsqueeze(-1)).float(), slot)
    return _applied(layer, x, dispatch, torch.einsum("kt,tke,tkc->tec", kept, hot.float(), slot))


def groups_share_slots(layer: Layer, x: Tensor) -> Tensor:
    """Places are counted in every sequence for itself, and there are no slots for each."""
    combine = _of_sequences(layer, x, lambda first: first.sum(-2, keepdim=True))
    rows = layer.stacked(torch.einsum("bsd,bsec->ecd", x, combine.bool().to(combine)))
    return torch.einsum("ecd,bsec->bsd", rows, combine)


def groups_counted_together(layer: Layer, x: Tensor) -> Tensor:
    """Second choices stand after the first choices of another sequence."""
    combine = _of_sequences(layer, x, lambda first: first.sum(-2, keepdim=True).flip(0))
    rows = torch.einsum("bsd,bsec->ebcd", x, combine.bool().to(combine))
    out = layer.stacked(rows.reshape(EXPERTS, -1, WIDTH)).reshape(rows.shape)
    return torch.einsum("ebcd,bsec->bsd", out, combine)


def groups_turned(layer: Layer, x: Tensor) -> Tensor:
    """Groups and slots change places between dispatch and combine: only where they are as many."""
    combine = _of_sequences(layer, x, lambda first: first.sum(-2, keepdim=True))
    rows = torch.einsum("bsd,bsec->ebcd", x, combine.bool().to(combine))
    out = torch.einsum("ebcm,emh->ebch", rows, layer.up).relu()
    out = torch.einsum("ebch,ehm->ebcm", out, layer.down)
    return torch.einsum("ebcd,bsec->bsd", out.transpose(1, 2), combine)


def groups_swapped(layer: Layer, x: Tensor) -> Tensor:
    """A sequence's slots are read as the next one's."""
    combine = _of_sequences(layer, x, lambda first: first.sum(-2, keepdim=True))
    rows = torch.einsum("bsd,bsec->becd", x, combine.bool().to(combine))
    rows = rows.reshape(EXPERTS, -1, CAPACITY, WIDTH)
    out = layer.stacked(rows.reshape(EXPERTS, -1, WIDTH)).reshape(rows.shape)
    return torch.einsum("ebcd,bsec->bsd", out, combine)


# What holds literally, in other words than the spellings': fused or not, right.
ALSO: list[Dispatched] = [weighed_by_a_layer, weights_turned]
GROUPED = (
    *(groups_of_tokens, groups_by_einsum, groups_share_slots, groups_counted_together, groups_swapped),
    groups_turned,
)
LOOKALIKES: list[Dispatched] = [
    late_pairs_share_the_last,
    combined_where_not_dispatched,
    places_of_other_ids,
    second_starts_at_zero,
    second_after_nobody,
    second_after_itself,
    second_after_half_of_the_first,
    dispatched_where_positive,
    dispatched_by_other_weights,
    dispatched_next_door,
    room_for_one_more,
    room_in_another_order,
    pairs_counted_twice,
    another_experts_rows,
    slots_mixed,
    late_pairs_masked_by_junk,
    something_added,
    groups_share_slots,
    groups_counted_together,
    groups_swapped,
]
