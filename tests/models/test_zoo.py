"""The zoo's models have the sizes they are named for."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dsmoe_compiler.models.presets.deepseek_moe import DEEPSEEK_MOE
from dsmoe_compiler.models.presets.deepseek_v2 import DEEPSEEK_V2
from dsmoe_compiler.models.presets.deepseek_v3 import DEEPSEEK_V3
from dsmoe_compiler.models.presets.dense import DENSE
from dsmoe_compiler.models.presets.gshard import GSHARD
from dsmoe_compiler.models.presets.hash_layer import HASH_LAYER
from dsmoe_compiler.models.presets.switch import SWITCH
from dsmoe_compiler.models.stacked_experts import StackedExperts
from dsmoe_compiler.models.zoo import (
    ZOO,
    UnknownModel,
    build,
    example_inputs,
    names,
    parameter_count,
    preset,
)

FAMILIES = (DEEPSEEK_MOE, DEEPSEEK_V2, DEEPSEEK_V3, HASH_LAYER, SWITCH, GSHARD, DENSE)


def test_every_preset_is_in_the_zoo_once() -> None:
    assert names() == tuple(ZOO) == tuple(name for family in FAMILIES for name in family)


def test_the_16b_has_exactly_the_released_models_parameters() -> None:
    assert parameter_count("deepseek-moe-16b").total == 16_375_728_128


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("deepseek-moe-tiny", 2),
        ("deepseek-moe-demo", 2),
        ("deepseek-moe-2b", 9),
        ("deepseek-moe-16b", 27),
        ("deepseek-moe-145b", 61),
        ("deepseek-v2", 59),
        ("deepseek-v3", 58),
        ("hash-layer-2b", 9),
        ("switch-2b", 9),
        ("gshard-137b", 61),
        ("deepseek-67b", 0),
    ],
)
def test_moe_layers(name: str, layers: int) -> None:
    model = build(name, device="meta")
    assert sum(isinstance(module, StackedExperts) for module in model.modules()) == layers
    assert preset(name).config.num_moe_layers == layers


def test_the_tiny_model_takes_under_5_megabytes_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "tiny.pt"
    torch.save(build("deepseek-moe-tiny").state_dict(), path)
    assert 4_500_000 < path.stat().st_size < 5_000_000


def test_the_demo_is_mostly_experts() -> None:
    config = DEEPSEEK_MOE["deepseek-moe-demo"].config
    experts = 3 * config.hidden_size * config.moe_intermediate_size * config.n_routed_experts
    total = parameter_count("deepseek-moe-demo").total
    assert 300e6 < 4 * total < 400e6
    assert experts * config.num_moe_layers > 0.8 * total


def test_a_seed_is_a_model_in_every_dtype() -> None:
    one, same, other = (build("deepseek-moe-tiny", seed=seed).state_dict() for seed in (1, 1, 2))
    rounded = build("deepseek-moe-tiny", seed=1, dtype=torch.bfloat16).state_dict()
    for name, value in one.items():
        assert value.equal(same[name]), name
        assert not value.equal(other[name]), name
        assert value.bfloat16().equal(rounded[name]), name


def test_building_draws_nothing_from_the_global_generator() -> None:
    before = torch.get_rng_state()
    build("deepseek-moe-tiny")
    example_inputs("deepseek-moe-tiny")
    assert torch.get_rng_state().equal(before)


@torch.no_grad()
def test_random_weights_route_to_many_experts_and_weigh_them_unevenly() -> None:
    model = build("deepseek-moe-tiny")
    gate = model.get_submodule("model.layers.1.mlp.gate")
    ids, weights = gate(torch.randn(200, 96, generator=torch.Generator().manual_seed(0)))
    assert ids.unique().numel() == 16
    assert weights[:, 0].mean() > 3 * weights[:, 3].mean()


def test_the_meta_device_holds_no_memory() -> None:
    model = build("deepseek-moe-145b", device="meta")
    assert not model.training
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("name", names())
def test_example_sizes_equal_no_dimension_of_the_model(name: str) -> None:
    inputs = example_inputs(name, "meta")
    config = preset(name).config
    dimensions = {size for parameter in build(name, device="meta").parameters() for size in parameter.shape}
    dimensions |= {value for field, value in vars(config).items() if field != "num_hidden_layers"}
    dimensions |= {config.key_value_heads, config.head_dim, config.head_dim // 2}
    batch, length = inputs["input_ids"].shape
    pairs = batch * length * getattr(config, "num_experts_per_tok", 1)
    assert dimensions.isdisjoint({batch, length, batch * length, pairs})


def test_example_inputs_are_ids_of_the_vocabulary_and_stay_the_same() -> None:
    first, second = example_inputs("deepseek-moe-tiny"), example_inputs("deepseek-moe-tiny")
    assert list(first) == ["input_ids"]
    assert first["input_ids"].dtype == torch.int64
    assert first["input_ids"].equal(second["input_ids"])
    assert first["input_ids"].min() >= 0
    assert first["input_ids"].max() < 512


@pytest.mark.parametrize("call", [build, preset, parameter_count, example_inputs])
def test_an_unknown_name_lists_the_nearest(call: Callable[[str], object]) -> None:
    with pytest.raises(UnknownModel, match="unknown model 'deepseek-moe-16'.*deepseek-moe-16b"):
        call("deepseek-moe-16")


def test_a_name_near_nothing_lists_them_all() -> None:
    with pytest.raises(UnknownModel) as error:
        build("gpt")
    assert all(name in str(error.value) for name in names())
