"""What `str(report)` shows: every layer on a line of its own, refusals with their reason, 80 columns."""

from dataclasses import replace

from dsmoe_compiler.ir.errors import Refusal
from dsmoe_compiler.ir.spec import MoESpec
from dsmoe_compiler.report.report import LayerReport, Report
from dsmoe_compiler.report.text import WIDTH, render


def layer_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(("model.layers.", "layers."))]


def test_a_big_model_has_a_line_a_layer_with_its_whole_spec(big: Report) -> None:
    lines = layer_lines(render(big))
    assert len(lines) == 61
    assert lines[0].split() == [
        *("model.layers.1.mlp", "128", "softmax→top-12"),
        *("SwiGLU", "[gate;up]", "D=4096", "F=1408", "5632"),
    ]
    assert len({line.index("softmax") for line in lines}) == 1, "columns are aligned"
    assert max(map(len, render(big).splitlines())) <= WIDTH


def test_what_all_layers_share_is_said_once(big: Report) -> None:
    text = render(big)
    assert text.count("experts.py:60") == 1
    assert "every layer: idiom gather; source experts.py:60" in text


def test_the_headline_counts(big: Report, mixed: Report) -> None:
    assert render(big).startswith("DeepSeekMoEForCausalLM: 61 of 61 MoE layers fused; export\n"), (
        "an inspection has no backend"
    )
    assert render(mixed).startswith("Mixed: 3 of 4 MoE layers fused; export, backend cpu\n")


def test_what_a_cpu_runs_the_layers_by(big: Report, mixed: Report) -> None:
    headline = " ".join(
        line.strip()
        for line in render(replace(mixed, kernels="native kernels, amx")).split("\n\n")[0].splitlines()
    )
    assert headline.endswith("backend cpu (native kernels, amx)")
    text = render(replace(big, kernels="native kernels, amx"))
    assert "\non a CPU: native kernels, amx\n" in text and "backend" not in text
    refused = tuple(replace(layer, fused=False) for layer in big.layers)
    assert "on a CPU" not in render(replace(big, layers=refused, kernels="native kernels, amx"))


def test_a_refusal_stands_below_its_layer(mixed: Report) -> None:
    lines = render(mixed).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("layers.2.mlp"))
    assert lines[at + 1].startswith("    R404 the ids within one token")
    below = " ".join(line.strip() for line in lines[at + 1 : at + 4])
    assert below.endswith("may lose a weight at %scatter_3, my_model.py:123")
    assert lines[at + 4].startswith("layers.3.mlp")


def test_what_differs_between_layers_has_a_column(mixed: Report) -> None:
    title, *layers = (line for line in render(mixed).splitlines() if "layer" in line.split(".")[0])
    lines = layer_lines(render(mixed))
    assert [line.split()[-1] for line in lines[:4]] == ["a.py:1", "a.py:1", "b.py:2", "a.py:1"]
    assert "top-2, as written" in lines[3]


def test_specs_too_wide_for_a_cell_are_whole_in_the_legend(deepseek_v3: MoESpec) -> None:
    layers = tuple(
        LayerReport(f"model.layers.{i}.mlp", "grouped_mm", True, deepseek_v3, None, "") for i in range(3, 61)
    )
    text = render(Report("V3", "export", layers, ()))
    assert "\nmodel.layers.3.mlp   256  sigmoid+bias→top-8  SwiGLU D=7168 F=2048  2048\n" in text
    legend = " ".join(text.split("every layer")[1].split())
    assert f"model.layers.{{3-60}}.mlp: {deepseek_v3}" in legend
    assert max(map(len, text.splitlines())) <= 80


def test_passes_show_what_they_did(big: Report) -> None:
    lines = render(big).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("pass "))
    assert [line.split() for line in lines[at + 1 : at + 4]] == [
        ["normalize", "12.3", "4102", "→", "3980", "-"],
        ["lift_experts", "123.4", "3980", "→", "2000", "2.3e-07"],
        ["lower", "0.4", "2000", "-"],
    ]


def test_the_check_and_the_remarks_come_last(big: Report, mixed: Report) -> None:
    assert render(big).splitlines()[-1] == "whole program against the model: relative error 3.0e-07"
    assert render(mixed).splitlines()[-2:] == ["a remark", "layers.{1-2}.mlp: slow"]


def test_a_model_without_layers_says_so() -> None:
    text = render(Report("Linear", "export", (), ()))
    assert text == "Linear: no Mixture-of-Experts layers; the model runs unchanged"


def test_a_refusal_without_a_place_has_no_line_for_it() -> None:
    layer = LayerReport("mlp", "dense", False, None, Refusal("R305", "NaN"), "a.py:1")
    lines = render(Report("M", "export", (layer,), ())).splitlines()
    assert lines[3:] == ["mlp       as written  as written", "    R305 NaN", "idiom dense; source a.py:1"]


def test_str_is_the_text(mixed: Report) -> None:
    assert str(mixed) == render(mixed)


def test_a_layer_that_is_the_model_itself_has_a_name() -> None:
    layer = LayerReport("", "dense", False, None, Refusal("R305", "NaN"), "a.py:1")
    assert "\n(model)     as written" in render(Report("M", "export", (layer,), ()))


def test_a_long_headline_is_folded() -> None:
    text = render(Report("MixtralForCausalLM" * 2, "experts_implementation=grouped_mm", (), ()))
    assert text.endswith("no Mixture-of-Experts layers; the model\n    runs unchanged")
