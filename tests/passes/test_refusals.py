"""Every obligation that fails refuses its layer, with a code of its own; the layer runs as it was written."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsmoe_compiler.ir.errors import CODES, REMEDIES, CaptureError
from tests.passes import lookalikes, refusals_page, spellings
from tests.passes.checks import assert_same, compiled, only_layer, refusal, some_inputs
from tests.passes.refusals import PROVOKED, Provoked, made, outcome_of
from tests.passes.refusals_page import code_of
from tests.passes.spellings import Experts, Spec, Spelled, grouped, layer


def _expert_choice(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Each expert chooses two tokens: rows of experts, not of tokens."""
    chosen_weights, chosen = x[:, : experts.count].softmax(0).t().topk(2, dim=-1)
    y = experts.body.run(x[chosen], lambda name, rows: torch.bmm(rows, experts.in_out(name)))
    rows = (y * chosen_weights.unsqueeze(-1)).reshape(-1, x.shape[-1])
    return torch.zeros_like(x).index_add(0, chosen.reshape(-1), rows)


def _another_number_of_biases(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """A bias with a row more than there are experts."""
    flat = ids.reshape(-1)
    y = experts.body.run(
        x.repeat_interleave(ids.shape[-1], dim=0),
        lambda name, rows: torch.bmm(experts.get_parameter(name)[flat], rows.unsqueeze(-1)).squeeze(-1),
    )
    y = (y + experts.get_parameter("extra")[flat]) * weights.reshape(-1, 1)
    return y.view(x.shape[0], ids.shape[-1], x.shape[1]).sum(1)


def _unknown_step(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The experts' rows pass an operator that is no body step."""
    flat = ids.reshape(-1)
    y = experts.body.run(
        x.repeat_interleave(ids.shape[-1], dim=0),
        lambda name, rows: torch.bmm(experts.get_parameter(name)[flat], rows.unsqueeze(-1)).squeeze(-1),
    )
    return (y.cumsum(-1) * weights.reshape(-1, 1)).view(x.shape[0], ids.shape[-1], x.shape[1]).sum(1)


REFUSED: list[tuple[str, Spelled, str]] = [
    ("R301", _unknown_step, "cumsum"),
    ("R301", lookalikes.gate_of_another_expert, "pairs in their own order"),
    ("R302", _another_number_of_biases, "same experts"),
    ("R303", lookalikes.two_inputs, "2 different inputs"),
    ("R303", lookalikes.more_rows_than_tokens, "rows where the ids"),
    ("R401", lookalikes.descending, "descending"),
    ("R401", lookalikes.counts_of_others, "counts"),
    ("R401", lookalikes.counts_shifted, "counts"),
    ("R401", lookalikes.searched_below_zero, "negative"),
    ("R402", lookalikes.never_brought_back, "tokens' order"),
    ("R402", lookalikes.permuted_again, "inverse"),
    ("R402", lookalikes.inverse_of_another, "inverse"),
    ("R402", lookalikes.inverse_backwards, "descending"),
    ("R402", lookalikes.added_to_other_tokens, "own tokens"),
    ("R403", lookalikes.wrong_divisor, "// 3, each token has 2"),
    ("R404", lookalikes.dense_repeated_ids, "repeat"),
    ("R405", lookalikes.dense_on_ones, "not zero away from the ids"),
    ("R406", lookalikes.dense_plus_one, "every expert reaches every token"),
    ("R406", lookalikes.dense_biased_after, "every expert reaches every token"),
    ("R407", _expert_choice, "not known"),
    ("R408", lookalikes.input_overwritten, "overwritten in place"),
    ("R408", lookalikes.weights_overwritten, "overwritten in place"),
    ("R408", lookalikes.ids_overwritten, "overwritten in place"),
]


def _made(spelling: Spelled) -> nn.Module:
    made = layer(Spec(spelling))
    if spelling is _another_number_of_biases:
        made.experts.extra = nn.Parameter(torch.randn(9, 16), requires_grad=False)
    return made


@pytest.mark.parametrize(
    ("code", "spelling", "because"), REFUSED, ids=[f"{code} {f.__name__}" for code, f, _ in REFUSED]
)
def test_an_obligation_that_fails_is_named(code: str, spelling: Spelled, because: str) -> None:
    made = _made(spelling)
    program = compiled(made)
    found = refusal(program)
    assert (found.code, because in found.because) == (code, True), str(found)
    assert found.node and found.source.endswith(tuple("0123456789")), "a refusal says where"
    assert_same(program, made, some_inputs(16, shapes=[(2, 5), (3, 4)]))


def test_a_biased_body_is_not_zero_where_its_input_is_scaled_by_zero() -> None:
    program = compiled(layer(Spec(spellings.dense_scaled_input, body=spellings.BIASED)))
    assert refusal(program).code == "R406"


def test_nan_in_the_weights() -> None:
    made = layer(Spec(grouped))
    made.experts.get_parameter("down").data[3, 1, 2] = torch.nan
    program = compiled(made)
    assert refusal(program).code == "R305"


# Codes of router lookalikes; those of the others are R201.
ROUTER_CODES = {"other input": "R202", "smallest": "R204", "bias updated": "R408"}


@pytest.mark.parametrize(
    ("code", "route"),
    [
        ("R201", spellings.UNKNOWN[0]),
        *((ROUTER_CODES.get(route.name, "R201"), route) for route in lookalikes.ROUTER_LOOKALIKES),
    ],
    ids=str,
)
def test_a_router_that_is_not_known_stays_and_says_so(code: str, route: spellings.Route) -> None:
    program = compiled(layer(Spec(spellings.gathered, route=route)), verify="off")
    found = only_layer(program)
    assert found.fused and found.spec is not None and found.spec.router is None
    assert any(f"router as written ({code}:" in remark for remark in program.report.remarks)


class _Bag(nn.Module):
    """An embedding bag: ids that nobody selected pick rows that no token meets."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(7, 16))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table[torch.arange(x.shape[0] * 2).remainder(7).view(x.shape[0], 2)].sum(1).unsqueeze(
            1
        )


def test_rows_that_nobody_selects_are_no_layer() -> None:
    made = _Bag().requires_grad_(False)
    program = compiled(made)
    assert program.report.layers == ()
    assert_same(program, made, some_inputs(16))


class _TwoLayers(nn.Module):
    """A refused layer, then a fused one that reads nothing but its result."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (layer(Spec(f)) for f in (_unknown_step, spellings.gathered))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x))
        return y


def test_a_refused_layer_leaves_the_next_alone() -> None:
    made = _TwoLayers()
    program = compiled(made)
    first, second = program.report.layers
    assert (first.name, first.fused, second.name, second.fused) == ("first", False, "second", True)
    assert_same(program, made, some_inputs(16))


class Stacked(nn.Module):
    """Layers that read nothing but the layer before."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([layer(Spec(spellings.gathered)) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(x.shape[0] * x.shape[1], x.shape[2])
        for one in self.layers:
            assert isinstance(one, spellings.Layer)
            weights, ids = one.router(flat)
            flat = one.spelling(one.experts, flat, ids, weights)
        return flat.view(x.shape)


def test_a_layer_may_read_the_op_before_it_directly() -> None:
    made = Stacked()
    program = compiled(made)
    assert [found.fused for found in program.report.layers] == [True] * 3
    targets = [str(n.target) for n in program.exported.graph.nodes if n.op == "call_function"]
    assert sum("dsmoe" in t for t in targets) == 3 and not any("bmm" in t for t in targets)
    assert_same(program, made, some_inputs(16))


class _OneSelection(nn.Module):
    """One router, two sets of experts, as models with text and image experts have."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = layer(Spec(spellings.gathered)), layer(Spec(spellings.grouped))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(x.shape[0] * x.shape[1], x.shape[2])
        weights, ids = self.one.router(flat)
        y = spellings.gathered(self.one.experts, flat, ids, weights)
        other = spellings.grouped(self.other.experts, flat, ids, weights)
        return (y + other).view(x.shape)


def test_one_selection_for_two_sets_of_experts_is_two_layers() -> None:
    made = _OneSelection()
    program = compiled(made)
    assert [found.fused for found in program.report.layers] == [True, True]
    assert len({found.name for found in program.report.layers}) == 2
    assert_same(program, made, some_inputs(16))


class _BySlot(nn.Module):
    """Ids, weights and rows keep (batch, sequence) apart: nothing is ever flattened by the model."""

    def __init__(self) -> None:
        super().__init__()
        made = layer(Spec(spellings.gathered))
        self.router, self.experts = made.router, made.experts

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        flat = ids.flatten()
        rows = x.reshape(x.shape[0] * x.shape[1], x.shape[2]).repeat_interleave(2, dim=0)
        h = torch.bmm(self.experts.get_parameter("gate_up")[flat], rows.unsqueeze(-1)).squeeze(-1)
        gate, up = h.chunk(2, dim=-1)
        h = (F.silu(gate) * up).unsqueeze(-1)
        y = torch.bmm(self.experts.get_parameter("down")[flat], h).view(*ids.shape, x.shape[-1])
        out: Tensor = (y * weights.unsqueeze(-1)).sum(2)
        return out


def test_ids_and_sums_with_a_batch_and_a_length() -> None:
    made = _BySlot()
    program = compiled(made)
    found = only_layer(program)
    assert found.fused and found.spec is not None and found.spec.router is not None, str(found)
    assert_same(program, made, some_inputs(16))


@pytest.mark.parametrize("provoked", PROVOKED, ids=str)
def test_a_layer_for_each_code(provoked: Provoked) -> None:
    assert code_of(provoked) == provoked.code
    outcome = outcome_of(provoked)
    if not isinstance(outcome, CaptureError) and provoked.code != "R305":
        assert_same(outcome, made(provoked), some_inputs(16, shapes=[(2, 5), (3, 4)]))


def test_every_code_has_a_meaning_a_layer_and_a_remedy() -> None:
    assert sorted(provoked.code for provoked in PROVOKED) == sorted(CODES) == sorted(REMEDIES)


def test_the_page_shows_what_is_refused() -> None:
    page = (Path(__file__).parents[2] / "docs" / "refusals.md").read_text(encoding="utf-8")
    assert page == refusals_page.text(), "python -m tests.passes.refusals_page > docs/refusals.md"
