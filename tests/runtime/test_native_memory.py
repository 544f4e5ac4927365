"""The native kernels touch nothing beside the tensors that they are given."""

import os
import subprocess
import sys

from tests.runtime.native_levels import levels


def test_nothing_beside_the_tensors_is_touched() -> None:
    """x, ids, weights, experts' tensors and the output end where memory ends, then begin where it begins."""
    those = levels()
    command = [sys.executable, "-m", "tests.runtime.guarded_process"]
    # Threads that wait do not keep the others from the cores.
    done = subprocess.run(
        command, env={**os.environ, "OMP_WAIT_POLICY": "passive"}, capture_output=True, text=True
    )
    said = done.stdout.splitlines()
    assert done.returncode == 0, f"{done.returncode} in {said[-1:]}: {done.stderr[-2000:]}"
    assert said[-1].split() == list(those)
