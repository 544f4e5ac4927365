"""Counting what a program's calls choose, for as long as somebody wants to know.

A program runs one function. While a counter is open that is another one, the counting form of the same
graph; when the last is closed, the first is put back. A program that nobody counts runs what it always ran.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from dsmoe_compiler.ir.errors import InputError
from dsmoe_compiler.report.load import LayerLoad, Load
from dsmoe_compiler.report.report import LayerReport, Report
from dsmoe_compiler.runtime.counting_form import CountingForm


class LoadCounter:
    """What is counted: `counted` is that so far, and may be read at any time."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._counts = [dict[object, Tensor]() for _ in counted_layers(report)]
        self._open, self._lock = True, Lock()

    @property
    def counted(self) -> Load:
        """The load by now. On a GPU, this waits for the calls before it."""
        layers = counted_layers(self._report)
        with self._lock:
            counts = [tuple(each.values()) for each in self._counts]
        left = tuple(layer.name for layer in self._report.layers if not layer.fused)
        return Load(self._report.model, tuple(map(_layer_load, layers, counts)), left)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file for `dsmoe inspect --load`. Raises InputError when it cannot be written."""
        self.counted.save(path)

    def __str__(self) -> str:
        return str(self.counted)

    def add(self, counts: Sequence[Tensor]) -> None:
        """Take in the counts of one call, (E + 1,) for each layer; nothing once it is closed."""
        with self._lock:
            if self._open:
                for sums, own in zip(self._counts, counts, strict=True):
                    queue = _queue(own.device)
                    sums[queue] = sums[queue] + own if queue in sums else own

    def close(self) -> None:
        """Take in nothing more."""
        with self._lock:
            self._open = False


class CountedRun:
    """Stands for a program's function while counters are open; `plain` is that function."""

    def __init__(self, plain: Callable[..., Any], form: CountingForm) -> None:
        self.plain, self._form = plain, form
        # Replaced, never changed: a call keeps those it began with.
        self._counters: tuple[LoadCounter, ...] = ()

    def __call__(self, *inputs: Any) -> Any:
        """What `plain` returns. A call that raises counts nothing."""
        counters = self._counters
        outputs, counts = self._form(*inputs)
        for counter in counters:
            counter.add(counts)
        return outputs

    def opened(self, counter: LoadCounter) -> Callable[..., Any]:
        """What the program runs with one more counter."""
        self._counters = (*self._counters, counter)
        return self

    def closed(self, counter: LoadCounter) -> Callable[..., Any]:
        """What the program runs with one counter less."""
        counter.close()
        self._counters = tuple(c for c in self._counters if c is not counter)
        return self if self._counters else self.plain


def uncounted(run: Callable[..., Any]) -> Callable[..., Any]:
    """The function that a program runs when nobody counts."""
    return run.plain if isinstance(run, CountedRun) else run


def counted_layers(report: Report) -> tuple[LayerReport, ...]:
    """The layers of a program that can be counted: the fused ones. Raises InputError where an older version
    did not write down which op each of them is.
    """
    layers = tuple(layer for layer in report.layers if layer.fused)
    if not all(layer.op for layer in layers):
        raise InputError("this program is of a version that did not name its layers' ops: compile it again")
    return layers


def _layer_load(layer: LayerReport, counts: Sequence[Tensor]) -> LayerLoad:
    assert layer.spec is not None
    total = [0] * (1 + layer.spec.experts.count)
    for each in counts:
        if each.is_cuda:
            torch.cuda.synchronize(each.device)  # it may be of another stream than this thread's
        total = [a + b for a, b in zip(total, each.tolist(), strict=True)]
    dropped, *experts = total
    return LayerLoad(layer.name, layer.spec.top_k, tuple(experts), dropped)


def _queue(device: torch.device) -> object:
    """Where work on a device is in order: sums are kept for each stream, so that none waits for another."""
    return (device, torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else device
