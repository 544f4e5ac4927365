"""The CPU benchmark: its floor, its goals, what it leaves out, and one run from end to end."""

import importlib.util
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from torch import Tensor

pytest.importorskip("transformers")

from benchmarks import cpu, cpu_case, cpu_onnx, cpu_report
from benchmarks.cpu_case import Case, Figure, Subject, measure
from benchmarks.cpu_floor import Rates, layer_floor, probes, routed_floor
from benchmarks.cpu_shapes import SHAPES, TINY, Shape, as_transformers, build, route
from benchmarks.cpu_ways import OURS, ROUTED, Input, Way, ours, transformers_ways

FIRST = SHAPES["D1024"]
HAS_ONNXRUNTIME = importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx")


def _case(shape: Shape, dtype: str, tokens: int, lead: float, over_floor: float = 1.0) -> Case:
    """Ours took a millisecond, the best other `lead`."""
    figures = {
        OURS: Figure(1.0, over_floor, 1.0, 0.0, 2),
        ROUTED: Figure(1.0, over_floor, 1.0, 0.0, 2),
        "grouped_mm": Figure(lead, over_floor * lead, lead, 0.0, 2),
    }
    rates = Rates(1.0, "matvec", 1.0, "mm")
    left_out = {"batched_mm": "9 times the fastest"}
    return Case(shape.name, dtype, tokens, 6.0, rates, 1.0, 1.0, figures, "grouped_mm", left_out, 5, 5)


def test_floor_is_the_longer_of_reading_and_multiplying() -> None:
    shape = Shape(width=4, hidden=2, experts=8, top_k=2, shared=1)  # 24 numbers an expert, 32 in the router
    slow_memory, slow_products = Rates(2.0, "", 1e9, ""), Rates(1e9, "", 2.0, "")
    assert routed_floor(shape, torch.bfloat16, 3, 5.0, slow_memory) == 5 * 24 * 2 / 2
    assert routed_floor(shape, torch.float32, 3, 5.0, slow_memory) == 5 * 24 * 4 / 2
    assert routed_floor(shape, torch.bfloat16, 3, 5.0, slow_products) == 2 * 3 * 2 * 24 / 2
    assert layer_floor(shape, torch.bfloat16, 3, 5.0, slow_memory) == ((5 + 1) * 24 + 32) * 2 / 2
    assert layer_floor(shape, torch.bfloat16, 3, 5.0, slow_products) == 2 * 3 * ((2 + 1) * 24 + 32) / 2


def test_a_copy_of_a_layer_lies_elsewhere_and_answers_the_same() -> None:
    for shape in TINY.values():
        first, second = build(shape, torch.float32)[:2]
        x_BTD = torch.randn(1, 5, shape.width)
        assert torch.equal(first(x_BTD), second(x_BTD))
        assert first.get_parameter("gate.weight").data_ptr() != second.get_parameter("gate.weight").data_ptr()


def test_transformers_experts_are_the_layers_own_tensors() -> None:
    for shape in TINY.values():
        layer = build(shape, torch.float32)[0]
        for how in ("eager", "batched_mm", "grouped_mm"):
            twin = as_transformers(layer, shape, how)
            theirs = {parameter.data_ptr() for parameter in twin.parameters()}
            assert theirs == {parameter.data_ptr() for parameter in layer.parameters()}
            x_BTD = torch.randn(1, 5, shape.width)
            torch.testing.assert_close(twin(x_BTD), layer(x_BTD), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not HAS_ONNXRUNTIME, reason="onnxruntime is optional")
@pytest.mark.parametrize("form", [cpu_onnx.contrib_moe, cpu_onnx.split_form])
def test_onnxruntime_answers_as_the_layer(form: Callable[..., Callable[[Tensor], Tensor]]) -> None:
    for shape in TINY.values():
        layer = build(shape, torch.float32)[0]
        run = form(layer, shape, threads=1)
        for tokens in (1, 3, 40):  # experts without tokens, too
            x_BTD = torch.randn(1, tokens, shape.width)
            torch.testing.assert_close(run(x_BTD), layer(x_BTD)[0], rtol=1e-4, atol=1e-5)


def _subject(others: Sequence[Way], experts_off: float = 0.0) -> Subject:
    shape, dtype = TINY["D64"], torch.float32
    layers = build(shape, dtype)[:2]
    whole, routed = ours(layers, shape)
    broken = Way(ROUTED, [lambda i: routed.runs[0](i) + experts_off])
    eager = transformers_ways(layers, shape)[0]
    return Subject(shape, dtype, layers, [whole, broken, eager, *others], probes(layers, dtype), {"x": "y"})


@torch.inference_mode()
def test_what_is_wrong_or_fails_is_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_case, "_ROUNDS", 3)

    def fails(i: Input) -> Tensor:
        raise RuntimeError("no such kernel\nand more")

    wrong = Way("wrong", [lambda i: torch.ones_like(i.x)])
    case = measure(_subject([wrong, Way("failing", [fails])]), tokens=3, seconds=0.0)
    assert set(case.figures) == {OURS, ROUTED, "eager"} and case.best == "eager"
    assert case.left_out["failing"] == "RuntimeError: no such kernel" and case.left_out["x"] == "y"
    assert "from eager" in case.left_out["wrong"]
    assert case.touched <= 9 and case.rounds + case.discarded == 3
    assert case.layer_floor > case.routed_floor > 0


