"""How long each kernel of a call takes, by torch's profiler: where the time over the floor goes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_clock import Call


def kernel_times(calls: Sequence[Call], device: torch.device) -> dict[str, float]:
    """Microseconds of a call in each kernel, by its name, in the order of their first launches: the mean over
    the calls. Empty without a GPU, or where the profiler sees nothing of it.
    """
    if device.type != "cuda":
        return {}
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        for call in calls:
            call()
        torch.cuda.synchronize()
    kernels = [e for e in seen.events() or () if e.device_type.name == "CUDA"]
    total: dict[str, float] = defaultdict(float)
    for event in sorted(kernels, key=lambda e: e.time_range.start):
        total[event.name] += event.time_range.elapsed_us() / len(calls)
    return dict(total)
