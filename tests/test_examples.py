"""The examples run, and the README shows what they print."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def _output(example: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "examples" / example)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_readme_shows_a_layer_before_and_after() -> None:
    before, after = _output("before_and_after.py").split("# after\n")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert before.removeprefix("# before\n").strip() in readme
    assert after.strip() in readme


def test_three_spellings_are_one_program() -> None:
    printed = _output("three_spellings.py")
    assert printed.startswith("# 1 program from 3 spellings\n")
    assert printed.strip() in (ROOT / "README.md").read_text(encoding="utf-8")


def test_a_load_is_counted_and_shown() -> None:
    lines = _output("expert_load.py").splitlines()
    assert lines[0] == "DeepSeekMoEForCausalLM: 1,024 tokens, top-4, 2 of 2 MoE layers counted"
    assert [line.split()[0] for line in lines[4:6]] == ["1", "2"]


def test_a_transformers_model_compiles() -> None:
    pytest.importorskip("transformers")
    printed = _output("compile_transformers.py")
    assert "2 of 2 MoE layers fused" in printed
    error = float(printed.strip().split()[-1])
    # fp32, two layers of width 128: each sum of 128 products may differ by sqrt(128) roundings of 6e-8.
    assert error < 1e-5
