"""`dsmoe kernels`: plans as tables and data, the kernels as text, and what they take of a GPU."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from click.testing import Result
from torch import nn

from dsmoe_compiler.cli import stages
from dsmoe_compiler.cli.kernels_model import FusedModel, fused_model
from dsmoe_compiler.cli.stages import Stage
from dsmoe_compiler.codegen.record import launches
from tests.cli.fakes import FakeApi, run, wrong
from tests.cli.on_terminal import on_terminal
from tests.cli.small_model import Kind, Layer, _softmax

command = importlib.import_module("dsmoe_compiler.cli.kernels")  # not the command of that name

TINY = "deepseek-moe-tiny"
SMALL = "tests.cli.small_model:build"
ROOT = Path(__file__).parents[2]


def no_kernels() -> tuple[nn.Module, tuple[torch.Tensor, ...], dict[str, Any]]:
    """A layer that fuses, whose experts' hidden rows are joined: nothing that the kernels do."""
    return Layer(Kind(_softmax, lambda rows: rows.softmax(-1))), (torch.ones(5, 16),), {}


class WithIdentity(nn.Module):
    """Four experts with a matrix, and two that hand back what they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 6, bias=False)
        self.up = nn.Parameter(torch.randn(4, 16, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(x)
        for e in range(6):
            tokens, slots = torch.where(ids == e)
            rows = torch.relu(nn.functional.linear(x[tokens], self.up[e])) if e < 4 else x[tokens]
            out = out.index_add(0, tokens, rows * weights[tokens, slots, None])
        return out


def with_identity() -> tuple[nn.Module, tuple[torch.Tensor, ...], dict[str, Any]]:
    """One layer, two ops."""
    return WithIdentity(), (torch.ones(5, 16),), {}


@pytest.fixture(autouse=True)
def _captured_once(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Most of a command's time is the capture of its model: the same for every test. Nobody's own plans, and
    no stages on stderr, however slow the machine.
    """
    monkeypatch.setattr(stages, "PATIENCE_SECONDS", 600.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "no plans"))
    monkeypatch.setattr(command, "fused_model", _captured)


def _captured(text: str, inputs: Any, dtype: str | None, stage: Stage) -> FusedModel:
    stage("build")
    key = (text, dtype)
    if text not in (TINY, SMALL) or inputs:
        return fused_model(text, inputs, dtype, stage)
    if key not in _CAPTURED:
        _CAPTURED[key] = fused_model(text, inputs, dtype, stage)
    return _CAPTURED[key]


_CAPTURED = dict[tuple[str, str | None], FusedModel]()


@functools.cache
def kernels(*arguments: str) -> Result:
    result = run("kernels", *arguments)
    assert result.exit_code == 0, result.stderr
    return result


def test_layers_that_are_alike_are_shown_once() -> None:
    printed = kernels(TINY, "--arch", "sm_90").stdout
    assert printed.startswith("DeepSeekMoEForCausalLM: 2 of 2 MoE layers fused; kernels for NVIDIA H200\n")
    assert printed.count("model.layers.{1-2}.mlp (2 layers)") == 1
    begun = re.findall(r"^ *(\d+)  (decode|grouped) up .* model$", printed, re.MULTILINE)
    assert [tokens for tokens, _ in begun] == ["1", "8", "64", "512", "4096", "16384"]
    assert {kernels for _, kernels in begun} == {"decode", "grouped"}
    assert "\x1b[" not in printed


def test_layers_of_different_kernels_are_shown_apart() -> None:
    printed = kernels(SMALL, "-T", "4").stdout
    assert "\n0\nE=8 softmax→top-2 | silu FFN D=16, float32\n" in printed
    assert "\n1\nE=8 top-2, router as written | silu FFN D=16, float32\n" in printed
    assert f"why the others are not fused: dsmoe explain {SMALL}\n" in printed
    assert "\n0\n" not in kernels(SMALL, "-T", "4", "--layer", "1").stdout


