"""Time several exports of the model in this process, by turns, and print the rounds as a line of JSON.

    python -m benchmarks.onnx_one_timing '{"size": "mid", "threads": 1, "files": {"ort": "…/model.onnx"}, …}'

All sessions are alive at once. T tokens.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.measure import interleaved
from benchmarks.onnx_model import SIZES, build, ids
from benchmarks.onnx_one_load import session
from benchmarks.onnx_ways import EAGER, GROUPED

_ROUNDS = 100
_AWAKE = 16  # tokens up to which a call is so short that waking threads would show
_REST = 0.03  # seconds after which the threads of torch no longer spin
_COMPARED = 2  # inputs at every T

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Request:
    """What to time: `files` by way, torch's own ways too or not, at each T for about so many seconds."""

    size: str
    threads: int
    files: Mapping[str, str]
    torch: bool
    seconds: Mapping[str, float]  # by T, a text in JSON


@dataclass(frozen=True)
class Timed:
    """At T tokens: seconds of the kept rounds by way, those of one round in one place, and how many more
    were discarded; of the logits the largest difference to eager's, and the relative L2 distance.
    """

    tokens: int
    seconds: dict[str, tuple[float, ...]]
    discarded: int
    difference: dict[str, float]
    distance: dict[str, float]

    @property
    def kept(self) -> int:
        """How many rounds the figures are of."""
        return min(map(len, self.seconds.values()), default=0)


def timed(request: Request) -> list[Timed]:
    """One at every T, from the least on."""
    torch.set_num_threads(request.threads)
    eager = build(SIZES[request.size])
    runs = {EAGER: _torch(eager, "eager")}
    if request.torch:
        runs[GROUPED] = _torch(_on_the_same_tensors(eager), "grouped_mm")
    runs |= {name: _onnxruntime(Path(path), request.threads) for name, path in request.files.items()}
    found = []
    for text, seconds in request.seconds.items():
        tokens = int(text)
        given = [ids(SIZES[request.size], 1, tokens, seed) for seed in range(max(4, min(64, 1024 // tokens)))]
        differences, distances = _compared(runs, given[:_COMPARED])
        some = {name: run for name, run in runs.items() if request.torch or name in request.files}
        rounds = interleaved(
            {name: _turn(run, given, at) for at, (name, run) in enumerate(some.items())},
            _ROUNDS,
            budget_seconds=seconds,
            before={
                name: _prepared(
                    name in request.files and request.threads > 1, _turn(run, given, at + 2), tokens
                )
                for at, (name, run) in enumerate(some.items())
            },
        )
        found.append(Timed(tokens, dict(rounds.seconds), rounds.discarded, differences, distances))
    return found


def _turn(run: Run, given: Sequence[Tensor], at: int) -> Callable[[int], Tensor]:
    """Each way meets every input, but not what another has just used: torch's ways share their weights."""
    return lambda i: run(given[(i + 5 * at) % len(given)])


def _prepared(rest: bool, call: Callable[[int], object], tokens: int) -> Callable[[int], object]:
    """Threads of another way have stopped spinning; where calls are short, one on other tokens wakes this
    way's.
    """

    def prepare(i: int) -> None:
        if rest:
            time.sleep(_REST)
        if tokens <= _AWAKE:
            call(i)

    return prepare


def _compared(runs: Mapping[str, Run], given: Sequence[Tensor]) -> tuple[dict[str, float], dict[str, float]]:
    """Over all given ids: the largest difference to eager, and the relative L2 distance."""
    wanted = torch.cat([runs[EAGER](i) for i in given], 1)
    differences, distances = {}, {}
    for name, run in runs.items():
        off = torch.cat([run(i) for i in given], 1) - wanted
        differences[name], distances[name] = off.abs().max().item(), (off.norm() / wanted.norm()).item()
    return differences, distances


def _torch(model: PreTrainedModel, implementation: str) -> Run:
    model.set_experts_implementation(implementation)
    forward: Callable[..., Any] = model

    def run(i: Tensor) -> Tensor:
        logits: Tensor = forward(input_ids=i).logits
        return logits

    return run


def _onnxruntime(path: Path, threads: int) -> Run:
    loaded = session(path, threads)
    return lambda i: torch.from_numpy(loaded.run(None, {"input_ids": i.numpy()})[0])


def _on_the_same_tensors(model: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


if __name__ == "__main__":
    with torch.inference_mode():
        print(json.dumps({"timed": [asdict(t) for t in timed(Request(**json.loads(sys.argv[1])))]}))
