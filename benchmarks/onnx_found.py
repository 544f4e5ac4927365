"""What a run of benchmarks.onnx measured, and the figures that follow from it.

A ratio of two ways is the median of the ratios within rounds that both were in. T tokens.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.onnx_model import Size
from benchmarks.onnx_one_export import Exported
from benchmarks.onnx_one_load import Loaded
from benchmarks.onnx_one_timing import Timed
from benchmarks.onnx_ways import WAYS


@dataclass(frozen=True)
class Found:
    """By way: its export; by threads and way: its loads; by threads: what was timed together, and after that
    what was timed apart. `missing`: ways that there is nothing of, and why.
    """

    size: Size
    exports: dict[str, Exported] = field(default_factory=dict)
    loads: dict[int, dict[str, list[Loaded]]] = field(default_factory=dict)
    timings: dict[int, list[list[Timed]]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def timed(self, threads: int, tokens: int, *names: str) -> Timed | None:
        """The first rounds that all of these were in."""
        for group in self.timings[threads]:
            for t in group:
                if t.tokens == tokens and t.seconds.keys() >= set(names):
                    return t
        return None

    def milliseconds(self, threads: int, tokens: int, name: str) -> float | None:
        """Of the median round."""
        t = self.timed(threads, tokens, name)
        return None if t is None else 1e3 * statistics.median(t.seconds[name])

    def times(self, threads: int, tokens: int, name: str, other: str) -> float | None:
        """How many times as long as `other` it takes."""
        t = self.timed(threads, tokens, name, other)
        return None if t is None else _ratio(t.seconds[name], t.seconds[other])

    def load_seconds(self, threads: int, name: str) -> float | None:
        """Of the median load."""
        loads = self.loads[threads].get(name)
        return statistics.median(each.seconds for each in loads) if loads else None

    def load_times(self, threads: int, name: str, other: str) -> float | None:
        """How many times as long as `other` it takes to load."""
        both = [self.loads[threads].get(n) for n in (name, other)]
        return None if None in both else _ratio(*([x.seconds for x in loads or ()] for loads in both))

    def peaks(self, name: str) -> tuple[float, float] | None:
        """The most memory of any process that loaded it, and of those after one call; 10^6 bytes."""
        loads = [each for by_name in self.loads.values() for each in by_name.get(name, ())]
        if not loads:
            return None
        return max(x.loaded_megabytes for x in loads), max(x.run_megabytes for x in loads)

    def difference(self, name: str) -> tuple[float, float] | None:
        """The largest to eager's logits, and the largest relative distance, at any T and threads."""
        all_of = [t for groups in self.timings.values() for group in groups for t in group]
        found = [(t.difference[name], t.distance[name]) for t in all_of if name in t.difference]
        return (max(d for d, _ in found), max(d for _, d in found)) if found else None

    def expert_share(self, name: str) -> float | None:
        """Bytes of the experts over those in float32: of what lies beside the file, all that is not another
        parameter.
        """
        e = self.exports.get(name)
        if e is None:
            return None
        others = e.parameter_bytes - self.size.expert_bytes
        return (e.data_bytes - others) / self.size.expert_bytes

    @property
    def tokens(self) -> list[int]:
        """Every T."""
        return sorted({t.tokens for groups in self.timings.values() for group in groups for t in group})

    @property
    def names(self) -> list[str]:
        """Ways that were exported, in their order."""
        return [name for name in WAYS if name in self.exports]


def _ratio(a: Sequence[float], b: Sequence[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b, strict=True))
