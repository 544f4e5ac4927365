"""Python over a tensor's values: traced as written, exact, and refused where what that assumes is false."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dsmoe_compiler as dsmoe
from dsmoe_compiler.capture import capture
from dsmoe_compiler.tracing import assumption
from tests.tiny_models import relative

D, E, K = 16, 4, 2


class _Layer(nn.Module):
    """Top-k experts around a loop that a subclass writes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(D, E, bias=False)
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(E))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.gate(x).softmax(-1).topk(K, dim=-1)
        return weights, ids

    def add(self, out: Tensor, x: Tensor, weights: Tensor, ids: Tensor, e: Any) -> None:
        token, slot = torch.where(ids == e)
        out.index_add_(0, token, self.experts[e](x[token]) * weights[token, slot, None])


class _HitIndices(_Layer):
    def __init__(self, hit: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.hit = hit

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x)
        out = torch.zeros_like(x)
        for e in self.hit(ids):
            self.add(out, x, weights, ids, e)
        return out


def _counts(ids: Tensor) -> Tensor:
    return F.one_hot(ids, E).sum((0, 1))


HITS: dict[str, Callable[[Tensor], Any]] = {
    "nonzero": lambda ids: [e[0] for e in _counts(ids).nonzero()],
    "nonzero, flat list": lambda ids: _counts(ids).nonzero().flatten().tolist(),
    "nonzero, list of lists": lambda ids: [e for (e,) in _counts(ids).nonzero().tolist()],
    "nonzero, squeezed": lambda ids: _counts(ids).nonzero().squeeze(-1),
    "nonzero as tuple": lambda ids: (_counts(ids) > 0).nonzero(as_tuple=True)[0],
    "where": lambda ids: torch.where(_counts(ids) > 0)[0].cpu(),
    "by position": lambda ids: (lambda hit: [hit[i] for i in range(len(hit))])(_counts(ids).nonzero()[:, 0]),
    "unique": lambda ids: torch.unique(ids),
    "unique of a view": lambda ids: ids.view(-1).unique().tolist(),  # type: ignore[no-untyped-call]
    "counts to the host": lambda ids: [e for e, n in enumerate(_counts(ids).tolist()) if n > 0],
    "counts through numpy": lambda ids: [e for e, n in enumerate(_counts(ids).cpu().numpy()) if n != 0],
    "bincount": lambda ids: [
        e for e, n in enumerate(torch.bincount(ids.view(-1), minlength=E).tolist()) if n
    ],
    "any of a mask": lambda ids: [e for e in range(E) if (ids == e).any()],
    "not any": lambda ids: [e for e in range(E) if not (ids != e).all()],
    "a sum": lambda ids: [e for e in range(E) if (ids == e).sum() > 0],
    "a sum as a number": lambda ids: [e for e in range(E) if (ids == e).sum().item() != 0],
    "an empty index": lambda ids: [e for e in range(E) if torch.where(ids == e)[0].numel() > 0],
    "the length of an index": lambda ids: [e for e in range(E) if len(torch.where(ids == e)[0])],
}
ASKS_ALL = {"not any"}  # a question that says nothing of an expert with tokens


@pytest.mark.parametrize("name", [h for h in HITS if h not in ASKS_ALL])
def test_hit_experts_however_they_are_found(name: str) -> None:
    model = _HitIndices(HITS[name])
    program = dsmoe.compile(model, (torch.randn(37, D),))
    assert program.report.fused == 1
    assert any("assumed, and held" in remark for remark in program.report.remarks)
    for tokens in (37, 5, 1, 0):
        x = torch.randn(tokens, D)
        assert relative(program(x), model(x)) < 1e-6


def test_a_question_about_all_pairs_is_no_question_about_an_expert() -> None:
    with pytest.raises(dsmoe.CaptureError, match="may not depend on the values of tensors"):
        dsmoe.compile(_HitIndices(HITS["not any"]), (torch.randn(37, D),))


class _ByValue(_Layer):
    def __init__(self, question: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.question = question

    def forward(self, x: Tensor) -> Tensor:
        _, ids = self.route(x)
        return x + 1 if self.question(x, ids) else x - 1


@pytest.mark.parametrize(
    "question",
    [
        lambda x, ids: x.sum() > 0,
        lambda x, ids: x.sum().item() > 0,
        lambda x, ids: (ids == 0).sum() > 5,
        lambda x, ids: _counts(ids).tolist()[0] > 5,
        lambda x, ids: _counts(ids).tolist()[0] == _counts(ids).tolist()[1],
        lambda x, ids: ids[0, 0] == 1,
        lambda x, ids: torch.isnan(x).any(),
        lambda x, ids: (x > 3).any(),
        lambda x, ids: (ids == 0).all(),
    ],
)
def test_branches_on_values_are_refused_with_the_line(question: Callable[..., Any]) -> None:
    with pytest.raises(dsmoe.CaptureError, match=r"at test_control_flow.py:\d+ .*values of tensors"):
        dsmoe.compile(_ByValue(question), (torch.randn(37, D),))


class _EmptyMatters(_Layer):
    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x)
        out = torch.zeros_like(x)
        for e in range(E):
            if (ids == e).any():
                self.add(out, x, weights, ids, e)
            else:
                out = out + 1
        return out


