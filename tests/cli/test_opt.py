"""`dsmoe opt`: the graph on stdout, all that is said of it on stderr, and every wrong input in one line."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
from click.testing import Result

from dsmoe_compiler import pipeline
from dsmoe_compiler.cli.model_argument import ModelCall, resolve
from dsmoe_compiler.ir.errors import InputError
from dsmoe_compiler.ir.graph import ProgramGraph
from dsmoe_compiler.ir.passes import Pass, PassLog
from tests.cli.fakes import run, wrong

ROOT = Path(__file__).parents[2]
MODEL = "tests.cli.small_model:build"  # layers 0 fused, 1 with an unknown router, 2 refused
NAMES = ["normalize", "lift_experts", "fuse_router", "fuse_shared_experts"]


def opt(*arguments: str) -> Result:
    """`dsmoe opt MODEL ARGUMENTS`, which ends well."""
    result = run("opt", MODEL, *arguments)
    assert result.exit_code == 0, result.stderr
    return result


@cache
def told() -> Result:
    """One run that shows everything."""
    return opt("--print-ir-after-all", "--remarks=all", "--stats", "--timing")


@cache
def record() -> dict[str, object]:
    """The same as JSON."""
    return json.loads(opt("--json").stdout)  # type: ignore[no-any-return]


def banners(text: str) -> list[str]:
    return re.findall(r"^# -----// IR Dump (.*) //----- #$", text, re.MULTILINE)


def table(title: str) -> list[list[str]]:
    """The table on stderr whose second column is called so, split at gaps, without its titles."""
    lines = told().stderr.splitlines()
    (start,) = (i for i, line in enumerate(lines) if re.match(rf"pass +{title}", line))
    end = lines.index("", start) if "" in lines[start:] else len(lines)
    return [re.split(r" {2,}", line) for line in lines[start + 1 : end]]


def test_the_graph_alone_is_on_stdout() -> None:
    assert told().stdout.startswith("%input : f32[s0, 16] = input\n")
    assert told().stdout.count("dsmoe.moe(") == told().stdout.count("dsmoe.experts(") == 1
    assert "remark:" not in told().stdout and "IR Dump" not in told().stdout
    assert record()["ir"] == told().stdout


def test_graphs_after_passes_come_in_order_on_stderr() -> None:
    assert banners(told().stderr) == [f"After {name}" for name in NAMES]
    (_, *dumps) = re.split(r"^# -----//.*\n", told().stderr, flags=re.MULTILINE)
    assert [dump.count("dsmoe.experts(") for dump in dumps] == [0, 2, 1, 1]
    assert dumps[-1].startswith(told().stdout)


def test_no_passes_print_the_graph_as_captured(tmp_path: Path) -> None:
    result = opt("--passes", "", "--print-ir-after-all", "--stats")
    assert "dsmoe." not in result.stdout and "bmm(" in result.stdout
    assert banners(result.stderr) == []


def test_before_and_after_by_name_and_a_note_on_what_does_not_run() -> None:
    names = ("--print-ir-before", "lift_experts", "--print-ir-after", "lift_experts")
    result = opt("--passes", "normalize,lift_experts", *names, "--print-ir-after", "fuse_router")
    assert banners(result.stderr) == ["Before lift_experts", "After lift_experts"]
    assert "note: --print-ir-after fuse_router prints nothing: it is not in the pipeline" in result.stderr


def test_after_change_leaves_out_what_changed_nothing() -> None:
    twice = "lift_experts,normalize,lift_experts,fuse_shared_experts,fuse_router"
    for more in ([], ["--print-ir-after-all"]):
        result = opt("--passes", twice, "--print-ir-after-change", *more)
        assert banners(result.stderr) == ["After lift_experts", "After fuse_router"]


def test_a_folder_gets_a_numbered_file_each(tmp_path: Path) -> None:
    folder, twice = tmp_path / "a" / "b", "normalize,lift_experts,normalize"
    result = opt("--passes", twice, "--ir-tree-dir", str(folder), "--print-ir-before", "normalize")
    assert banners(result.stderr) == []
    files = {path.name: path.read_text() for path in sorted(folder.iterdir())}
    assert list(files) == ["00_before_normalize.txt", "01_before_normalize.txt"]
    assert banners(files["00_before_normalize.txt"]) == ["Before normalize"]
    assert files["01_before_normalize.txt"].endswith(result.stdout)


def test_a_folder_alone_asks_for_every_pass(tmp_path: Path) -> None:
    opt("--ir-tree-dir", str(tmp_path))
    found = sorted(path.name for path in tmp_path.iterdir())
    assert found == [f"{i:02}_after_{name}.txt" for i, name in enumerate(NAMES)]


def test_one_layer_is_printed_as_it_stands_in_the_whole() -> None:
    part = opt("--layer", "1").stdout.splitlines()
    values = [line for line in part if line.startswith("%")]
    whole = told().stdout.splitlines()
    assert values and set(values) < set(whole)
    assert sum("dsmoe.experts(" in line for line in part) == 1
    assert not any("dsmoe.moe(" in line or "cumsum(" in line for line in part), "of layers 0 and 2"


def test_an_unknown_layer_is_one_line() -> None:
    assert wrong("opt", MODEL, "--layer", "3").startswith(
        "--layer: unknown module '3'; the names are: 0, 1, 2"
    )


def test_remarks_stand_at_the_users_lines() -> None:
    remarks = [line for line in told().stderr.splitlines() if " remark: " in line]
    assert [re.sub(r"py:\d+", "py:N", line).split(" (")[0] for line in remarks] == [
        "small_model.py:N: remark: [lift_experts] 0: fused 8 experts, top-2: silu FFN D=16",
        "small_model.py:N: remark: [lift_experts] 1: fused 8 experts, top-2: silu FFN D=16",
        "small_model.py:N: remark: [lift_experts] 2: missed: "
        "R301: aten::cumsum is not known on pairs in their own order",
        "small_model.py:N: remark: [fuse_router] 0: fused the router: softmax→top-2",
        "small_model.py:N: remark: [fuse_router] 1: missed: "
        "R201: the scores come from aten.tanh.default, neither softmax nor sigmoid",
    ]
    source = (Path(__file__).parent / "small_model.py").read_text().splitlines()
    (line,) = (int(n) for n in re.findall(r"py:(\d+): remark: \[lift_experts\] 2: missed", told().stderr))
    assert source[line - 1].strip() == "return F.silu(rows).cumsum(0)"


LOOP = """
import torch
from torch.nn import functional as F

