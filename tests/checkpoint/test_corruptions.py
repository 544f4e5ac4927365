"""Fifty folders of either kind that came to harm: one line, exit 2, nothing written."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dsmoe_compiler.cli.hf_folder import hf_call
from tests.checkpoint import deepseek_files, transformers_files
from tests.checkpoint.corruptions import corrupt
from tests.cli.fakes import run


def _deepseek(folder: Path) -> Path:
    return deepseek_files.write(folder, deepseek_files.TINY, shard_bytes=30_000)


def _qwen3_moe(folder: Path) -> Path:
    model = transformers_files.model_of("Qwen3Moe", transformers_files.QWEN3_MOE)
    return transformers_files.saved(folder, model, "150KB")


KINDS: dict[str, Callable[[Path], Path]] = {"deepseek": _deepseek, "qwen3_moe": _qwen3_moe}


@pytest.fixture(scope="module", params=KINDS)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = KINDS[request.param](tmp_path_factory.mktemp("whole") / request.param)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


@pytest.mark.parametrize("seed", range(50))
def test_harm_is_told_in_one_line(folder: Path, seed: int) -> None:
    harm, output = corrupt(folder, seed), folder.parent / "out.pt2"
    result = run("compile", f"hf:{folder}", "-o", str(output))
    assert (result.exit_code, result.stdout) == (2, ""), f"{harm}: {result.output}"
    (line,) = said(result.stderr)
    assert line.startswith("dsmoe: ") and str(folder) in line, harm
    assert [path.name for path in folder.parent.iterdir()] == ["model"], harm


def said(stderr: str) -> list[str]:
    """What a command says, but for the stages that a slow machine has waited for."""
    return [line for line in stderr.splitlines() if not line.startswith("stage ")]


def test_unharmed_it_is_read(folder: Path) -> None:
    assert hf_call(folder, with_weights=True).notes == ()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 16, 19])
def test_a_process_says_the_same(folder: Path, seed: int) -> None:
    harm, output = corrupt(folder, seed), folder.parent / "out.pt2"
    command = [sys.executable, "-m", "dsmoe_compiler", "compile", f"hf:{folder}", "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, ""), (harm, done)
    (line,) = said(done.stderr)
    assert line.startswith("dsmoe: ") and not output.exists()