def test_json_holds_every_decision() -> None:
    found = json.loads(kernels(TINY, "--gpu", "a100", "-T", "5", "-T", "4096", "--json").stdout)
    assert (found["gpu"], found["target"], found["fused"], found["of"]) == ("NVIDIA A100", "sm_80", 2, 2)
    (layer,) = found["kernels"]
    assert layer["layers"] == ["model.layers.1.mlp", "model.layers.2.mlp"]
    assert layer["spec"].startswith("moe(top_k=4,") and layer["why_no_kernels"] is None
    few, many = layer["plans"]
    assert (few["tokens"], few["bucket"], few["kernels"]) == (5, 8, "decode")
    assert set(few["up"]) == {"columns", "depth", "warps", "stages", "split"}
    assert (many["kernels"], many["from"], many["measured_microseconds"]) == ("grouped", "model", None)
    assert many["shared"]["programs"] % 108 == 0 and many["predicted_microseconds"] > 0


def test_a_model_is_cast_before_it_is_planned_for() -> None:
    (layer,) = json.loads(kernels(TINY, "--dtype", "bfloat16", "-T", "4096", "--json").stdout)["kernels"]
    assert layer["dtype"] == "bfloat16" and layer["plans"][0]["up"]["tma"]


def test_a_layer_without_kernels_says_why() -> None:
    printed = kernels("tests.cli.test_kernels:no_kernels").stdout
    assert "no kernels: `softmax` joins the numbers of a row; it runs by the reference\n" in printed
    assert "tiles" not in printed
    says = wrong("kernels", "tests.cli.test_kernels:no_kernels", "--emit", "triton")
    assert says == "there are no kernels for this layer: `softmax` joins the numbers of a row"


def test_experts_without_weights_have_no_kernels() -> None:
    (layer,) = json.loads(kernels("tests.cli.test_kernels:with_identity", "--json").stdout)["kernels"]
    assert "count=4," in layer["spec"]


def test_a_model_without_layers(here: Path) -> None:
    (here / "dense.py").write_text(
        "import torch\ndef build():\n    return torch.nn.Linear(4, 4), (torch.ones(2, 4),), {}\n"
    )
    assert run("kernels", "dense:build").stdout.splitlines() == [
        "Linear: no Mixture-of-Experts layers; the model runs unchanged"
    ]
    assert "no layer of dense:build is fused" in wrong("kernels", "dense:build", "--emit", "ptx")


def test_a_saved_program_has_the_kernels_of_its_model(here: Path) -> None:
    assert run("compile", SMALL, "-o", "m.pt2").exit_code == 0
    saved = kernels("m.pt2", "-T", "64", "--json").stdout
    assert json.loads(saved)["kernels"] == json.loads(kernels(SMALL, "-T", "64", "--json").stdout)["kernels"]
    assert "--dtype has no meaning for a .pt2 file" in wrong("kernels", "m.pt2", "--dtype", "float16")


