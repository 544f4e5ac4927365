"""Every way to end: one line on stderr, the right status, nothing half-written."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsmoe_compiler.cli import memory
from dsmoe_compiler.ir.errors import CaptureError, DsmoeError, NotFused, ShapeError
from tests.cli.fakes import REFUSED, FakeApi, run, wrong


def failing(api: FakeApi, error: BaseException) -> None:
    def meanwhile() -> None:
        raise error

    api.meanwhile = meanwhile


def test_a_refusal_with_require_fused_is_1_and_writes_nothing(api: FakeApi, here: Path) -> None:
    failing(api, NotFused((("layers.1.mlp", REFUSED),)))
    result = run("compile", "deepseek-moe-tiny", "-o", "m.pt2", "--require-fused")
    assert result.exit_code == 1
    assert "layers.1.mlp: R301: an operator is not known (at %cos_1 mine.py:7)" in result.stderr
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("error", [CaptureError("cannot\ncapture"), ShapeError("cannot  capture")])
def test_what_the_api_says_of_the_input_is_2(api: FakeApi, here: Path, error: Exception) -> None:
    failing(api, error)
    assert wrong("compile", "deepseek-moe-tiny", "-o", "m.pt2") == "cannot capture"
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("error", [KeyError("oops"), DsmoeError("pass p failed: oops")])
def test_a_bug_is_70_with_a_hint(api: FakeApi, here: Path, error: Exception) -> None:
    failing(api, error)
    result = run("compile", "deepseek-moe-tiny", "-o", "m.pt2")
    assert (result.exit_code, result.stdout) == (70, "")
    assert result.stderr.startswith("dsmoe: internal error: ")
    assert result.stderr.endswith("(set DSMOE_DEBUG=1 for the traceback)\n")
    assert "oops" in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(here.iterdir()) == []


def test_the_traceback_is_there_for_who_asks(api: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSMOE_DEBUG", "1")
    failing(api, KeyError("oops"))
    result = run("inspect", "deepseek-moe-tiny")
    assert result.exit_code == 70
    assert "Traceback (most recent call last)" in result.stderr


def test_interrupted_is_130(api: FakeApi, here: Path) -> None:
    failing(api, KeyboardInterrupt())
    result = run("compile", "deepseek-moe-tiny", "-o", "m.pt2")
    assert result.exit_code == 130
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["inspect"], "Missing argument 'MODEL'. Try 'dsmoe inspect --help'."),
        (
            ["inspect", "tiny", "--layer"],
            "Option '--layer' requires an argument. Try 'dsmoe inspect --help'.",
        ),
        (["compile", "deepseek-moe-tiny"], "Missing option '-o' / '--output'."),
        (["inspcet", "m"], "No such command 'inspcet'."),
        (["--nonsense"], "No such option"),
        (
            ["compile", "m", "-o", "m.pt2", "--backend", "tpu"],
            "'tpu' is not one of 'auto', 'cpu', 'triton', 'reference'",
        ),
        (["inspect", "m", "--input", "x"], "'x' is not of the form name=2x16:int64"),
        (["inspect", "m", "--input", "x=2x-3"], "'x=2x-3' is not of the form"),
        (["inspect", "m", "--input", "x=2:int3"], "'int3' is not one of float32"),
        (["inspect", "m.pt2", "--input", "x=2"], "--input has no meaning for a .pt2 file"),
    ],
)
def test_wrong_usage(arguments: list[str], says: str, api: FakeApi) -> None:
    assert says in wrong(*arguments)
    assert api.calls == []


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ("nowhere/m.pt2", "cannot write nowhere/m.pt2: No such file or directory (nowhere)"),
        ("m.onnx", "a compiled program's name ends in .pt2"),
        ("folder.pt2", "it is a folder"),
        ("file/m.pt2", "cannot write file/m.pt2: Not a directory (file)"),
    ],
)
def test_an_unwritable_output_is_found_before_the_work(
    output: str, says: str, api: FakeApi, here: Path
) -> None:
    (here / "folder.pt2").mkdir()
    (here / "file").touch()
    assert says in wrong("compile", "deepseek-moe-tiny", "-o", output)
    assert api.calls == []
    assert sorted(path.name for path in here.iterdir()) == ["file", "folder.pt2"]


def test_a_compiled_program_is_not_compiled_again(api: FakeApi, here: Path) -> None:
    assert "m.pt2 is compiled already" in wrong("compile", "m.pt2", "-o", "n.pt2")


def test_weights_that_do_not_fit_in_memory(api: FakeApi, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 20_000_000_000)
    line = wrong("compile", "deepseek-moe-145b", "-o", "m.pt2")
    assert line.startswith("deepseek-moe-145b needs 578 GB, 20 GB available")


def test_a_program_that_does_not_fit_on_the_disk(
    api: FakeApi, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    assert "m.pt2 needs 4.9 MB on the disk, 1 kB free" in wrong("compile", "deepseek-moe-tiny", "-o", "m.pt2")
    assert api.calls == []


def test_unknown_memory_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: None)
    memory.require_memory(10**18, "anything")


def test_available_memory_is_known_here() -> None:
    available = memory.available_memory()
    assert available is not None
    assert available > 100_000_000


DSMOE = [sys.executable, "-m", "dsmoe_compiler"]


def test_a_real_process_ends_with_the_same_status(tmp_path: Path) -> None:
    result = subprocess.run([*DSMOE, "inspect", "no-such"], cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.splitlines()[-1].startswith("dsmoe: unknown model 'no-such'")


def test_help_does_not_wait_for_torch(tmp_path: Path) -> None:
    code = "import sys, dsmoe_compiler.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == 0


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*DSMOE, "models"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stderr
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait() == 141
    assert "internal error" not in errors


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import pathlib, time\n\n\ndef build():\n    pathlib.Path('started').touch()\n    time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [*DSMOE, "compile", "slow:build", "-o", "m.pt2"], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert not list(tmp_path.glob("*.pt2"))
