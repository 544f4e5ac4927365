"""Inputs for a benchmark: ids at other lengths, masks and positions with them, anything else as it is."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsmoe_compiler.cli.bench_inputs import TURNS, Workload, workloads
from dsmoe_compiler.cli.bench_options import TOKENS, Options
from dsmoe_compiler.cli.model_argument import ModelCall
from dsmoe_compiler.ir.errors import InputError

IDS = torch.tensor([[3, 7, 2, 9, 4], [1, 5, 8, 6, 0]])


class Decoder(nn.Module):
    """What transformers' models and the zoo's say of themselves."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(**config)


def call(*args: object, model: Any = torch.relu, **kwargs: object) -> ModelCall:
    return ModelCall(model, args, kwargs)


def loads(of: ModelCall, **options: Any) -> tuple[Workload, ...]:
    return workloads("mine:build", of, Options(**options))


def ids_of(load: Workload) -> list[Tensor]:
    return [kwargs["input_ids"] for _, kwargs in load.calls]


def test_ids_of_the_vocabulary_at_every_length() -> None:
    found = loads(call(input_ids=IDS, use_cache=False, model=Decoder(vocab_size=300)), tokens=(1, 64))
    assert [(load.tokens, load.shape, load.label) for load in found] == [
        (1, (1, 1), "1"),
        (64, (1, 64), "64"),
    ]
    for load in found:
        assert len(load.calls) == TURNS
        assert all(ids.shape == load.shape and ids.dtype == torch.int64 for ids in ids_of(load))
        assert all(kwargs["use_cache"] is False for _, kwargs in load.calls)
    drawn = torch.cat(ids_of(found[1]))
    assert drawn.min() >= 0 and 9 < drawn.max() < 300


def test_turns_have_other_ids_and_the_next_run_the_same() -> None:
    of = call(input_ids=IDS, model=Decoder(vocab_size=300))
    (first,), (again,) = loads(of, tokens=(16,)), loads(of, tokens=(16,))
    assert len({tuple(ids.flatten().tolist()) for ids in ids_of(first)}) == TURNS
    assert all(a.equal(b) for a, b in zip(ids_of(first), ids_of(again), strict=True))


def test_where_nobody_knows_the_vocabulary_ids_are_those_of_the_example() -> None:
    (load,) = loads(call(IDS.int()), tokens=(500,))
    drawn = torch.cat([args[0] for args, _ in load.calls])
    assert (drawn.min().item(), drawn.max().item(), drawn.dtype) == (0, 9, torch.int32)


def test_the_vocabulary_of_a_model_with_several_configurations_is_the_language_models() -> None:
    text = SimpleNamespace(vocab_size=2, max_position_embeddings=20)
    model = Decoder(get_text_config=lambda: text)
    found = loads(call(input_ids=IDS, model=model))
    assert [load.tokens for load in found] == [1, 16]
    assert torch.cat(ids_of(found[1])).max() == 1


def test_masks_are_repeated_and_positions_count_on() -> None:
    mask, positions = torch.ones_like(IDS), torch.arange(5).repeat(2, 1)
    mask[:, 0] = 0
    of = call(input_ids=IDS, attention_mask=mask, position_ids=positions, drop=mask.bool())
    (load,) = loads(of, tokens=(7,), batch=3)
    _, kwargs = load.calls[0]
    assert load.shape == (3, 7)
    assert kwargs["attention_mask"].equal(torch.tensor([0, 1, 1, 1, 1, 0, 1]).repeat(3, 1))
    assert kwargs["drop"].dtype == torch.bool
    assert kwargs["position_ids"].equal(torch.arange(7).repeat(3, 1))


def test_a_decoders_ids_are_drawn_too() -> None:
    model = Decoder(vocab_size=300)
    (load,) = loads(call(input_ids=IDS, decoder_input_ids=IDS, model=model), tokens=(64,))
    _, kwargs = load.calls[0]
    assert kwargs["decoder_input_ids"].max() > 9
    assert not kwargs["decoder_input_ids"].equal(kwargs["input_ids"])


def test_without_being_asked_what_the_model_takes() -> None:
    assert [load.tokens for load in loads(call(input_ids=IDS))] == list(TOKENS)
    short = Decoder(max_position_embeddings=128)
    assert [load.tokens for load in loads(call(input_ids=IDS, model=short))] == [1, 16, 128]
    with pytest.raises(InputError, match="mine:build takes at most 128 tokens, --tokens says 129"):
        loads(call(input_ids=IDS, model=short), tokens=(4, 129))


@pytest.mark.parametrize(
    "args",
    [
        (torch.ones(4, 8),),
        (IDS, torch.ones(2, 5, 8)),
        (IDS, torch.ones(2, 6, dtype=torch.int64)),
        (IDS[0],),
        (),
    ],
    ids=["rows", "ids and rows", "ids of two lengths", "ids of one dimension", "nothing"],
)
def test_anything_else_is_measured_as_it_is(args: tuple[object, ...]) -> None:
    (load,) = loads(call(*args, scale=2.0))
    assert load.tokens is None
    assert load.calls == ((args, {"scale": 2.0}),)
    for option in ({"tokens": (4,)}, {"batch": 2}):
        with pytest.raises(InputError, match="mine:build takes other inputs: say theirs with --input"):
            loads(call(*args), **option)


def test_a_shape_stands_for_the_tokens_that_nobody_knows() -> None:
    (load,) = loads(call(torch.ones(4, 8)))
    assert (load.label, load.where) == ("4x8", "inputs of 4x8")