class _EveryVisitMatters(_Layer):
    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x)
        out = torch.zeros_like(x)
        for e in _counts(ids).nonzero():
            self.add(out, x, weights, ids, e[0])
            out = out * 0.5
        return out


class _CountsAreNone(_Layer):
    def forward(self, x: Tensor) -> Tensor:
        _, ids = self.route(x)
        offsets = (ids.sum(0) - 20).sum().item()
        return x * offsets


@pytest.mark.parametrize("model", [_EmptyMatters(), _EveryVisitMatters()], ids=lambda m: type(m).__name__)
def test_what_tracing_assumed_is_held_against_the_model(model: nn.Module) -> None:
    with pytest.raises(dsmoe.CaptureError, match="every token routed to the first experts") as caught:
        dsmoe.compile(model, (torch.randn(37, D),))
    assert "tracing assumed: test_control_flow.py:" in str(caught.value)
    assert "\n" not in str(caught.value)


class _Asks(_Layer):
    """A loop whose answer depends on which experts have tokens, in ways that few routings show."""

    def __init__(
        self, experts: int, choose: Callable[[Tensor], Tensor], question: Callable[..., Any]
    ) -> None:
        super().__init__()
        self.gate = nn.Linear(D, experts, bias=False)
        self.choose, self.question = choose, question

    def forward(self, x: Tensor) -> Tensor:
        ids = self.choose(self.gate(x).softmax(-1))
        out = torch.zeros_like(x)
        for e in range(self.gate.out_features):
            out = self.question(out, x, ids, e)
        return out


def _counts_visits(out: Tensor, x: Tensor, ids: Tensor, e: int) -> Tensor:
    return out + 1 if (ids == e).any() else out


def _second_is_empty(out: Tensor, x: Tensor, ids: Tensor, e: int) -> Tensor:
    return out + (e == 1) if torch.where(ids == e)[0].numel() == 0 else out


def _first_without_second(out: Tensor, x: Tensor, ids: Tensor, e: int) -> Tensor:
    return out + 7 if e == 0 and (ids == 0).any() and not (ids == 1).any() else out


def _single_token(out: Tensor, x: Tensor, ids: Tensor, e: int) -> Tensor:
    found = (ids == e).any(-1).nonzero().squeeze()
    return out + 1 if found.dim() == 0 else out.index_add(0, found, x[found])


SELECTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "topk": lambda p: p.topk(K, dim=-1).indices,
    "max": lambda p: p.max(-1, keepdim=True).indices,
    "argmax": lambda p: p.argmax(-1).unsqueeze(-1),
    "min": lambda p: p.min(-1, keepdim=True)[1],
    "argmin": lambda p: p.argmin(-1, keepdim=True),
    "sort": lambda p: p.sort(-1, descending=True)[1][:, :K],
    "argsort": lambda p: p.argsort(-1, descending=True)[:, :K],
    "kthvalue": lambda p: p.kthvalue(2, -1, keepdim=True)[1],
}


@pytest.mark.parametrize("selection", SELECTIONS)
def test_every_way_to_select_is_forced(selection: str) -> None:
    with pytest.raises(dsmoe.CaptureError, match="every token routed to"):
        dsmoe.compile(_Asks(E, SELECTIONS[selection], _counts_visits), (torch.randn(37, D),))


@pytest.mark.parametrize(
    ("experts", "question"),
    [(3, _second_is_empty), (4, _first_without_second), (4, _single_token)],
    ids=["one in the middle", "two at once", "a single token"],
)
def test_routings_that_the_ends_do_not_show(experts: int, question: Callable[..., Any]) -> None:
    with pytest.raises(dsmoe.CaptureError, match="every token routed to"):
        dsmoe.compile(_Asks(experts, SELECTIONS["topk"], question), (torch.randn(37, D),))


class _Kept(_Layer):
    """Only some rows are routed: which, is not known to routing."""

    def __init__(self, early: bool) -> None:
        super().__init__()
        self.early = early

    def forward(self, x: Tensor, kept: Tensor) -> Tensor:
        rows = x[kept]
        if self.early and rows.shape[0] == 0:
            return x
        weights, ids = self.route(rows)
        out = torch.zeros_like(rows)
        for e in range(E):
            self.add(out, rows, weights, ids, e)
        return x.index_put((kept,), out) + 1


