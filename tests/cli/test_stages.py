"""Progress goes to stderr, and only when somebody would otherwise wait without a word."""

import logging
import os
import pty
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest

from dsmoe_compiler.cli import stages as module
from dsmoe_compiler.cli.stages import stages


def test_a_quick_command_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with stages() as stage:
        stage("capture")
        stage("lower")
    assert capsys.readouterr() == ("", "")


def test_a_slow_one_names_the_stage_it_is_in_and_those_after(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.02)
    with stages() as stage:
        stage("capture")
        stage("lift_experts")
        for timer in threading.enumerate():
            if isinstance(timer, threading.Timer):
                timer.join()
        stage("lower")
    assert capsys.readouterr() == ("", "stage lift_experts\nstage lower\n")


def test_nothing_is_said_after_the_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.05)
    with pytest.raises(ZeroDivisionError), stages() as stage:
        stage("capture")
        raise ZeroDivisionError
    time.sleep(0.1)
    assert capsys.readouterr() == ("", "")


def chatter() -> None:
    """What libraries and models print while they work."""
    print("chatter")
    print("chatter", file=sys.stderr)
    warnings.warn("chatter", stacklevel=1)
    logging.getLogger("torch").error("chatter")


def test_what_others_print_meanwhile_is_not_shown(capfd: pytest.CaptureFixture[str]) -> None:
    with stages():
        chatter()
    assert capfd.readouterr() == ("", "")
    print("heard")
    assert capfd.readouterr() == ("heard\n", "")
    assert logging.root.isEnabledFor(logging.ERROR)


def test_who_debugs_sees_it_on_stderr(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSMOE_DEBUG", "1")
    with stages(), pytest.warns(UserWarning, match="chatter"):
        chatter()
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("chatter") >= 2


def on_a_terminal(command: list[str], folder: Path) -> str:
    """What a command writes to a terminal 80 columns wide, stdout and stderr together."""
    keyboard, screen = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80"}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdin=screen, stdout=screen, stderr=screen
    )
    os.close(screen)
    written = b""
    while True:
        try:
            chunk = os.read(keyboard, 65536)
        except OSError:  # how Linux says that the other side is closed
            break
        if not chunk:
            break
        written += chunk
    os.close(keyboard)
    assert process.wait() == 0, written.decode()
    return written.decode()


def test_a_terminal_gets_colour_and_a_pipe_does_not(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dsmoe_compiler", "models"]
    shown = on_a_terminal(command, tmp_path)
    assert "load torch" in shown
    assert "\x1b[36mdeepseek-moe-16b" in shown
    piped = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "\x1b" not in piped.stdout + piped.stderr
    assert "deepseek-moe-16b" in piped.stdout
