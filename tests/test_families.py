"""Models of transformers as their users have them: a cache by default, one token as the example, masks if
they like.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import dsmoe_compiler as dsmoe
from tests.tiny_models import relative, tokens
from tests.transformers_models import FAMILIES, VOCABULARY, family


def _ids(*size: int) -> Tensor:
    return tokens(*size, vocabulary=VOCABULARY)


@pytest.mark.parametrize("name", FAMILIES)
def test_one_token_captures_every_size(name: str) -> None:
    model = family(name)
    before = (model.config._experts_implementation, model.config.use_cache)  # type: ignore[union-attr]
    program = dsmoe.compile(model, (), {"input_ids": _ids(1, 1)}, require_fused=True)
    assert (model.config._experts_implementation, model.config.use_cache) == before  # type: ignore[union-attr]
    assert len(program.report.layers) == 2
    with torch.no_grad():
        for size in ((1, 1), (3, 9), (1, 300), (0, 5)):
            ids = _ids(*size)
            try:
                expected = model(ids)
            except Exception:
                assert size == (0, 5), f"{name} itself must take {size}"
                continue
            found = program(ids)
            assert type(found) is type(expected)
            assert relative(found.logits, expected.logits) < 1e-4, size


@pytest.fixture(scope="module")
def mixtral() -> nn.Module:
    return family("mixtral")


def test_masks_and_positions(mixtral: nn.Module) -> None:
    def call(batch: int, length: int) -> dict[str, Tensor]:
        mask = torch.ones(batch, length, dtype=torch.long)
        mask[-1:, : length // 2] = 0
        positions = torch.arange(length).expand(batch, length)
        return {"input_ids": _ids(batch, length), "attention_mask": mask, "position_ids": positions}

    program = dsmoe.compile(mixtral, (), call(2, 6), require_fused=True)
    with torch.no_grad():
        for size in ((3, 9), (1, 4), (1, 1)):
            inputs = call(*size)
            assert relative(program(**inputs).logits, mixtral(**inputs).logits) < 1e-4
    with pytest.raises(dsmoe.ShapeError, match="attention_mask: dimension 1 is 5"):
        program(**{**call(2, 6), "attention_mask": torch.ones(2, 5, dtype=torch.long)})


@pytest.mark.parametrize("length", [1, 6])
def test_a_mask_for_every_pair_of_positions(mixtral: nn.Module, length: int) -> None:
    def call(batch: int, size: int) -> dict[str, Tensor]:
        mask = torch.full((size, size), torch.finfo(torch.float32).min).triu(1)
        return {"input_ids": _ids(batch, size), "attention_mask": mask.expand(batch, 1, size, size)}

    program = dsmoe.compile(mixtral, (), call(1, length), require_fused=True)
    with torch.no_grad():
        for size in ((3, 9), (1, 4)):
            inputs = call(*size)
            assert relative(program(**inputs).logits, mixtral(**inputs).logits) < 1e-4


def test_a_cache_asked_for_is_left_out(mixtral: nn.Module) -> None:
    program = dsmoe.compile(mixtral, (_ids(2, 5),), {"use_cache": True})
    found = program(_ids(3, 7), use_cache=True)
    with torch.no_grad():
        assert found.past_key_values is None
        assert relative(found.logits, mixtral(_ids(3, 7)).logits) < 1e-4


def test_a_tuple_when_asked_for(mixtral: nn.Module) -> None:
    program = dsmoe.compile(mixtral, (_ids(2, 5),), {"return_dict": False})
    with torch.no_grad():
        assert relative(program(_ids(3, 7))[0], mixtral(_ids(3, 7)).logits) < 1e-4


def test_an_exported_model(mixtral: nn.Module) -> None:
    ids = _ids(2, 7)
    before = mixtral.config._experts_implementation  # type: ignore[union-attr]
    mixtral.config._experts_implementation = "grouped_mm"  # type: ignore[union-attr]
    try:
        with torch.no_grad():
            exported = torch.export.export(
                mixtral,
                (),
                {"input_ids": ids, "use_cache": False},
                dynamic_shapes={"input_ids": {0: Dim.AUTO, 1: Dim.AUTO}, "use_cache": None},
                strict=False,
            )
    finally:
        mixtral.config._experts_implementation = before  # type: ignore[union-attr]
    program = dsmoe.compile(exported, require_fused=True)
    with torch.no_grad():
        assert relative(program(input_ids=_ids(3, 9)).logits, mixtral(_ids(3, 9)).logits) < 1e-4