@torch.inference_mode()
def test_a_way_that_would_gather_too_much_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(i: Input) -> Tensor:
        raise AssertionError("it was tried")

    shape = TINY["D64"]
    monkeypatch.setattr(cpu_case, "_GATHERED", 3 * shape.top_k * shape.expert_numbers * 4 - 1)
    case = measure(_subject([Way("gathering", [never], gathers=True)]), tokens=3, seconds=0.0)
    assert case.left_out["gathering"].startswith("would gather")


@torch.inference_mode()
def test_a_wrong_answer_of_ours_ends_the_run() -> None:
    with pytest.raises(RuntimeError, match=r"T=3: ours, routed experts is off by"):
        measure(_subject([], experts_off=1.0), tokens=3, seconds=0.0)


def test_never_slower_than_the_best_is_asked_of_every_case() -> None:
    (target,) = cpu_report.targets([_case(SHAPES["D2048"], "float32", 4, lead=0.98)])
    assert target.met and target.value == pytest.approx(1 / 0.98)
    (target,) = cpu_report.targets([_case(SHAPES["D2048"], "float32", 4, lead=0.95)])
    assert not target.met


@pytest.mark.parametrize(
    ("dtype", "tokens", "lead"),
    [("bfloat16", 1, 2), ("bfloat16", 128, 2), ("bfloat16", 1024, 1.8)]
    + [("float32", 16, 1.15), ("float32", 128, 1.8), ("float32", 1024, 1.25)],
)
def test_the_lead_is_asked_where_it_is_promised(dtype: str, tokens: int, lead: float) -> None:
    for factor, met in ((1.01, True), (0.99, False)):
        found = cpu_report.targets([_case(FIRST, dtype, tokens, lead * factor)])
        assert [t.met for t in found if "times faster" in t.what] == [met]
    assert not [t for t in cpu_report.targets([_case(FIRST, dtype, 64, lead)]) if "times faster" in t.what]


@pytest.mark.parametrize(
    ("tokens", "routed", "whole"), [(1, 1.15, 1.3), (16, 1.15, 1.3), (128, 1.35, 1.3), (512, 1.35, 1.5)]
)
def test_the_floor_is_asked_where_there_is_amx(
    tokens: int, routed: float, whole: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = _case(FIRST, "bfloat16", tokens, lead=3.0)
    monkeypatch.setattr(cpu_report, "machine", lambda: {"processor": "Xeon avx2 amx_bf16"})
    limits = [t.limit for t in cpu_report.targets([case]) if "times the floor" in t.what]
    assert limits == [routed, whole]
    monkeypatch.setattr(cpu_report, "machine", lambda: {"processor": "Xeon avx2"})
    assert not [t for t in cpu_report.targets([case]) if "times the floor" in t.what]


def test_table_and_drawing_show_what_was_found() -> None:
    cases = [_case(FIRST, "bfloat16", tokens, lead=2.5, over_floor=1.2) for tokens in (1, 16)]
    cases[1] = replace(cases[1], left_out={"batched_mm": "would gather 3 GB of weights"})
    text = io.StringIO()
    cpu_report.print_cases(Console(file=text, width=120), cases)
    shown = text.getvalue()
    assert "*2.50 3.00×" in shown and "1.00 1.20×" in shown and "5 of 10" in shown
    batched = "9 times the fastest (T=1); would gather 3 GB of weights (T=16)"
    assert f"- batched_mm: {batched}" in shown
    drawn = cpu_report.drawing(cases)
    assert drawn.startswith("<svg") and "grouped_mm" in drawn and FIRST.name in drawn


def test_router_of_either_layer_gives_ids_and_weights() -> None:
    for shape in TINY.values():
        layer = build(shape, torch.bfloat16)[0]
        ids_TK, weights_TK = route(layer, torch.randn(4, shape.width).bfloat16())
        assert ids_TK.shape == weights_TK.shape == (4, shape.top_k) and ids_TK.dtype == torch.int64


@pytest.mark.parametrize("options", [["--shapes", "S1"], ["--tokens", "3"], ["--dtypes", "bf16,int8"]])
def test_an_unknown_choice_is_named(options: list[str]) -> None:
    done = CliRunner().invoke(cpu.main, options)
    assert done.exit_code == 2 and f"{options[0]}: no {options[1].split(',')[-1]}; there are" in done.output


@pytest.mark.slow
def test_a_tiny_run_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cpu.json"
    monkeypatch.setattr(cpu_case, "_ROUNDS", 3)
    done = CliRunner().invoke(
        cpu.main, ["--tiny", "--dtypes", "fp32", "--tokens", "4", "--json", str(path)], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    found = json.loads(path.read_text())
    assert [case["shape"] for case in found["cases"]] == [shape.name for shape in TINY.values()]
    for case in found["cases"]:
        known = {*case["figures"], *case["left_out"]}
        assert {OURS, ROUTED, "eager", "eager + torch.compile", "grouped_mm + torch.compile"} <= known
        assert {"onnxruntime MoE", "onnxruntime Split form"} <= known
        assert case["best"] in case["figures"]
    assert path.with_suffix(".svg").read_text().startswith("<svg")
