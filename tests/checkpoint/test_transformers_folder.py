"""Folders of models that transformers has: its own classes, read by us, and nothing drawn at random."""

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import dsmoe_compiler as dsmoe
from dsmoe_compiler.checkpoint.errors import CheckpointError
from dsmoe_compiler.checkpoint.reader import Reader
from dsmoe_compiler.checkpoint.sources import Source
from dsmoe_compiler.cli.hf_folder import hf_call
from dsmoe_compiler.ir.errors import InputError
from tests.checkpoint.transformers_files import (
    DEEPSEEK_V3,
    QWEN3_MOE,
    in_float8,
    model_of,
    one_file,
    rewrite,
    saved,
    transformers,
)
from tests.cli.fakes import run, wrong

IDS = torch.arange(22).view(2, 11)
EXPERT = "model.layers.1.mlp.experts.5.up_proj.weight"


def loaded(folder: Path) -> nn.Module:
    model = hf_call(folder, with_weights=True).model
    assert isinstance(model, nn.Module)
    return model


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    return saved(tmp_path / "qwen", model_of("Qwen3Moe", QWEN3_MOE))


@pytest.fixture
def one(qwen: Path) -> Path:
    return one_file(qwen)


def same(model: nn.Module, tensors: Mapping[str, Tensor]) -> bool:
    own = model.state_dict()
    return own.keys() == tensors.keys() and all(own[name].equal(tensors[name]) for name in own)


def test_shards_become_the_model_that_was_saved(qwen: Path) -> None:
    assert len(list(qwen.glob("*.safetensors"))) > 3
    model = loaded(qwen)
    assert same(model, model_of("Qwen3Moe", QWEN3_MOE).state_dict())
    assert not model.training
    assert "HF_DEACTIVATE_ASYNC_LOAD" not in os.environ