def test_rows_chosen_by_a_mask_are_routed() -> None:
    model = _Kept(early=False)
    program = dsmoe.compile(model, (torch.randn(37, D), torch.rand(37) > 0.5))
    assert program.report.fused == 1
    for tokens in (37, 12):
        x, kept = torch.randn(tokens, D), torch.rand(tokens) > 0.5
        assert relative(program(x, kept), model(x, kept)) < 1e-6


def test_masks_that_are_inputs_are_emptied() -> None:
    with pytest.raises(dsmoe.CaptureError, match="every token routed to the first experts"):
        dsmoe.compile(_Kept(early=True), (torch.randn(37, D), torch.rand(37) > 0.5))


def test_rows_chosen_by_their_values_are_no_tokens_of_an_expert() -> None:
    def chosen(x: Tensor) -> Tensor:
        rows = x[x[:, 0] > 1.0]
        return x if rows.shape[0] == 0 else x + rows.sum(0)

    with pytest.raises(dsmoe.CaptureError, match="values of tensors"):
        dsmoe.compile(chosen, (torch.randn(37, D),))


class _RoutedRowsByValue(_Layer):
    """What is picked from is routing, how much is picked is not."""

    def forward(self, x: Tensor) -> Tensor:
        _, ids = self.route(x)
        picked = ids[x[:, 0] > 1.0]
        return x if picked.shape[0] == 0 else x + picked.sum()


def test_ids_chosen_by_values_are_no_tokens_of_an_expert() -> None:
    with pytest.raises(dsmoe.CaptureError, match="values of tensors"):
        dsmoe.compile(_RoutedRowsByValue(), (torch.randn(37, D),))


def test_counts_without_a_minlength() -> None:
    def by_offsets(rows: Tensor, counts: Tensor) -> list[Tensor]:
        return _by_offsets(rows, counts)

    class Verbatim(_Segments):
        def forward(self, x: Tensor) -> Tensor:
            weights, ids = self.route(x)
            flat = ids.view(-1)
            order, out = flat.argsort(), torch.zeros_like(x)
            ends = flat.bincount().cpu().numpy().cumsum(0)
            for e, end in enumerate(ends):
                start = 0 if e == 0 else ends[e - 1]
                if start == end:
                    continue
                token = order[start:end] // K
                rows = self.experts[e](x[token]) * weights.view(-1, 1)[order[start:end]]
                out.scatter_reduce_(0, token.view(-1, 1).repeat(1, D), rows, reduce="sum")
            return out

    model = Verbatim(by_offsets)
    program = dsmoe.compile(model, (torch.randn(37, D),), require_fused=True)
    for tokens in (37, 5, 1):
        x = torch.randn(tokens, D)
        assert relative(program(x), model(x)) < 1e-6


def _given(x: Tensor, ids: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """Routed elsewhere: the ids are an input. An expert without tokens adds 1."""
    out = torch.zeros_like(x)
    for e in range(E):
        if (ids == e).any():
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, x[token] @ experts[e] * weights[token, slot, None])
        else:
            out = out + 1
    return out


def test_ids_that_are_an_input_are_forced_too() -> None:
    ids = torch.stack([torch.randperm(E)[:K] for _ in range(37)])
    example = (torch.randn(37, D), ids, torch.rand(37, K), torch.randn(E, D, D))
    with pytest.raises(dsmoe.CaptureError, match="every token routed to the first experts"):
        dsmoe.compile(_given, example)


def test_assumptions_are_held_to_even_when_rewrites_are_trusted() -> None:
    with pytest.raises(dsmoe.CaptureError, match="tracing assumed"):
        dsmoe.compile(_EmptyMatters(), (torch.randn(37, D),), verify="off")


def test_numbers_that_count_nothing_may_be_negative() -> None:
    model = _CountsAreNone()
    program = dsmoe.compile(model, (x := torch.randn(37, D),))
    assert relative(program(x), model(x)) == 0


