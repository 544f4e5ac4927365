"""Export the model one way in this process, and print what it cost and what it gave as a line of JSON.

    python -m benchmarks.onnx_one_export WAY SIZE FOLDER

Counted: wall seconds of the call with the file written, and the most memory this process ever had resident:
Python, torch, the model's weights and whatever the export takes.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime  # noqa: F401 - a way that needs it need not wait for it
import onnxscript  # noqa: F401

from benchmarks.measure import peak_megabytes
from benchmarks.onnx_model import SIZES, build, ids, parameter_bytes
from benchmarks.onnx_ways import WAYS


@dataclass(frozen=True)
class Exported:
    """`peak_megabytes` of the process (10^6 bytes); nodes of the graph and those nested in it; bytes of the
    file, of the weights beside it and of the model's parameters; versions by domain.
    """

    seconds: float
    peak_megabytes: float
    nodes: int
    file_bytes: int
    data_bytes: int
    parameter_bytes: int
    opsets: dict[str, int]


def export(way: str, size: str, folder: Path) -> Exported:
    """Write `folder`/model.onnx."""
    model, example = build(SIZES[size]), ids(SIZES[size], 2, 12, seed=0)
    start = time.perf_counter()
    WAYS[way].export(model, example, folder)
    seconds, peak = time.perf_counter() - start, peak_megabytes()
    path = folder / "model.onnx"
    found = onnx.load(path, load_external_data=False)
    return Exported(
        seconds,
        peak,
        nodes(found.graph),
        path.stat().st_size,
        sum(p.stat().st_size for p in folder.iterdir() if p != path and p.suffix != ".json"),
        parameter_bytes(model),
        {o.domain or "ai.onnx": o.version for o in found.opset_import},
    )


def nodes(graph: Any) -> int:
    """Of a graph, with those of the graphs that its nodes hold."""
    held = [
        g for node in graph.node for a in node.attribute for g in ([a.g] if a.HasField("g") else [*a.graphs])
    ]
    return len(graph.node) + sum(map(nodes, held))


if __name__ == "__main__":
    print(json.dumps(asdict(export(sys.argv[1], sys.argv[2], Path(sys.argv[3])))))