def test_every_byte_is_read_once(one: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts, close = list[int](), Reader.__exit__

    def counted(reader: Reader, *details: Any) -> None:
        counts.append(reader.bytes_read)
        close(reader, *details)

    monkeypatch.setattr(Reader, "__exit__", counted)
    hf_call(one, with_weights=False)
    assert counts == []
    loaded(one)
    assert counts == [sum(t.nbytes for t in load_file(one / "model.safetensors").values())]


def test_ctrl_c_is_obeyed_between_tensors(one: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled = list[Source]()

    def fill(reader: Reader, destination: Tensor, source: Source) -> None:
        filled.append(source)
        if len(filled) == 1:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Reader, "fill", fill)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            loaded(one)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(filled) == 1


def test_a_model_that_computes_while_it_is_made_is_checked_when_loaded(
    one: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = loaded(one).state_dict()
    made = transformers.Qwen3MoePreTrainedModel._init_weights

    def computing(model: Any, module: nn.Module) -> None:
        assert float(torch.ones(1)) == 1  # which fake tensors cannot tell
        made(model, module)

    monkeypatch.setattr(transformers.Qwen3MoePreTrainedModel, "_init_weights", computing)
    assert same(loaded(one), whole)
    rewrite(one, **{"model.norm.weight": None})
    with pytest.raises(CheckpointError, match="lacks model.norm.weight"):
        loaded(one)


def test_tied_weights_are_not_missing(tmp_path: Path) -> None:
    folder = saved(tmp_path / "tied", model_of("Qwen3Moe", QWEN3_MOE | {"tie_word_embeddings": True}))
    assert "lm_head" not in (folder / "model.safetensors.index.json").read_text()
    model: Any = loaded(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_compiled_it_gives_the_models_logits(tmp_path: Path) -> None:
    model = model_of("Qwen3Moe", QWEN3_MOE | {"num_hidden_layers": 1})
    folder, output = saved(tmp_path / "qwen", model), tmp_path / "out.pt2"
    result = run("compile", f"hf:{folder}", "-o", str(output))
    assert result.exit_code == 0, result.output
    with torch.no_grad():
        found = dsmoe.load(output)(input_ids=IDS, use_cache=False).logits
        torch.testing.assert_close(found, model(IDS, use_cache=False).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({EXPERT: None}, f": lacks {EXPERT}"),
        (
            {"model.layers.1.mlp.experts.2.up_proj.weight": None},
            "experts.2.up_proj.weight, but has that of 5",
        ),
        ({"model.norm.weight": None}, ": lacks model.norm.weight"),
        (
            {"model.norm.scale": torch.ones(64)},
            "holds model.norm.scale, which the model of config.json has not",
        ),
        (
            {"norm.weight": torch.ones(64)},
            "holds model.norm.weight and norm.weight, one tensor to transformers",
        ),
        ({"model.norm.weight": torch.ones(65)}, r"model.norm.weight is [65], and [64] in the model of"),
        (
            {"model.norm.weight": torch.ones(64).int()},
            "model.norm.weight is of torch.int32, which is no float",
        ),
        (
            {EXPERT: torch.ones(64, 48)},
            f"{EXPERT} is [64, 48] of float32, and [48, 64] of float32 for expert 0",
        ),
        (
            {"model.layers.0.mlp.experts.06.up_proj.weight": torch.ones(48, 64)},
            "no number that an expert has",
        ),
        (
            {f"model.layers.0.mlp.experts.{e}.down_proj.weight": torch.ones(64, 47) for e in range(6)},
            "model.layers.0.mlp.experts.down_proj is [6, 64, 47], and [6, 64, 48] in the model of",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_the_models_is_named(one: Path, changed: dict[str, Any], says: str) -> None:
    rewrite(one, **changed)
    for command in (["inspect"], ["compile", "-o", str(one / "out.pt2")]):
        line = wrong(*command, f"hf:{one}")
        assert line.startswith(f"{one}") and says in line
    assert not (one / "out.pt2").exists()


def test_one_expert_more_or_less_is_no_smaller_model(one: Path) -> None:
    """An expert whose tensors all have another number would stack as well."""
    tensors = load_file(one / "model.safetensors")
    for kind in ("gate", "up", "down"):
        moved = tensors.pop(f"model.layers.0.mlp.experts.3.{kind}_proj.weight")
        tensors[f"model.layers.0.mlp.experts.6.{kind}_proj.weight"] = moved
    save_file(tensors, one / "model.safetensors")
    assert "lacks model.layers.0.mlp.experts.3." in wrong("inspect", f"hf:{one}")


def test_pickled_weights_are_held_to_the_same(one: Path) -> None:
    tensors = load_file(one / "model.safetensors")
    (one / "model.safetensors").unlink()
    torch.save(tensors, one / "pytorch_model.bin")
    assert same(loaded(one), model_of("Qwen3Moe", QWEN3_MOE).state_dict())
    del tensors["model.norm.weight"]
    torch.save(tensors, one / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="lacks model.norm.weight"):
        loaded(one)
    (one / "pytorch_model.bin").write_bytes(b"nothing of the kind")
    with pytest.raises(InputError, match="its weights do not load"):
        loaded(one)


@pytest.fixture
def v3(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A float8 folder, and what its tensors are."""
    model = model_of("DeepseekV3", DEEPSEEK_V3, torch.bfloat16)
    folder = one_file(saved(tmp_path / "v3", model))
    return folder, in_float8(folder)


def stacked(exact: Mapping[str, Tensor], layer: int) -> tuple[Tensor, Tensor]:
    def of(kind: str) -> list[Tensor]:
        return [exact[f"model.layers.{layer}.mlp.experts.{e}.{kind}_proj.weight"] for e in range(4)]

    gate_up = [torch.cat(pair) for pair in zip(of("gate"), of("up"), strict=True)]
    return torch.stack(gate_up), torch.stack(of("down"))


def test_float8_is_undone_exactly(v3: tuple[Path, dict[str, Tensor]]) -> None:
    folder, exact = v3
    model = loaded(folder)
    own = model.state_dict()
    gate_up, down = stacked(exact, layer=1)
    assert own["model.layers.1.mlp.experts.gate_up_proj"].equal(gate_up)
    assert own["model.layers.1.mlp.experts.down_proj"].equal(down)
    plain = {name for name in exact if ".experts." not in name}
    assert all(own[name].equal(exact[name].to(own[name].dtype)) for name in plain)
    assert own["lm_head.weight"].dtype is torch.bfloat16
    with torch.no_grad():
        assert model(IDS).logits.isfinite().all()
    assert not hasattr(model.config, "quantization_config")


def test_layers_that_predict_further_tokens_are_left(v3: tuple[Path, dict[str, Tensor]]) -> None:
    folder, exact = v3
    before = loaded(folder).state_dict()
    further = {
        "model.layers.2.eh_proj.weight": torch.ones(160, 320),
        "model.layers.2.mlp.experts.0.up_proj.weight": torch.ones(136, 160),
    }
    rewrite(folder, **further)
    assert same(loaded(folder), before)
    rewrite(folder, **{"model.layers.3.eh_proj.weight": torch.ones(160, 320)})
    assert "holds model.layers.3.eh_proj.weight" in wrong("inspect", f"hf:{folder}")


Q_A = "model.layers.0.self_attn.q_a_proj.weight"


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({f"{Q_A}_scale_inv": None}, f"{Q_A} is float8, and no {Q_A}_scale_inv says its scales"),
        (
            {f"{Q_A}_scale_inv": torch.ones(1, 1)},
            r"_scale_inv is [1, 1] of torch.float32; blocks of 128 x 128",
        ),
        ({Q_A: torch.ones(24, 160)}, f"holds {Q_A}_scale_inv, which the model of config.json has not"),
        ({f"{Q_A}_scale_inv": torch.ones(1, 2).int()}, "need [1, 2] of floats"),
    ],
    ids=["missing", "shape", "of no float8", "integers"],
)
def test_scales_that_do_not_fit_are_named(
    v3: tuple[Path, dict[str, Tensor]], changed: dict[str, Any], says: str
) -> None:
    assert says in wrong("inspect", f"hf:{rewrite(v3[0], **changed)}")


def test_scales_of_no_blocks_are_refused(v3: tuple[Path, dict[str, Tensor]]) -> None:
    path = v3[0] / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["weight_block_size"] = None
    path.write_text(json.dumps(config))
    assert "weight_block_size of quantization_config is None" in wrong("inspect", f"hf:{v3[0]}")