def loop(x, gate, experts):
    weights, ids = F.linear(x, gate).softmax(-1).topk(2)
    out, hits = torch.zeros_like(x), F.one_hot(ids, 4).permute(2, 1, 0)
    for expert in (hits.sum((-1, -2)) > 0).nonzero():
        slot, token = torch.where(hits[expert[0]])
        out.index_add_(0, token, F.linear(x[token], experts[expert[0]]) * weights[token, slot, None])
    return out
"""


def test_what_capture_assumed_is_a_remark_too(here: Path) -> None:
    Path("loops.py").write_text(LOOP)
    inputs = ("--input", "x=5x16", "--input", "gate=4x16", "--input", "experts=4x16x16")
    for verify, how in (("off", "not checked"), ("numeric", "and held on forced routings")):
        options = ("--passes", "", f"--verify={verify}", "--remarks=all", "-o", os.devnull)
        result = run("opt", "loops:loop", *inputs, *options)
        assert result.exit_code == 0, result.stderr
        told = [line for line in result.stderr.splitlines() if "remark:" in line]
        assert told and all(f"remark: [capture] (model): assumed, {how}: " in line for line in told)
        assert any(line.startswith("loops.py:8: ") for line in told)


@pytest.mark.parametrize(("which", "count"), [("missed", 2), ("passed", 3)])
def test_remarks_of_one_kind(which: str, count: int) -> None:
    lines = opt(f"--remarks={which}", "-o", os.devnull).stderr.splitlines()
    remarks = [line for line in lines if " remark: " in line]
    assert len(remarks) == count
    assert all((" missed: " in line) == (which == "missed") for line in remarks)


def test_statistics_count_what_the_remarks_tell() -> None:
    rows = {name: cells for name, _, *cells in table("nodes")}
    assert list(rows) == NAMES
    # found, fused, refused, replaced, taken back
    assert rows["lift_experts"][:5] == ["3", "2", "1", "2", "0"]
    assert rows["fuse_router"][:5] == ["0", "1", "1", "1", "0"]
    assert rows["fuse_shared_experts"] == ["0", "0", "0", "0", "0", "-"]
    assert float(rows["lift_experts"][5]) < 1e-5  # a model with weights is verified


def test_timing_sums_up() -> None:
    rows = {name: (float(seconds), float(share.rstrip("%"))) for name, seconds, share in table("seconds")}
    assert list(rows) == ["capture", *NAMES, "total"]
    parts = [rows[name] for name in rows if name != "total"]
    for column, rounding in ((0, 1e-4), (1, 0.1)):
        assert rows["total"][column] == pytest.approx(sum(part[column] for part in parts), abs=6 * rounding)


def test_json_holds_the_tables_and_the_remarks() -> None:
    passes = record()["passes"]
    assert isinstance(passes, list)
    assert [each["name"] for each in passes] == ["capture", *NAMES]
    assert sum(each["share"] for each in passes) == pytest.approx(1)
    lift = passes[2]
    assert (lift["layers_found"], lift["fused"], lift["refused"], lift["taken_back"]) == (3, 2, 1, 0)
    assert lift["nodes_after"] < lift["nodes_before"]
    remarks = record()["remarks"]
    assert isinstance(remarks, list)
    assert [each["kind"] for each in remarks] == ["passed", "passed", "missed", "passed", "missed"]
    assert record()["pipeline"] == ",".join(NAMES)


def test_json_names_the_file_that_has_the_graph(here: Path) -> None:
    told_of = json.loads(opt("--json", "--remarks=missed", "-o", "out.txt").stdout)
    assert told_of["output"] == "out.txt" and "ir" not in told_of
    assert Path("out.txt").read_text() == told().stdout
    assert {each["kind"] for each in told_of["remarks"]} == {"missed"}


def test_the_dumped_pipeline_is_read_again() -> None:
    dumped = run("opt", "--dump-pipeline").stdout
    assert dumped == ",".join(NAMES) + "\n"
    again = run("opt", "--dump-pipeline", "--passes", dumped)
    assert (again.exit_code, again.stdout) == (0, dumped)
    assert run("opt", "--dump-pipeline", "--passes", "").stdout == "\n"


@dataclass(frozen=True)
class Wrecker:
    """Breaks when it comes to the graph.

    before:
        %0 = anything()
    """

    name: ClassVar[str] = "wrecker"
    after: int = 1

    def run(self, graph: ProgramGraph, log: PassLog) -> bool:
        raise KeyError(f"broken {self.after}")


@pytest.fixture
def wrecker(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: dict[str, type[Pass]] = {**pipeline.PASSES, "wrecker": Wrecker}
    monkeypatch.setattr(pipeline, "PASSES", passes)


def test_passes_are_listed_with_their_options(wrecker: None) -> None:
    lines = run("opt", "--list-passes").stdout.splitlines()
    assert [line for line in lines if line and not line.startswith(" ")][:-1] == [*NAMES, "wrecker"]
    assert lines[lines.index("lift_experts") + 1].startswith("    Every spelling of the routed experts")
    assert lines[lines.index("wrecker") + 1 :][:2] == [
        "    Breaks when it comes to the graph.",
        "    after : int = 1",
    ]
    assert lines[-1] == "default pipeline: " + ",".join(NAMES)
    records = json.loads(run("opt", "--list-passes", "--json").stdout)
    assert records["passes"][-1]["options"] == [{"name": "after", "type": "int", "default": "1"}]


def test_options_reach_the_pass_and_what_was_seen_before_it_broke_is_shown(wrecker: None) -> None:
    passes = "lift_experts,wrecker{after=7}"
    result = run("opt", MODEL, "--passes", passes, "--print-ir-before", "wrecker", "--remarks=passed")
    assert (result.exit_code, result.stdout) == (70, "")
    assert banners(result.stderr) == ["Before wrecker"]
    assert result.stderr.count("remark: [lift_experts]") == 2
    assert "pass wrecker failed: KeyError: 'broken 7'" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "Missing argument 'MODEL'."),
        (
            (MODEL, "--passes", "lift_expert"),
            "unknown pass 'lift_expert'; the nearest names are: lift_experts",
        ),
        ((MODEL, "--passes", "normalize{"), "the '{' at character 10 is never closed"),
        (
            (MODEL, "--print-ir-after", "fuse"),
            "--print-ir-after: unknown pass 'fuse'; the nearest names are:",
        ),
        ((MODEL, "--print-ir-before", "x"), "--print-ir-before: unknown pass 'x'; the names are: normalize"),
        (("--dump-pipeline", "--passes", "x"), "pipeline 'x': unknown pass 'x'"),
        ((MODEL, "-o", "nowhere/x"), "cannot write nowhere/x: No such file or directory"),
        ((MODEL, "-o", "."), "cannot write .: Is a directory"),
        ((MODEL, "--ir-tree-dir", "file"), "cannot make the folder file: File exists"),
        ((MODEL, "--ir-tree-dir", "file/x"), "cannot make the folder file/x: Not a directory"),
        (("m.pt2", "--input", "x=3"), "--input has no meaning for a .pt2 file"),
        ((MODEL, "--remarks=some"), "Invalid value for '--remarks'"),
    ],
)
def test_wrong_input_is_one_line_before_the_work(
    arguments: tuple[str, ...], says: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "file").touch()
    monkeypatch.setattr("dsmoe_compiler.api.optimize", lambda *_, **__: pytest.fail("captured"))
    assert says in wrong("opt", *arguments)
    assert [path.name for path in here.iterdir()] == ["file"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no disk that is always full")
def test_a_full_disk_is_one_line() -> None:
    result = run("opt", MODEL, "-o", "/dev/full")
    assert result.exit_code == 2
    assert "cannot write /dev/full: No space left on device" in result.stderr


def test_a_failed_run_leaves_an_old_file_as_it_was(here: Path, wrecker: None) -> None:
    Path("out.txt").write_text("old")
    assert run("opt", MODEL, "--passes", "wrecker", "-o", "out.txt").exit_code == 70
    assert Path("out.txt").read_text() == "old"


def devices(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> set[str]:
    """Where the parameters lie that a command captures."""
    seen = set[str]()

    def watched(*args: Any, **options: Any) -> ModelCall:
        call = resolve(*args, **options)
        seen.update(p.device.type for p in call.model.parameters())  # type: ignore[attr-defined]
        return call

    monkeypatch.setattr("dsmoe_compiler.cli.optimize.resolve", watched)
    result = run("opt", "deepseek-moe-tiny", "--passes", "normalize", *arguments)
    assert result.exit_code == 0, result.stderr
    return seen


def test_zoo_models_have_weights_where_numbers_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices(monkeypatch) == {"meta"}
    assert devices(monkeypatch, "--verify=off") == {"meta"}
    assert devices(monkeypatch, "--verify=numeric") == {"cpu"}


def test_numbers_of_a_model_without_weights_are_one_line(here: Path) -> None:
    Path("bare.py").write_text(
        "from dsmoe_compiler.models import zoo\n\n\n"
        "def build():\n"
        "    return zoo.build('deepseek-moe-tiny', device='meta'), (), "
        "zoo.example_inputs('deepseek-moe-tiny', 'meta')\n"
    )
    assert "bare:build is on the meta device" in wrong("opt", "bare:build", "--verify=numeric")


def test_capture_is_done_as_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[str]()

    def optimize(*_: object, capture: str, **__: object) -> None:
        asked.append(capture)
        raise InputError("enough")

    monkeypatch.setattr("dsmoe_compiler.api.optimize", optimize)
    for arguments in ((), ("--capture=as_written",)):
        assert wrong("opt", MODEL, *arguments) == "enough"
    assert asked == ["auto", "as_written"]


def test_verify_off_checks_nothing() -> None:
    passes = json.loads(opt("--json", "--verify=off").stdout)["passes"]
    assert all(each["max_error"] is None for each in passes[1:])


def test_a_compiled_file_shows_what_is_in_it(here: Path) -> None:
    assert run("compile", MODEL, "-o", "m.pt2").exit_code == 0
    as_it_is = run("opt", "m.pt2", "--passes", "").stdout
    assert as_it_is.count("dsmoe.moe(") == as_it_is.count("dsmoe.experts(") == 1
    again = run("opt", "m.pt2", "--stats")
    assert again.stdout == as_it_is


def test_the_documentation_shows_what_is_printed() -> None:
    page = (ROOT / "docs" / "opt.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```console\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    sessions = [each for block in blocks for each in block.split("$ dsmoe ")[1:]]
    assert len(sessions) == 4
    for command, _, shown in (session.partition("\n") for session in sessions):
        result = run(*shlex.split(command))
        said = [line for line in result.stderr.splitlines() if line and not line.startswith("stage ")]
        printed = "\n".join([*result.stdout.splitlines(), *said])
        assert re.sub(r"\d+", "N", printed) == re.sub(r"\d+", "N", shown.rstrip())  # counts may change


DSMOE = [sys.executable, "-m", "dsmoe_compiler"]


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_reader_that_leaves_is_no_error(closed: str) -> None:
    command = [*DSMOE, "opt", MODEL, "--print-ir-after-all"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    leaving, staying = process.stdout, process.stderr
    if closed == "stderr":
        leaving, staying = staying, leaving
    assert leaving and staying
    leaving.close()
    rest = staying.read()
    assert process.wait() == 141
    assert "internal error" not in rest and "Traceback" not in rest


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import pathlib, time\n\n\ndef build():\n    pathlib.Path('started').touch()\n    time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [*DSMOE, "opt", "slow:build", "-o", "out.txt", "--ir-tree-dir", "dumps"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert not (tmp_path / "out.txt").exists() and not list((tmp_path / "dumps").iterdir())
