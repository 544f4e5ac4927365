"""Interrupt compiles of one process at random moments, and look at what each leaves behind.

    python -m tests.interrupted_process MODEL ROUNDS SEED FOLDER

Ctrl-C is a real SIGINT, sent by another thread: first at the beginning of capture, then in one stage after
the other, capture every second time, after a random part of the time that the stage usually takes. Prints one
JSON object a round: when, in which stage, how long until the exception arrived, and everything that is not as
before.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dsmoe_compiler as dsmoe
from tests.process_state import differences, process_state
from tests.tiny_models import Experts, SeparateExperts, tiny, tokens

MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "layer": (Experts, lambda: torch.randn(5, 16, generator=torch.Generator().manual_seed(1))),
    "loop": (SeparateExperts, lambda: torch.randn(5, 16, generator=torch.Generator().manual_seed(1))),
    "zoo": (tiny, lambda: tokens(2, 5)),
}


class _Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + x  # type: ignore[no-any-return]


class _Round:
    """One model, what it gave before, and a folder that stays empty."""

    def __init__(self, name: str, folder: Path) -> None:
        build, example = MODELS[name]
        self.model, self.x, self.folder = build(), example(), folder
        self.plain, self.stage, self.target = _Plain(), "", ""
        self.began = dict[str, float]()
        self.timer = threading.Timer(0, _press)
        self.before = self.seen()  # also warms up what torch sets up on its first use
        self.before = self.seen()

    def work(self) -> dsmoe.Program:
        """What is interrupted."""
        program = dsmoe.compile(self.model, (self.x,), progress=self._at)
        self._at("save")
        program.save(self.folder / "p.pt2")
        self._at("end")
        return program

    def _at(self, stage: str) -> None:
        self.stage, self.began[stage] = stage, time.perf_counter()
        if stage == self.target:
            self.timer.start()

    def seen(self) -> dict[str, Any]:
        """All that must be as it was."""
        x = torch.ones(3, 4)
        exported = torch.export.export(self.plain, (x,))
        modules = list(self.model.modules())
        with torch.no_grad():
            outputs = [self.model(self.x), self.plain(x), exported.module()(x)]
        return {
            "outputs": [t.tolist() for t in outputs],
            "graph": str(exported.graph),
            "attributes": [{k: id(v) for k, v in vars(m).items()} for m in modules],
            "members": [[*m._parameters, *m._buffers, *m._modules] for m in modules],
            "tensors": [(id(p), p.data_ptr(), p.requires_grad, p.is_leaf) for p in self.model.parameters()],
            "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules],
            "training": [m.training for m in modules],
            **process_state(),
        }

    def interrupted(self, stage: str, delay: float) -> dict[str, Any]:
        """Interrupt `work` so many seconds after a stage begins."""
        sent, reached = [0.0], False

        def send() -> None:
            sent[0] = time.perf_counter()
            _press()

        self.timer, self.target = threading.Timer(delay, send), stage
        try:
            self.work()
            self.timer.join()
            time.sleep(0.01)
        except KeyboardInterrupt:
            reached = True
        arrived, self.target = time.perf_counter(), ""
        files = sorted(p.name for p in self.folder.iterdir())
        (self.folder / "p.pt2").unlink(missing_ok=True)
        return {
            "aimed at": stage,
            "stage": self.stage,
            "waited": round(arrived - sent[0], 3),
            "reached": reached,
            "left behind": {k: repr(v)[:300] for k, v in differences(self.before, self.seen()).items()},
            "files": [name for name in files if name != "p.pt2"],
        }


def _press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def main(name: str, rounds: str, seed: str, folder: str) -> None:
    """See above."""
    each, generator = _Round(name, Path(folder)), random.Random(int(seed))
    each.work()
    expected = each.work()(each.x)
    (each.folder / "p.pt2").unlink()
    each.before = each.seen()  # the first compile has packed separate experts: their memory has moved
    begins = list(each.began.items())
    usual = {stage: end - begin for (stage, begin), (_, end) in pairwise(begins)}
    others = cycle(stage for stage in usual if stage != "capture")
    print(json.dumps(each.interrupted("capture", 0)), flush=True)
    for i in range(1, int(rounds)):
        stage = next(others) if i % 2 else "capture"
        print(json.dumps(each.interrupted(stage, generator.uniform(0, usual[stage]))), flush=True)
    print(json.dumps({"afterwards": each.work()(each.x).equal(expected)}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