@pytest.mark.parametrize(
    ("model", "dtype", "tokens"),
    [
        (TINY, "bfloat16", "1"),
        (TINY, "bfloat16", "64"),
        (TINY, "bfloat16", "4096"),
        (TINY, "float32", "4096"),
        (SMALL, "float16", "1"),
        (SMALL, "float16", "4096"),
    ],
)
def test_the_module_is_python_as_one_writes_it(model: str, dtype: str, tokens: str, tmp_path: Path) -> None:
    """Linted, formatted, and imported from its file alone; its host function launches its kernels."""
    file, options = tmp_path / "emitted.py", ("--dtype", dtype, "-T", tokens, "--layer", "0")
    assert kernels(model, *options, "--emit", "triton", "-o", str(file)).stdout == ""
    assert file.read_text() == run("kernels", model, *options, "--emit", "triton").stdout
    for check in (["check"], ["format", "--diff"]):
        command = [sys.executable, "-m", "ruff", *check, "--config", str(ROOT / "pyproject.toml"), str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
    module = _imported(file)
    made = launches(module, lambda: module.layer(**_arguments(model, getattr(torch, dtype), int(tokens))))
    assert made[0].name == "route" and len(made) <= 8
    assert {launch.name for launch in made} <= set(vars(module))


def _imported(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("emitted", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _arguments(model: str, dtype: torch.dtype, tokens: int) -> dict[str, Any]:
    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    if model == SMALL:
        params = [empty(8, 12, 16), empty(8, 16, 12)]
        return {"x": empty(tokens, 16), "router": [empty(8, 16)], "params": params}
    params = [empty(16, 2 * 88, 96), empty(16, 96, 88)]
    shared = [empty(176, 96), empty(176, 96), empty(96, 176)]
    return {"x": empty(tokens, 96), "router": [empty(16, 96)], "params": params, "shared": shared}


def test_one_kernel_with_what_it_calls() -> None:
    whole = kernels(TINY, "--emit", "triton", "-T", "4096").stdout
    part = kernels(TINY, "--emit", "triton", "-T", "4096", "--kernel", "grouped_up").stdout
    functions = re.findall(r"^def (\w+)", part, re.MULTILINE)
    assert functions[-1] == "grouped_up" and "activate" in functions and "route" not in functions
    assert all(block in whole for block in part.split("\n\n\n")[1:])
    compile(part, "part", "exec")


def test_of_several_layers_the_first_is_printed_with_a_word_about_the_others() -> None:
    result = kernels(SMALL, "--emit", "triton", "-T", "4")
    assert "note: this is 0; other kernels, with --layer: 1\n" in result.stderr
    assert "softmax→top-2" in result.stdout
    assert "note:" not in kernels(SMALL, "--emit", "triton", "-T", "4", "--layer", "1").stderr


@pytest.mark.parametrize(
    ("emit", "arch", "says"),
    [
        ("ttir", "sm_90", "tt.func public @decode_up"),
        ("ttgir", "sm_80", "ttg.target = "),
        ("llir", "sm_90", "define ptx_kernel void @decode_up"),
        ("ptx", "sm_80", ".target sm_80"),
        ("sass", "sm_90", "EXIT"),
        ("amdgcn", "gfx942", "s_endpgm"),
    ],
)
def test_what_a_kernel_is_compiled_to(emit: str, arch: str, says: str) -> None:
    printed = kernels(TINY, "-T", "1", "--kernel", "decode_up", "--emit", emit, "--arch", arch).stdout
    assert re.match(rf"(//|;) decode_up: grid \(\d+, \d+, \d+\), num_warps \d.*, {arch}\n", printed)
    assert says in printed and "decode_down" not in printed


def test_what_kernels_take() -> None:
    options = (TINY, "--dtype", "bfloat16", "-T", "4096", "--emit", "resources", "--arch", "sm_90")
    (found,) = json.loads(kernels(*options, "--json").stdout)
    taken = {kernel["kernel"]: kernel for kernel in found["kernels"]}
    assert list(taken)[:4] == ["route", "count", "scatter", "grouped_up"] and list(taken)[-1] == "combine"
    for name in ("grouped_up", "grouped_down"):
        assert taken[name]["wgmma"] and taken[name]["tma_loads"], taken[name]
        assert not taken[name]["spill_stores"] and taken[name]["resident"]
    lines = kernels(*options).stdout.splitlines()
    assert lines[0] == "model.layers.{1-2}.mlp (2 layers), T=4096 on NVIDIA H200 (sm_90)"
    assert lines[1].split()[:4] == ["kernel", "warps", "regs", "spills"] and len(lines) == 2 + len(taken)


def test_what_a_kernel_takes_of_another_vendors_gpu(tmp_path: Path) -> None:
    file = tmp_path / "taken.txt"
    options = ("--dtype", "float16", "--emit", "resources", "--gpu", "MI300X", "--kernel", "grouped_down")
    assert kernels(TINY, *options, "-o", str(file)).stdout == ""
    title, columns, row = file.read_text().splitlines()
    assert title.endswith("T=4096 on AMD Instinct MI300X (gfx942)")
    taken = dict(zip(re.split(r" {2,}", columns), re.split(r" {2,}", row), strict=True))
    assert int(taken["mfma"]) > 0 and "wgmma" not in taken and int(taken["per CU"]) > 0


@pytest.mark.slow
def test_products_of_the_16b_by_four_warps_and_descriptors() -> None:
    options = ("-T", "4096", "--arch", "sm_90", "--dtype", "bfloat16", "--emit", "resources", "--json")
    (found,) = json.loads(kernels("deepseek-moe-16b", *options).stdout)
    assert len(found["layers"]) == 27
    products = [k for k in found["kernels"] if k["kernel"].endswith(("_up", "_down"))]
    assert len(products) == 4
    for kernel in products:
        assert kernel["wgmma"] and kernel["tma_loads"], kernel
        assert not kernel["spill_stores"] and kernel["registers"] <= 200, kernel


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("deepseek-moe-tny",), "unknown model 'deepseek-moe-tny'; the nearest names are: deepseek-moe-tiny"),
        ((TINY, "-T", "0"), "0 is not in the range 1<=x<=16777216"),
        ((TINY, "--arch", "sm90"), "unknown architecture 'sm90'; the nearest names are: sm_90"),
        ((TINY, "--gpu", "H10"), "unknown GPU 'H10'; the nearest names are: H100"),
        ((TINY, "--gpu", ""), "unknown GPU ''"),
        ((TINY, "--gpu", "H100", "--arch", "sm_80"), "--gpu H100 is sm_90, not sm_80"),
        ((TINY, "--dtype", "float8"), "'float8' is not one of 'bfloat16', 'float16', 'float32'"),
        ((TINY, "--layer", "layers.1.mpl"), "unknown layer 'layers.1.mpl'; the nearest names are:"),
        ((TINY, "--layer", "2"), "there is no layer 2: the 2 layers are counted from 0"),
        ((SMALL, "--layer", "2"), f"`dsmoe explain {SMALL} --layer 2` says why"),
        ((TINY, "--emit", "triton", "--kernel", "grouped_upp"), "the nearest names are: grouped_up"),
        ((TINY, "--emit", "sass", "--kernel", "grouped_upp"), "the nearest names are: grouped_up"),
        ((TINY, "--emit", "ptx", "--arch", "gfx942"), "there is no ptx for gfx942"),
        ((TINY, "--emit", "amdgcn"), "there is no amdgcn for sm_90"),
        ((TINY, "--emit", "triton", "-o", "no/such/folder.py"), "cannot write no/such/folder.py"),
        ((TINY, "--emit", "triton", "--json"), "--emit triton prints text: leave out --json."),
        ((TINY, "--emit", "sass", "-T", "1", "-T", "8"), "--emit sass prints one module: give one -T."),
        ((TINY, "--kernel", "route"), "--kernel needs --emit."),
        ((TINY, "-o", "x.py"), "-o needs --emit."),
        ((SMALL.replace("build", "KINDS"),), "name a module, a function or a factory"),
        ((), "Missing argument 'MODEL'."),
    ],
)
def test_wrong_input_is_one_line(arguments: tuple[str, ...], says: str) -> None:
    assert says in wrong("kernels", *arguments)


def test_a_function_has_no_weights_to_cast(api: FakeApi, here: Path) -> None:
    (here / "mine.py").write_text("def forward(x):\n    return x\n")
    line = wrong("kernels", "mine:forward", "--input", "x=2", "--dtype", "float16")
    assert "--dtype casts a module's weights, and mine:forward is a function" in line


def test_without_triton_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "pip install 'dsmoe-compiler[triton]'" in wrong("kernels", TINY)


def test_tables_keep_to_a_narrow_terminal() -> None:
    shown = on_terminal(80, "kernels", TINY, "--dtype", "bfloat16")
    assert "\x1b[1;36mmodel.layers.{1-2}.mlp (2 layers)" in shown.coloured
    assert max(map(len, shown.plain.splitlines())) <= 80


def test_a_module_is_coloured_on_a_terminal_and_its_lines_stay_whole() -> None:
    shown = on_terminal(80, "kernels", TINY, "--emit", "triton", "-T", "1")
    assert re.search(r"\x1b\[[\d;]+mdef\x1b", shown.coloured)
    assert shown.plain == kernels(TINY, "--emit", "triton", "-T", "1").stdout
