"""Times on a GPU: candidates captured as CUDA graphs, replayed in turn, the median of many replays.

A graph holds one call for every set of inputs, so that the gap before a replay is shared by all of them. What
cannot be captured, because it waits for the GPU, is called as it is, and says so. Without a GPU, for --dry,
the calls are timed by the wall's clock, which says nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass

import torch

from benchmarks.gpu_floor import Ceilings

Call = Callable[[], object]
_FEWEST, _MOST = 7, 200


@dataclass(frozen=True)
class Times:
    """Of one call: the median in microseconds; the distance of the quartiles, and of the medians of the first
    and the second half of the replays, over the median; how many replays; whether of a graph.
    """

    microseconds: float
    spread: float
    drift: float
    replays: int
    graph: bool


def together(
    candidates: Mapping[str, Sequence[Call]],
    seconds: float,
    device: torch.device,
    waiting: Set[str] = frozenset(),
) -> dict[str, Times]:
    """Time candidates, each by its calls on one set of inputs after another, for about `seconds` in all.
    Those `waiting` for the GPU are not captured.
    """
    runs = {name: _run(calls, device, name not in waiting) for name, calls in candidates.items()}
    once = sum(_seconds(run, device) for run, _ in runs.values())
    fewest = _FEWEST if device.type == "cuda" else 2
    rounds = int(min(_MOST, max(fewest, seconds / max(once, 1e-6))))
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds):
        for name in list(runs)[:: 1 if i % 2 else -1]:
            taken[name].append(_seconds(runs[name][0], device) / len(candidates[name]))
    return {name: _times(taken[name], graph) for name, (_, graph) in runs.items()}


def _times(taken: Sequence[float], graph: bool) -> Times:
    middle = statistics.median(taken)
    low, _, high = statistics.quantiles(taken, n=4)
    half = len(taken) // 2
    drift = abs(statistics.median(taken[:half]) - statistics.median(taken[half:]))
    return Times(middle * 1e6, (high - low) / middle, drift / middle, len(taken), graph)


def _run(calls: Sequence[Call], device: torch.device, captures: bool) -> tuple[Call, bool]:
    """All calls as one graph, where `captures` and they can be captured."""

    def plainly() -> None:
        for call in calls:
            call()

    plainly()
    if device.type != "cuda" or not captures:
        return plainly, False
    _on_a_stream_of_its_own(plainly)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            plainly()
    except RuntimeError:  # an operation that waits for the GPU, or allocates outside of the graph's memory
        torch.cuda.synchronize()
        return plainly, False
    graph.replay()
    return graph.replay, True


def _on_a_stream_of_its_own(call: Call) -> None:
    """Warm up as capture wants it: what is set up for a stream is not set up on the default one."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call,unused-ignore]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()


def _seconds(run: Call, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call,unused-ignore]
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def ceilings(device: torch.device) -> Ceilings:
    """What this device reaches: a copy of 4 GB, and a product of 8192³ in bfloat16, of random numbers."""
    size, side = (1 << 31, 8192) if device.type == "cuda" else (1 << 16, 64)
    source = torch.randn(size, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    copied = _usual(lambda: target.copy_(source), device)
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    multiplied = _usual(lambda: a @ b, device)
    return Ceilings(2 * 2 * size / copied, 2 * side**3 / multiplied)


def _usual(call: Call, device: torch.device) -> float:
    """The median of 20 calls after 5, in seconds."""
    return statistics.median([_seconds(call, device) for _ in range(25)][5:])
