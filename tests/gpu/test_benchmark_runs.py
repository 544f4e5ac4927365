"""The GPU benchmark runs from end to end, on tiny layers in the interpreter: no device is needed."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent.parent


def _run(folder: Path, options: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """The benchmark where no device is seen."""
    known = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "XDG_CACHE_HOME": str(folder), **environment}
    command = [sys.executable, "-m", "benchmarks.gpu", *options]
    return subprocess.run(command, cwd=ROOT, env=known, capture_output=True, text=True)


def _dry(path: Path, *options: str) -> dict[str, object]:
    """What it writes to a file; its exit status is 0."""
    done = _run(path.parent, ["--dry", "--json", str(path), *options], TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]
    found: dict[str, object] = json.loads(path.read_text())
    return found


def test_peers(tmp_path: Path) -> None:
    theirs = str(Path(__file__).with_name("foreign_kernel.py"))
    found = _dry(tmp_path / "gpu.json", "--shapes", "S6", "--tokens", "3", "--vllm-kernel", theirs)
    cases = found["cases"]
    assert isinstance(cases, list) and [c["routing"] for c in cases] == ["uniform", "skewed"]
    uniform = cases[0]
    assert {"ours", "ours, whole layer", "torch grouped_mm"} <= set(uniform["figures"])
    assert all(f["times"]["microseconds"] > 0 for f in uniform["figures"].values())
    assert sum(name.startswith("vLLM's kernel") for name in uniform["figures"]) >= 3
    assert uniform["figures"]["ours"]["error"] < 1e-5 and uniform["floor"] > 0
    assert found["skipped"] == [] and found["gpu"] == "none: a dry run"
    assert (tmp_path / "gpu.svg").read_text().startswith("<svg")


def test_plans(tmp_path: Path) -> None:
    found = _dry(tmp_path / "plans.json", "--shapes", "S1", "--tokens", "3", "--plans", "2", "--store")
    contests = found["plans"]
    assert isinstance(contests, list) and len(contests) == 1
    tried = contests[0]["tried"]
    assert 2 <= len(tried) <= 3 and all(t["microseconds"] > 0 and t["failed"] is None for t in tried)
    assert contests[0]["gain"] >= 1.0
    assert list(tmp_path.glob("dsmoe/tuned/*/*.json"))


def test_aligned_pairs() -> None:
    """Seven pairs of three experts in tiles of four, worked out by hand."""
    from benchmarks.gpu_foreign import aligned

    found = aligned(torch.tensor([[2, 0, 0], [2, 0, 0], [0, 2, 0]], dtype=torch.int32)[:, :], 3, 4)
    assert found.pairs.tolist()[:12] == [1, 2, 4, 5, 6, 8, 9, 9, 0, 3, 7, 9]
    assert found.filled.tolist() == [12] and found.experts.tolist()[:3] == [0, 0, 2]


def test_what_no_time_is_left_for_is_named(tmp_path: Path) -> None:
    found = _dry(tmp_path / "gpu.json", "--shapes", "S1", "--tokens", "1", "--minutes", "0")
    assert found["cases"] == []
    assert found["skipped"] == ["S1, T=1, uniform", "S1, T=1, skewed"]


def test_without_a_device_it_says_what_it_needs(tmp_path: Path) -> None:
    done = _run(tmp_path, ["--json", str(tmp_path / "gpu.json")], TRITON_INTERPRET="0")
    assert done.returncode == 2 and "needs a CUDA device" in done.stderr
    assert not list(tmp_path.iterdir())
