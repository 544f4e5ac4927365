"""Load an ONNX file in this process, run it once if asked to, and print what that cost as a line of JSON.

    python -m benchmarks.onnx_one_load FILE THREADS TOKENS

Counted: wall seconds until onnxruntime's session is there, and the most memory this process ever had
resident: Python, onnxruntime and the pages of the file that it maps; torch is not imported.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from benchmarks.measure import peak_megabytes


@dataclass(frozen=True)
class Loaded:
    """Seconds of the load; the peaks, in 10^6 bytes, when it was done, and after the call."""

    seconds: float
    loaded_megabytes: float
    run_megabytes: float


def session(path: Path, threads: int) -> Any:
    """An onnxruntime.InferenceSession on the CPU, with its usual options but these threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Its threads would go on spinning while the next way is timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def load(path: Path, threads: int, tokens: int) -> Loaded:
    """Load, then run on (1, tokens) ids, if any."""
    start = time.perf_counter()
    loaded = session(path, threads)
    seconds, before = time.perf_counter() - start, peak_megabytes()
    if tokens:
        loaded.run(None, {"input_ids": np.arange(tokens)[None] % 64})
    return Loaded(seconds, before, peak_megabytes())


if __name__ == "__main__":
    print(json.dumps(asdict(load(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))))
