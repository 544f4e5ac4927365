"""The models export with any batch and length from one example, sizes 0 and 1 included."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram, export

from dsmoe_compiler.models.decoder import CausalLM
from dsmoe_compiler.models.deepseek_moe import DeepSeekMoEForCausalLM
from dsmoe_compiler.models.presets.deepseek_moe import DEEPSEEK_MOE
from dsmoe_compiler.models.zoo import build


def export_dynamically(model: CausalLM[Any], example: Tensor) -> ExportedProgram:
    # Oblivious to the example's sizes, or a 1 is baked in; without duck shapes, or B = L are one symbol.
    config = torch.fx.experimental._config
    with config.patch(backed_size_oblivious=True, use_duck_shape=False):  # type: ignore[attr-defined]
        return export(
            model,
            (),
            {"input_ids": example},
            dynamic_shapes={"input_ids": {0: Dim.AUTO, 1: Dim.AUTO}},
        )


@cache
def tiny() -> CausalLM[Any]:
    return build("deepseek-moe-tiny")


@cache
def exported(batch: int, length: int) -> ExportedProgram:
    return export_dynamically(tiny(), torch.zeros(batch, length, dtype=torch.int64))


@pytest.mark.parametrize("shape", [(3, 9), (1, 300), (0, 5), (1, 1), (2, 0)])
@pytest.mark.parametrize("example", [(2, 7), (1, 1)])
@torch.no_grad()
def test_the_exported_graph_answers_like_the_model(example: tuple[int, int], shape: tuple[int, int]) -> None:
    ids = torch.randint(512, shape, generator=torch.Generator().manual_seed(0))
    logits = exported(*example).module(check_guards=False)(input_ids=ids)
    # The same float32 arithmetic in another order: see the tolerance of test_deepseek_moe.py.
    torch.testing.assert_close(logits, tiny()(ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("example", [(2, 7), (1, 1)])
def test_no_size_is_restricted(example: tuple[int, int]) -> None:
    ranges = exported(*example).range_constraints.values()
    assert len(ranges) == 2
    for allowed in ranges:
        assert allowed.lower == 0
        assert 2**31 in allowed


def test_the_graph_holds_the_gathered_experts_of_each_moe_layer() -> None:
    targets = [str(node.target) for node in exported(2, 7).graph.nodes]
    assert targets.count("aten.topk.default") == 2
    assert targets.count("aten.bmm.default") == 4
    assert not any("nonzero" in target or "index_add" in target for target in targets)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_export(dtype: torch.dtype) -> None:
    program = export_dynamically(
        build("deepseek-moe-tiny", device="meta", dtype=dtype),
        torch.zeros(2, 7, dtype=torch.int64, device="meta"),
    )
    (logits,) = program.graph.output_node().all_input_nodes
    assert logits.meta["val"].dtype == dtype


def test_the_16b_exports_on_the_meta_device() -> None:
    config = replace(DEEPSEEK_MOE["deepseek-moe-16b"].config, num_hidden_layers=2)
    with torch.device("meta"):
        model = DeepSeekMoEForCausalLM(config).eval()
    program = export_dynamically(model, torch.zeros(2, 7, dtype=torch.int64, device="meta"))
    assert [str(node.target) for node in program.graph.nodes].count("aten.topk.default") == 1
