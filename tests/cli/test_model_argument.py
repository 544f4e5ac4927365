"""What MODEL may name, and what is said when it names nothing."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsmoe_compiler.cli import memory
from dsmoe_compiler.cli.input_option import ExampleInput
from dsmoe_compiler.cli.model_argument import ModelCall, resolve
from tests.cli.fakes import FakeApi, run, wrong

MINE = """
import torch
from torch import nn

class Scale(nn.Module):
    def __init__(self, factor=2.0):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))
    def forward(self, x, ids=None):
        return self.factor * x

class NeedsWidth(nn.Module):
    def __init__(self, width):
        super().__init__()

def build():
    return Scale(3.0)

def build_with_example():
    return Scale(3.0), (torch.ones(4),), {"ids": None}

def double(x, *, ids):
    return 2 * x

def broken():
    raise RuntimeError("no weights today")

def wrong_kind():
    return 5

instance = Scale(4.0)
number = 7
"""


@pytest.fixture
def mine(here: Path) -> Path:
    (here / "mine.py").write_text(MINE)
    (here / "unfinished.py").write_text("def build(:\n")
    (here / "failing.py").write_text("import a_package_nobody_has\n")
    return here


def call(text: str, *inputs: ExampleInput) -> ModelCall:
    return resolve(text, inputs, with_weights=False)


X = ExampleInput("x", (2, 16), "float32")
IDS = ExampleInput("ids", (2, 16), "int64")


@pytest.mark.parametrize(
    ("text", "factor"), [("mine:build", 3.0), ("mine:Scale", 2.0), ("mine:instance", 4.0)]
)
def test_a_factory_a_class_and_a_module(mine: Path, text: str, factor: float) -> None:
    found = call(text, X)
    assert isinstance(found.model, nn.Module)
    assert found.model.get_parameter("factor").item() == factor
    assert found.args == ()
    assert found.kwargs["x"].shape == (2, 16)  # type: ignore[attr-defined]


def test_a_factory_may_bring_its_example(mine: Path) -> None:
    found = call("mine:build_with_example")
    (x,) = found.args
    assert isinstance(x, Tensor)
    assert x.equal(torch.ones(4))
    assert found.kwargs == {"ids": None}
    assert call("mine:build_with_example", IDS).kwargs["ids"].dtype == torch.int64  # type: ignore[attr-defined]


def test_a_function_is_the_model_itself(mine: Path) -> None:
    found = call("mine:double", X, IDS)
    assert found.model is sys.modules["mine"].double
    assert list(found.kwargs) == ["x", "ids"]


def test_a_built_in_has_no_signature_to_check() -> None:
    assert call("torch:relu", ExampleInput("input", (3,), "float32")).model is torch.relu


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("deepseek-moe-16", "unknown model 'deepseek-moe-16'; the nearest names are: deepseek-moe-16b"),
        ("nowhere:build", "no module 'nowhere'"),
        ("nowhere.at.all:build", "no module 'nowhere'"),
        ("mine.deeper:build", "no module 'mine.deeper'"),
        ("mine:biuld", "mine has no 'biuld'; the nearest names are: build"),
        ("mine:", "mine: is no model: say package.module:callable"),
        ("mine:Scale.nothing", "mine has no 'Scale.nothing'"),
        (":build", ":build is no model: say package.module:callable"),
        ("mine:number", "mine:number is a int; name a module, a function or a factory"),
        ("mine:NeedsWidth", "mine:NeedsWidth is a class that needs arguments"),
        ("mine:broken", "calling mine:broken failed: RuntimeError: no weights today"),
        ("mine:wrong_kind", "mine:wrong_kind returned a int; return a module or (model, args, kwargs)"),
        ("unfinished:build", "importing unfinished failed: SyntaxError"),
        (
            "failing:build",
            "importing failing failed: ModuleNotFoundError: No module named 'a_package_nobody_has'",
        ),
        ("mine:double", "the example inputs do not fit mine:double: missing a required argument: 'x'"),
        ("mine:build", "it takes (x, ids=None): say --input NAME=2x16:int64"),
        ("hf:nowhere", "no config.json in nowhere"),
        ("nothing.pt2", "nothing.pt2"),
        ("mine.pt2", "mine.pt2"),
        ("other.pt2", "other.pt2"),
    ],
)
def test_what_is_not_there_is_said_in_a_line(mine: Path, api: FakeApi, text: str, says: str) -> None:
    (mine / "mine.pt2").write_text("not a program")
    torch.save({"a": 1}, mine / "other.pt2")
    assert says in wrong("inspect", text)
    assert api.calls == []


def test_the_line_of_the_users_own_mistake_is_named(mine: Path, api: FakeApi) -> None:
    line = MINE.splitlines().index('    raise RuntimeError("no weights today")') + 1
    assert f"mine.py:{line})" in wrong("inspect", "mine:broken")


def test_an_input_the_model_does_not_take(api: FakeApi) -> None:
    line = wrong("inspect", "deepseek-moe-tiny", "--input", "inputs=2x16:int64")
    assert "do not fit deepseek-moe-tiny: got an unexpected keyword argument 'inputs'" in line
    assert "(input_ids: " in line


def test_an_input_stands_instead_of_the_example(api: FakeApi) -> None:
    assert run("inspect", "deepseek-moe-tiny", "--input", "input_ids=1x5:int64").exit_code == 0
    ((_, _, kwargs),) = api.calls
    assert list(kwargs) == ["input_ids"]
    assert kwargs["input_ids"].shape == (1, 5)
    assert kwargs["input_ids"].is_meta


def test_an_input_has_the_dtype_of_the_example_that_it_stands_for() -> None:
    (ids,) = call("deepseek-moe-tiny", ExampleInput("input_ids", (2, 3), None)).kwargs.values()
    assert isinstance(ids, Tensor) and (ids.dtype, ids.shape) == (torch.int64, (2, 3))
    said = call("deepseek-moe-tiny", ExampleInput("input_ids", (2, 3), "int32")).kwargs["input_ids"]
    assert isinstance(said, Tensor) and said.dtype == torch.int32


def test_an_input_that_stands_for_none_is_float32(mine: Path) -> None:
    (x,) = call("mine:build", ExampleInput("x", (2, 3), None)).kwargs.values()
    assert isinstance(x, Tensor) and x.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int64", "int32", "bool"])
def test_made_up_inputs_are_valid_and_the_same_every_time(dtype: str) -> None:
    example = ExampleInput("x", (0, 3, 5), dtype)
    assert example.tensor("cpu").shape == (0, 3, 5)
    example = ExampleInput("x", (4, 5), dtype)
    made = example.tensor("cpu")
    assert made.dtype == getattr(torch, dtype)
    assert made.equal(example.tensor("cpu"))
    assert made.is_floating_point() or (made >= 0).all() and (made <= 1).all()
    assert example.tensor("meta").is_meta


MIXTRAL = dict(
    architectures=["MixtralForCausalLM"],
    model_type="mixtral",
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=8,
    num_experts_per_tok=3,
    max_position_embeddings=64,
    tie_word_embeddings=False,
)


@pytest.fixture
def folder(here: Path) -> Path:
    pytest.importorskip("transformers")
    (here / "mixtral").mkdir()
    (here / "mixtral" / "config.json").write_text(json.dumps(MIXTRAL))
    return here / "mixtral"


def test_a_transformers_folder_without_weights(folder: Path) -> None:
    outline = resolve(f"hf:{folder}", (), with_weights=False)
    model = resolve(f"hf:{folder}", (), with_weights=True)
    assert isinstance(outline.model, nn.Module) and isinstance(model.model, nn.Module)
    assert all(p.is_meta for p in outline.model.parameters())
    assert not any(p.is_meta for p in model.model.parameters())
    assert not model.model.training
    assert model.notes == (f"{folder} has no weights: they are random",)
    assert outline.notes == ()


def test_a_transformers_folders_example_equals_no_dimension(folder: Path) -> None:
    ids = resolve(f"hf:{folder}", (), with_weights=False).kwargs["input_ids"]
    assert isinstance(ids, Tensor)
    batch, length = ids.shape
    assert {batch, length, batch * length}.isdisjoint({96, 64, 4, 2, 8, 3, 16, 1})
    assert (batch, length) != (3, 11), "the model chooses 3 experts a token"


def test_a_transformers_folder_with_weights(folder: Path) -> None:
    first = resolve(f"hf:{folder}", (), with_weights=True).model
    first.save_pretrained(folder)  # type: ignore[attr-defined]
    again = resolve(f"hf:{folder}", (), with_weights=True)
    assert again.notes == ()
    assert isinstance(first, nn.Module) and isinstance(again.model, nn.Module)
    for name, value in first.state_dict().items():
        assert value.equal(again.model.state_dict()[name]), name


def test_a_transformers_folder_runs_as_its_example_says(folder: Path) -> None:
    found = resolve(f"hf:{folder}", (), with_weights=True)
    with torch.no_grad():
        logits = found.model(*found.args, **found.kwargs).logits  # type: ignore[attr-defined]
    assert logits.shape[:2] == found.kwargs["input_ids"].shape  # type: ignore[attr-defined]


SMALL = {"vocab_size": 96, "num_layers": 1, "num_heads": 2, "num_attention_heads": 2, "num_hidden_layers": 1}
T5 = {"model_type": "t5", "d_model": 32, "d_kv": 16, "d_ff": 64, **SMALL}
BERT = {"model_type": "bert", "hidden_size": 32, "intermediate_size": 64, **SMALL}
FUNNEL = {"model_type": "funnel", "vocab_size": 96, "d_model": 32, "n_head": 2, "d_head": 16, "d_inner": 64}
VIT = {**BERT, "model_type": "vit", "image_size": 32, "patch_size": 8}


@pytest.mark.parametrize(
    ("config", "kind", "inputs"),
    [
        (T5, "T5ForConditionalGeneration", {"input_ids", "decoder_input_ids", "attention_mask"}),
        (BERT | {"architectures": ["BertForMaskedLM"]}, "BertForMaskedLM", {"input_ids"}),
        (BERT, "BertLMHeadModel", {"input_ids"}),
        (FUNNEL, "FunnelModel", {"input_ids"}),
        (VIT, "ViTModel", set()),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_transformers_folder_of_another_kind(
    here: Path, config: dict[str, Any], kind: str, inputs: set[str]
) -> None:
    pytest.importorskip("transformers")
    (here / "config.json").write_text(json.dumps(config))
    found = resolve(f"hf:{here}", (), with_weights=True)
    assert type(found.model).__name__ == kind and inputs <= found.kwargs.keys()
    assert bool(inputs) == bool(found.kwargs)
    if inputs:
        assert isinstance(found.model, nn.Module)
        found.model(**found.kwargs)


def test_a_transformers_folder_that_is_damaged(folder: Path, api: FakeApi) -> None:
    (folder / "model.safetensors").write_bytes(b"nothing of the kind")
    assert "mixtral/model.safetensors: a header of" in wrong("compile", "hf:mixtral", "-o", "m.pt2")
    (folder / "config.json").write_text("{")
    assert "mixtral/config.json: is not JSON" in wrong("inspect", "hf:mixtral")
    (folder / "config.json").write_text('{"model_type": "unheard_of"}')
    assert "transformers does not understand its config.json" in wrong("inspect", "hf:mixtral")


def test_a_folder_is_not_a_zoo_name(folder: Path, api: FakeApi) -> None:
    assert "for the folder of that name say hf:mixtral" in wrong("inspect", "mixtral")


def test_a_transformers_folder_that_does_not_fit(
    folder: Path, api: FakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    line = wrong("compile", "hf:mixtral", "-o", "m.pt2")
    assert "hf:mixtral needs 691" in line and " kB, 1 kB available" in line


def test_without_transformers_the_extra_is_named(
    folder: Path, api: FakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert (
        wrong("inspect", "hf:mixtral") == "hf: needs transformers: pip install 'dsmoe-compiler[transformers]'"
    )
