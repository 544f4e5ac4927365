"""The commands ask the API the right thing, print the answer on stdout and end with 0."""

import json
from pathlib import Path

import pytest
import torch

from dsmoe_compiler.cli import demo as demo_command
from dsmoe_compiler.cli.measure import Rounds
from dsmoe_compiler.models import zoo
from dsmoe_compiler.report.report import Report
from tests.cli.fakes import FUSED_LAYER, REFUSED_LAYER, FakeApi, report, run


def test_inspect_prints_the_report(api: FakeApi) -> None:
    api.report = report(FUSED_LAYER, REFUSED_LAYER)
    result = run("inspect", "deepseek-moe-tiny")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == f"{api.report}\n"


def test_inspect_prints_json_that_reads_back(api: FakeApi) -> None:
    api.report = report(FUSED_LAYER, REFUSED_LAYER)
    result = run("inspect", "deepseek-moe-tiny", "--json")
    assert Report.from_json(result.stdout) == api.report


def test_a_model_without_moe_layers_is_done(api: FakeApi) -> None:
    api.report = report()
    result = run("inspect", "deepseek-moe-tiny")
    assert result.exit_code == 0
    assert "no Mixture-of-Experts layers; the model runs unchanged" in result.stdout


def test_a_refused_layer_is_an_answer(api: FakeApi, here: Path) -> None:
    api.report = report(REFUSED_LAYER)
    assert run("compile", "deepseek-moe-tiny", "-o", "m.pt2").exit_code == 0
    assert Path("m.pt2").exists()


def test_compile_passes_its_options_on_and_writes_the_file(api: FakeApi, here: Path) -> None:
    options = ["--backend", "reference", "--verify", "off", "--capture", "as_written", "--require-fused"]
    result = run("compile", "deepseek-moe-tiny", "-o", "m.pt2", *options)
    assert result.exit_code == 0
    assert api.options == dict(backend="reference", verify="off", capture="as_written", require_fused=True)
    assert Path("m.pt2").read_bytes() == b"program"
    assert "wrote m.pt2" in result.stdout.splitlines()[-1]


def test_compile_tells_the_same_as_json(api: FakeApi, here: Path) -> None:
    record = json.loads(run("compile", "deepseek-moe-tiny", "-o", "m.pt2", "--json").stdout)
    assert (record["output"], record["bytes"]) == ("m.pt2", 7)
    assert Report.from_json(json.dumps(record["report"])) == api.report


def test_inspect_needs_no_weights_and_compile_has_them(api: FakeApi, here: Path) -> None:
    run("inspect", "deepseek-moe-tiny")
    run("compile", "deepseek-moe-tiny", "-o", "m.pt2")
    devices = [{p.device.type for p in model.parameters()} for model, _, _ in api.calls]  # type: ignore[attr-defined]
    assert devices == [{"meta"}, {"cpu"}]
    assert [kwargs["input_ids"].device.type for _, _, kwargs in api.calls] == ["meta", "cpu"]


def test_models_lists_the_zoo() -> None:
    result = run("models")
    assert result.exit_code == 0
    heading, *lines = result.stdout.splitlines()
    listed = [line.split()[0] for line in lines if not line.startswith(" ")]
    assert heading.startswith("name") and listed == list(zoo.ZOO)
    (line,) = (line for line in lines if line.startswith("deepseek-moe-16b"))
    assert line.split()[1:] == ["16.4", "B", "2.8", "B", "64", "6", "2", "27"]
    (dense,) = (line for line in lines if line.startswith("deepseek-67b"))
    assert dense.split()[1:] == ["67.4", "B", "67.4", "B", "–", "–", "–", "0"]
    assert max(map(len, lines)) <= 80


def test_models_as_json() -> None:
    records = {record["name"]: record for record in json.loads(run("models", "--json").stdout)}
    largest = records["deepseek-moe-145b"]
    assert largest["parameters"] == zoo.parameter_count("deepseek-moe-145b").total
    assert (largest["experts"], largest["experts_per_token"], largest["shared_experts"]) == (128, 12, 4)
    assert largest["moe_layers"] == 61
    dense = records["llama2-7b"]
    assert (dense["experts"], dense["experts_per_token"], dense["shared_experts"]) == (None, None, None)


@pytest.fixture
def quick_demo(api: FakeApi, monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    """A demo on the tiny model whose eager rounds take 30 ms and whose compiled ones take 10."""
    monkeypatch.setattr(demo_command, "MODEL", "deepseek-moe-tiny")
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    times = Rounds({"eager": (0.03, 0.03, 0.2), "compiled": (0.01, 0.01, 0.01)}, 3)
    monkeypatch.setattr(demo_command, "interleaved", lambda calls, *_, **__: times)
    return api


def test_demo_shows_map_check_timings_and_what_next(quick_demo: FakeApi) -> None:
    result = run("demo")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(str(quick_demo.report))
    assert "largest relative error 0.0e+00" in result.stdout
    table = [line.split() for line in result.stdout.splitlines() if "×" in line]
    assert table == [[t, "30.0", "10.0", "3.00", "×", "0.0e+00", "3"] for t in ("1", "16", "128", "1024")]
    assert result.stdout.count("inspect ") == 2
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_demo_as_json(quick_demo: FakeApi) -> None:
    record = json.loads(run("demo", "--json").stdout)
    assert [each["tokens"] for each in record["comparisons"]] == [1, 16, 128, 1024]
    assert record["comparisons"][0]["ratio"] == pytest.approx(3)
    assert record["error"] == 0
    assert Report.from_json(json.dumps(record["report"])) == quick_demo.report


@pytest.mark.parametrize("worth", [1.01, float("nan")])
def test_a_demo_with_wrong_answers_does_not_end_well(quick_demo: FakeApi, worth: float) -> None:
    def spoil() -> None:
        model, _, _ = quick_demo.calls[-1]
        forward, calls = model.forward, [0]  # type: ignore[attr-defined]

        def wrong_every_second_time(**inputs: torch.Tensor) -> torch.Tensor:
            calls[0] += 1
            factor = 1.0 if calls[0] % 2 else worth
            return factor * forward(**inputs)  # type: ignore[no-any-return]

        model.forward = wrong_every_second_time  # type: ignore[attr-defined]

    quick_demo.meanwhile = spoil
    result = run("demo")
    assert result.exit_code == 70
    assert "the compiled program is off by" in result.stderr


@pytest.mark.parametrize("command", ["inspect", "explain", "compile", "opt", "bench", "models", "demo"])
def test_every_command_has_help_with_an_example(command: str) -> None:
    text = run(command, "--help").stdout
    assert "Example" in text
    assert f"dsmoe {command}" in text
    assert "--json" in text


def test_no_command_is_a_question() -> None:
    result = run()
    assert result.exit_code == 0
    named = ("inspect", "explain", "compile", "opt", "bench", "models", "demo")
    assert all(command in result.stdout for command in named)


def test_version() -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("dsmoe 0.")
