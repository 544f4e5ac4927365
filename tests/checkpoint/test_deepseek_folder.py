"""DeepSeek-MoE-16B's folder: the zoo's model, bit for bit what stacking its tensors by hand gives."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import dsmoe_compiler as dsmoe
from dsmoe_compiler.checkpoint.errors import CheckpointError
from dsmoe_compiler.checkpoint.reader import Reader
from dsmoe_compiler.cli import deepseek_folder, memory
from dsmoe_compiler.cli.deepseek_folder import load_deepseek_moe
from dsmoe_compiler.cli.hf_folder import hf_call
from dsmoe_compiler.ir.errors import InputError
from dsmoe_compiler.models.checkpoint_names import checkpoint_tensors
from tests.checkpoint.deepseek_files import TINY, plainly_loaded, random_tensors, shapes, write
from tests.cli.fakes import run, wrong

IDS = torch.arange(22).view(2, 11)
EXPERT = "model.layers.1.mlp.experts.4.up_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "moe", TINY, shard_bytes=20_000)


def rewrite(folder: Path, **fields: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(TINY | fields))
    return folder


def test_the_model_is_the_one_stacked_by_hand(folder: Path) -> None:
    assert len(list(folder.glob("*.safetensors"))) > 3
    model, plain = load_deepseek_moe(folder), plainly_loaded(folder)
    ours, theirs = model.state_dict(), plain.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype is torch.bfloat16 and ours[name].equal(tensor), name
    assert not model.training
    with torch.no_grad():
        assert model(IDS).equal(plain(IDS))


@pytest.mark.parametrize(
    "changed",
    [{"norm_topk_prob": True}, {"num_key_value_heads": 2}, {"moe_layer_freq": 2, "first_k_dense_replace": 0}],
    ids=str,
)
def test_what_config_json_says_is_honoured(tmp_path: Path, changed: dict[str, Any]) -> None:
    if "moe_layer_freq" in changed:  # layers 0 and 2 are mixtures, layer 1 is dense
        config = load_config(tmp_path, **changed)
        assert [config.is_moe(layer) for layer in range(3)] == [True, False, True]
        return
    model = load_deepseek_moe(write(tmp_path / "moe", TINY | changed))
    plain = plainly_loaded(tmp_path / "moe")
    with torch.no_grad():
        assert model(IDS).equal(plain(IDS))
        write(tmp_path / "moe", TINY)
        assert not model(IDS).equal(load_deepseek_moe(tmp_path / "moe")(IDS))


def load_config(folder: Path, **fields: Any) -> Any:
    model: Any = hf_call(rewrite(folder, **fields), with_weights=False).model
    return model.config


def test_every_byte_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readers = list[Reader]()

    def counted() -> Reader:
        readers.append(Reader())
        return readers[-1]

    monkeypatch.setattr(deepseek_folder, "Reader", counted)
    load_deepseek_moe(folder)
    (reader,) = readers
    assert reader.bytes_read == sum(t.nbytes for _, t in random_tensors(TINY, torch.bfloat16))


def test_the_names_are_those_of_the_release(folder: Path) -> None:
    found = checkpoint_tensors(load_deepseek_moe(folder))
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == dict(shapes(TINY))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_are_cast_as_torch_casts(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = write(tmp_path / "moe", TINY, dtype=dtype)
    ours, theirs = load_deepseek_moe(folder).state_dict(), plainly_loaded(folder).state_dict()
    assert all(ours[name].dtype is torch.bfloat16 and ours[name].equal(theirs[name]) for name in theirs)


def test_without_a_dtype_in_config_json_it_is_the_weights(tmp_path: Path) -> None:
    folder = rewrite(write(tmp_path / "moe", TINY, dtype=torch.float16), torch_dtype=None)
    assert {tensor.dtype for tensor in load_deepseek_moe(folder).parameters()} == {torch.float16}


def test_inspect_reads_headers_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reader, "fill", None)
    model = hf_call(folder, with_weights=False).model
    assert isinstance(model, torch.nn.Module) and all(p.is_meta for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_compiled_it_gives_the_models_logits(tmp_path: Path) -> None:
    folder, output = write(tmp_path / "moe", TINY | {"num_hidden_layers": 2}), tmp_path / "out.pt2"
    result = run("compile", f"hf:{folder}", "-o", str(output), "--require-fused")
    assert result.exit_code == 0, result.output
    assert "1 of 1 MoE layers fused" in result.stdout
    program, plain = dsmoe.load(output), plainly_loaded(folder)
    with torch.no_grad():
        torch.testing.assert_close(program(IDS).float(), plain(IDS).float(), atol=0.05, rtol=0.05)


def test_without_weights_they_are_random_and_a_note_says_so(tmp_path: Path) -> None:
    rewrite(tmp_path)
    call = hf_call(tmp_path, with_weights=True)
    assert call.notes == (f"{tmp_path} has no weights: they are random",)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickled")
    with pytest.raises(InputError, match=r"its weights are \.bin files; save them as safetensors"):
        hf_call(tmp_path, with_weights=True)
    with pytest.raises(InputError, match="has no weights"):
        load_deepseek_moe(tmp_path)


def test_what_does_not_fit_in_memory_is_not_begun(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    line = wrong("compile", f"hf:{folder}", "-o", str(folder / "out.pt2"))
    weights = sum(tensor.nbytes for _, tensor in random_tensors(TINY, torch.bfloat16))
    assert line.startswith(f"hf:{folder} needs {memory.readable(weights)}, 1 kB available")


def test_a_field_nobody_knows_is_told(folder: Path) -> None:
    call = hf_call(rewrite(folder, sparsity="some"), with_weights=False)
    assert call.notes == (f"{folder / 'config.json'}: nothing is known of sparsity",)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"rope_scaling": {"type": "yarn"}}, r"rope_scaling is {'type': 'yarn'}; this model has None only"),
        ({"attention_bias": True}, "attention_bias is True; this model has False only"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; this model has 'silu' only"),
        ({"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'"),
        ({"architectures": ["DeepseekForSequenceClassification"]}, "architectures is"),
        ({"norm_topk_prob": 1}, "norm_topk_prob is 1, which is neither true nor false"),
        ({"hidden_size": "32"}, "hidden_size is '32', which is no integer"),
        ({"n_shared_experts": None}, "n_shared_experts is None, which is no integer"),
        ({"vocab_size": True}, "vocab_size is True, which is no integer"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, which is no number"),
        ({"num_attention_heads": 5}, "num_attention_heads=5 must divide hidden_size=32"),
        ({"torch_dtype": "int8"}, "dtype is 'int8', which is none of float32, float16, bfloat16"),
        ({"quantization_config": {"quant_method": "gptq"}}, "only fp8 is undone"),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": None}},
            "weight_block_size of quantization_config is None",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_the_model_does_not_do_is_refused(folder: Path, changed: dict[str, Any], says: str) -> None:
    line = wrong("inspect", f"hf:{rewrite(folder, **changed)}")
    assert line.startswith(f"{folder / 'config.json'}: ") and says in line


def test_a_missing_size_is_named(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "deepseek"}))
    assert wrong("inspect", f"hf:{folder}") == f"{folder / 'config.json'}: lacks hidden_size"
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(InputError, match="model_type is 'llama', not 'deepseek'"):
        load_deepseek_moe(folder)


@pytest.fixture
def one_file(tmp_path: Path) -> Path:
    return write(tmp_path / "moe", TINY)


def test_a_missing_tensor_is_named(one_file: Path) -> None:
    tensors = load_file(one_file / "model.safetensors")
    del tensors[EXPERT]
    save_file(tensors, one_file / "model.safetensors")
    assert wrong("inspect", f"hf:{one_file}") == f"{one_file}: lacks {EXPERT}"
    save_file(tensors | {"renamed": torch.zeros(20, 32)}, one_file / "model.safetensors")
    line = wrong("inspect", f"hf:{one_file}")
    assert line.startswith(f"{one_file}: lacks {EXPERT}, and holds renamed, which the model")


def test_a_surplus_tensor_is_named(one_file: Path) -> None:
    file = one_file / "model.safetensors"
    save_file(load_file(file) | {"model.layers.1.mlp.experts.6.up_proj.weight": torch.zeros(20, 32)}, file)
    line = wrong("inspect", f"hf:{one_file}")
    assert line.startswith(f"{file}: holds model.layers.1.mlp.experts.6.up_proj.weight, which")


def test_tables_of_old_releases_are_no_surplus(one_file: Path) -> None:
    file = one_file / "model.safetensors"
    tables = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.zeros(4) for i in range(3)}
    save_file(load_file(file) | tables, file)
    load_deepseek_moe(one_file)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (torch.zeros(32, 20), r"up_proj.weight is \[32, 20\], and \[20, 32\] in the model"),
        (torch.zeros(20, 32, dtype=torch.int16), "is of torch.int16, which is no float"),
    ],
)
def test_a_tensor_of_another_kind_is_named(one_file: Path, other: torch.Tensor, says: str) -> None:
    file = one_file / "model.safetensors"
    save_file(load_file(file) | {EXPERT: other}, file)
    with pytest.raises(CheckpointError, match=says):
        load_deepseek_moe(one_file)