class _Sentinel(_Layer):
    """One class more than there are experts, for dropped pairs, and no branch that skips it."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x)
        out = torch.zeros_like(x)
        for e in F.one_hot(ids, E + 1).sum((0, 1)).nonzero():
            self.add(out, x, weights, ids, e[0])
        return out


def test_a_class_without_weights_is_left_out() -> None:
    model = _Sentinel()
    program = dsmoe.compile(model, (x := torch.randn(37, D),))
    assert relative(program(x), model(x)) < 1e-6
    assert any(assumption.SENTINEL in remark for remark in program.report.remarks)


class _Segments(_Layer):
    def __init__(self, cut: Callable[[Tensor, Tensor], list[Tensor]]) -> None:
        super().__init__()
        self.cut = cut

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x)
        order = ids.view(-1).argsort(stable=True)
        rows = self.cut(x[order // K], _counts(ids))
        y = torch.cat([expert(part) for expert, part in zip(self.experts, rows, strict=True)])
        back = torch.empty_like(y)
        back[order] = y
        return (back.view(*ids.shape, -1) * weights.unsqueeze(-1)).sum(1)


def _by_offsets(rows: Tensor, counts: Tensor) -> list[Tensor]:
    ends = counts.cumsum(0).tolist()
    return [rows[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _by_running_sum(rows: Tensor, counts: Tensor) -> list[Tensor]:
    parts, start = [], 0
    for n in counts.cpu().numpy():
        parts.append(rows[start : start + n])
        start += n
    return parts


@pytest.mark.parametrize(
    "cut",
    [_by_offsets, _by_running_sum, lambda rows, counts: list(rows.split(counts.tolist()))],
    ids=["offsets", "running sum", "split"],
)
def test_segments_by_counts_read_on_the_host(cut: Callable[[Tensor, Tensor], list[Tensor]]) -> None:
    model = _Segments(cut)
    program = dsmoe.compile(model, (torch.randn(37, D),))
    for tokens in (37, 5, 1):
        x = torch.randn(tokens, D)
        assert relative(program(x), model(x)) < 1e-6
    assert program.report.fused == 1


class _Named(nn.Module):
    """Experts by formatted names, a `.to` that changes nothing."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dtype = dtype
        self.gate = nn.Linear(D, E, bias=False)
        self.experts = nn.ModuleDict({f"expert_{e}": nn.Linear(D, D) for e in range(E)})

    def forward(self, x: Tensor) -> Tensor:
        self.gate = self.gate.to(self.dtype)
        ids = self.gate(x).argmax(-1)
        out = torch.zeros_like(x)
        for e in F.one_hot(ids, E).sum(0).nonzero():
            (token,) = torch.where(ids == e)
            out.index_add_(0, token, self.experts[f"expert_{e[0]}"](x[token]))
        return out


def test_formatted_names_and_a_needless_conversion() -> None:
    model = _Named(torch.float32)
    gate = model.gate
    program = dsmoe.compile(model, (x := torch.randn(37, D),))
    assert relative(program(x), model(x)) < 1e-6
    assert model.gate is gate and "to" not in vars(gate)


def test_a_conversion_that_changes_something_is_none_of_ours() -> None:
    with pytest.raises(dsmoe.DsmoeError):
        dsmoe.compile(_Named(torch.float64), (torch.randn(37, D),))


def _capacity(tokens: int) -> int:
    return max(int(1.25 * tokens * K / E), 4)


class _Capacity(_Layer):
    def __init__(self, capacity: Callable[[int], int]) -> None:
        super().__init__()
        self.capacity = capacity

    def forward(self, x: Tensor) -> Tensor:
        _, ids = self.route(x)
        slots = self.capacity(x.shape[0])
        kept = F.one_hot(ids, E).sum(1).cumsum(0).clamp(max=slots - 1)
        return F.one_hot(kept, slots).to(x.dtype).sum((1, 2))[:, None] * x + slots


@pytest.mark.parametrize(
    "capacity",
    [
        _capacity,
        lambda tokens: int(tokens * 0.5) + 1,
        lambda tokens: int(tokens * K // E) + 1,
        lambda tokens: math.ceil(1.25 * tokens / E),
        lambda tokens: min(int(1.5 * tokens), 40) + 1,
    ],
)
def test_a_capacity_computed_from_the_tokens_stays_symbolic(capacity: Callable[[int], int]) -> None:
    model = _Capacity(capacity)
    program = dsmoe.compile(model, (torch.randn(37, D),))
    for tokens in (37, 5, 100, 3):
        x = torch.randn(tokens, D)
        assert relative(program(x), model(x)) == 0


def test_the_models_own_functions_stay_what_they_were() -> None:
    model = _Capacity(_capacity)
    before = dict(vars(model))
    dsmoe.compile(model, (torch.randn(37, D),))
    assert vars(model) == before and model.capacity is _capacity
    assert type(_capacity(10)) is int and "int" not in _capacity.__globals__


def test_an_inspection_says_that_nothing_was_checked() -> None:
    report = dsmoe.inspect(_HitIndices(HITS["nonzero"]).to("meta"), (torch.randn(37, D),))
    assert report.fused == 1
    assert any(remark.startswith("assumed, not checked: test_control_flow.py") for remark in report.remarks)


def test_assumptions_are_written_once_a_line() -> None:
    assumed = capture(_HitIndices(HITS["any of a mask"]), (torch.randn(37, D),)).assumed
    assert [a.text for a in assumed] == [assumption.TOKENS]
    assert assumed[0].source.startswith("test_control_flow.py:")
