"""The benchmark of ONNX files: its figures, its goals, what it says of a way that fails, and a tiny run."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

pytest.importorskip("transformers")
pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import onnx

from benchmarks import onnx as benchmark
from benchmarks import onnx_one_export, onnx_one_timing, onnx_report
from benchmarks.measure import Target, in_fresh_process
from benchmarks.onnx_found import Found
from benchmarks.onnx_model import SIZES, build, ids, parameter_bytes
from benchmarks.onnx_one_export import Exported
from benchmarks.onnx_one_load import Loaded
from benchmarks.onnx_one_timing import Request, Timed
from benchmarks.onnx_ways import BATCHED, EAGER, GROUPED, ORT, STANDARD, TRANSFORMERS, WAYS

TINY, MID = SIZES["tiny"], SIZES["mid"]
OTHERS = 30_000_000  # bytes of the parameters that are no experts'


def _found(standard: float = 1.0, int8: float = 1.0, **changes: Any) -> Found:
    """Transformers takes 1 s for everything, torch 10, our standard form and its int8 what is given."""
    seconds = {EAGER: 1.0, TRANSFORMERS: 1.0, STANDARD: standard}
    seconds |= {f"{STANDARD} int8": int8, f"{ORT} int8": 1.0}
    apart = {STANDARD: 1.0, BATCHED: 10.0}
    total = MID.expert_bytes + OTHERS
    export = Exported(1.0, 2000, 1000, 200_000, total, total, {"ai.onnx": 20})
    ours = replace(export, **changes)
    small = replace(export, data_bytes=OTHERS + int(0.29 * MID.expert_bytes))
    exports = {TRANSFORMERS: replace(export, file_bytes=3_000_000), STANDARD: ours}
    exports |= {f"{STANDARD} int8": small, f"{ORT} int8": small, BATCHED: export}
    loads = {name: [Loaded(t, 1e3, 1e3)] for name, t in seconds.items() if name in exports}

    def group(seconds: dict[str, float]) -> list[Timed]:
        names: dict[str, tuple[float, ...]] = {name: (t, t, t) for name, t in seconds.items()}
        near = {name: 1e-6 for name in seconds}
        return [Timed(tokens, names, 3, near, near) for tokens in (1, 16, 128)]

    return Found(MID, exports, {1: loads}, {1: [group(seconds), group(apart)]}, {ORT: "E: because"})


def _goal(found: Found, text: str) -> Target:
    (goal,) = [t for t in onnx_report.targets(found) if text in t.what]
    return goal


def test_the_same_weights_every_time_and_rows_keep_their_size() -> None:
    first, second = build(TINY), build(TINY)
    call = ids(TINY, 2, 5, seed=1)
    with torch.inference_mode():
        logits = first(input_ids=call).logits
        assert torch.equal(logits, second(input_ids=call).logits)
    assert logits.shape == (2, 5, TINY.vocabulary) and 0.3 < logits.std() < 3
    experts = [p for name, p in first.named_parameters() if ".experts." in name]
    assert sum(p.numel() * p.element_size() for p in experts) == TINY.expert_bytes
    assert TINY.expert_bytes < parameter_bytes(first) < 2 * TINY.expert_bytes


@pytest.mark.parametrize("tokens", [1, 16, 128])
def test_latency_must_not_exceed_transformers(tokens: int) -> None:
    what = f"T={tokens}: {STANDARD}, times"
    assert _goal(_found(standard=0.99), what).met
    slow = _goal(_found(standard=1.02), what)
    assert not slow.met and slow.value == pytest.approx(1.02)


def test_nodes_load_and_memory_are_against_transformers() -> None:
    found = _found(standard=0.5, nodes=500)
    assert _goal(found, "nodes").met and _goal(found, "load:").met
    found = _found(standard=0.51, nodes=501)
    assert not _goal(found, "nodes").met and not _goal(found, "load:").met
    assert not _goal(found, "peak memory").met
    found.loads[1][STANDARD] = [Loaded(0.5, 700, 800)]
    assert _goal(found, "peak memory").value == pytest.approx(0.8)


def test_torchs_export_and_int8_are_judged_within_their_own_rounds() -> None:
    found = _found(standard=5.0, int8=1.1)
    batched = _goal(found, f"faster than {BATCHED}")
    assert batched.met and batched.value == 10  # of the rounds apart, not against the 5 s of those with all
    int8 = [t for t in onnx_report.targets(found) if f"times {ORT} int8" in t.what]
    assert [t.met for t in int8] == [True, True] and ["T=1:" in t.what for t in int8] == [False, False]
    assert not any(t.met for t in onnx_report.targets(_found(int8=1.2)) if f"times {ORT} int8" in t.what)


def test_sizes_and_distances_of_ours_are_goals() -> None:
    found = _found(file_bytes=1_000_001, data_bytes=1.02 * (MID.expert_bytes + OTHERS))
    assert not _goal(found, f"{STANDARD}: .onnx").met
    assert not _goal(found, f"{STANDARD}: data").met
    assert _goal(found, f"{STANDARD} int8: experts").value == pytest.approx(0.29)
    assert _goal(found, f"{STANDARD} int8: relative").met and not _goal(found, "were made, and run").met
    for group in found.timings[1]:
        group[0].distance[STANDARD] = 1e-3
    assert not _goal(found, f"{STANDARD}: relative").met


def test_without_transformers_there_is_no_goal_against_it() -> None:
    found = _found()
    del found.exports[TRANSFORMERS]
    assert not [t for t in onnx_report.targets(found) if f"times {TRANSFORMERS}" in t.what]
    del found.exports[STANDARD]
    assert _goal(found, "were made, and run").value == 2


@pytest.mark.parametrize("width", [100, 150])
def test_tables_show_figures_ratios_and_what_is_missing(width: int) -> None:
    text = io.StringIO()
    onnx_report.print_found(Console(file=text, width=width), _found(standard=0.8))
    shown = text.getvalue()
    assert "1.25×" in shown and "1000.00" in shown and "10000.00" in shown
    assert "3 of 6" in shown and "0.290" in shown and f"- {ORT}: E: because" in shown
    assert "…" not in shown  # nothing is cut


def test_the_files_figures_are_those_of_the_tables() -> None:
    found = json.loads(json.dumps(onnx_report.summary(_found(standard=0.8))))
    (first, *_) = found["latency"][TRANSFORMERS]
    assert first["milliseconds"] == 1000 and first["over_standard"] == pytest.approx(1.25)
    assert found["loads"][STANDARD]["seconds"] == {"1": 0.8} and found["missing"] == {ORT: "E: because"}


def test_a_failure_is_told_in_its_own_line() -> None:
    trace = "Traceback (most recent call last):\n  File\n"
    failed = RuntimeError(
        f"-m x failed:\n{trace}KeyError: 1\n\n{trace}ValueError: no such op\n  more\nAnd more"
    )
    assert benchmark.reason(failed) == "ValueError: no such op"
    assert benchmark.reason(RuntimeError("-m x failed:\nKilled")) == "Killed"


def test_a_file_that_cannot_be_loaded_is_dropped_and_named(tmp_path: Path) -> None:
    files, missing = {STANDARD: _doubled(tmp_path), ORT: tmp_path / "none.onnx"}, dict[str, str]()
    found = benchmark.load_all(Console(quiet=True), files, threads=1, rounds=2, missing=missing)
    assert list(files) == list(found) == [STANDARD] and len(found[STANDARD]) == 2
    assert "NO_SUCHFILE" in missing[ORT]


def test_nested_nodes_count() -> None:
    helper = onnx.helper
    inner = helper.make_graph([helper.make_node("Relu", ["a"], ["b"])] * 2, "inner", [], [])
    branch = helper.make_node("If", ["c"], ["d"], then_branch=inner, else_branch=inner)
    assert onnx_one_export.nodes(helper.make_graph([branch], "outer", [], [])) == 5


def test_a_process_counts_its_own_peak_alone(tmp_path: Path) -> None:
    mine = torch.ones(80_000_000)  # 320 MB, which a process started from here must not count
    path = _doubled(tmp_path)
    found = Loaded(**in_fresh_process("benchmarks.onnx_one_load", str(path), "1", "3"))
    assert 20 < found.loaded_megabytes <= found.run_megabytes < 320 <= mine.numel() * 4 / 1e6


def _doubled(folder: Path) -> Path:
    """A model that adds its ids to themselves."""
    helper, kind = onnx.helper, onnx.TensorProto.INT64
    add = helper.make_node("Add", ["input_ids", "input_ids"], ["y"])
    values = [helper.make_tensor_value_info(n, kind, ["batch", "sequence"]) for n in ("input_ids", "y")]
    graph = helper.make_graph([add], "add", values[:1], values[1:])
    opset = helper.make_opsetid("", 20)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), folder / "model.onnx")
    return folder / "model.onnx"


class _Session:
    """Answers as the model does, but for one number."""

    def __init__(self, path: Path, threads: int) -> None:
        self.model: Any = build(TINY)

    def run(self, outputs: None, given: dict[str, Any]) -> list[Any]:
        """Logits."""
        logits = self.model(input_ids=torch.from_numpy(given["input_ids"])).logits
        logits[0, -1, 3] += 0.5
        return [logits.numpy()]


@torch.inference_mode()
def test_all_take_turns_and_are_compared_with_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_one_timing, "_ROUNDS", 3)
    monkeypatch.setattr(onnx_one_timing, "session", _Session)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    request = Request("tiny", 1, {STANDARD: "model.onnx"}, torch=True, seconds={"1": 0.0, "5": 0.0})
    first, second = onnx_one_timing.timed(request)
    assert (first.tokens, second.tokens) == (1, 5)
    for t in (first, second):
        assert list(t.seconds) == [EAGER, GROUPED, STANDARD] and t.kept + t.discarded == 3
        assert t.difference[EAGER] == 0 and t.distance[GROUPED] < 1e-5
        assert t.difference[STANDARD] == pytest.approx(0.5, abs=1e-4)
    assert first.distance[STANDARD] > second.distance[STANDARD] > 1e-3
    (apart,) = onnx_one_timing.timed(replace(request, torch=False, seconds={"1": 0.0}))
    assert list(apart.seconds) == [STANDARD] and apart.difference[STANDARD] == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--ways", "ort,none"], "--ways: no none; there are standard"),
        (["--threads", "1,0"], "--threads 1,0:"),
    ],
)
def test_a_wrong_choice_is_told(options: list[str], told: str) -> None:
    done = CliRunner().invoke(benchmark.main, options)
    assert done.exit_code == 2 and told in done.output


@pytest.mark.slow
def test_a_tiny_run_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "SECONDS", {1: 0.1, 4: 0.1})
    path = tmp_path / "onnx.json"
    ways = [STANDARD, f"{ORT} int8", f"{STANDARD} + verify", TRANSFORMERS, BATCHED]
    options = ["--tiny", "--threads", "1", "--ways", ",".join(ways), "--json", str(path)]
    done = CliRunner().invoke(benchmark.main, options, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = json.loads(path.read_text())
    assert set(found["exports"]) == set(ways) and found["missing"] == {}
    assert set(found["loads"]) == {name for name in ways if WAYS[name].timed}
    for name in (EAGER, GROUPED, *found["loads"]):
        assert [case["tokens"] for case in found["latency"][name]] == [1, 4]
    assert found["latency"][BATCHED][0]["over_standard"] > 0
