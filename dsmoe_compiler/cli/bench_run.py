"""The candidates of a benchmark, measured on one workload after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dsmoe_compiler.cli.bench_answers import Difference, difference, rounding_of
from dsmoe_compiler.cli.bench_inputs import Workload
from dsmoe_compiler.cli.bench_options import Options
from dsmoe_compiler.cli.bench_table import EAGER, OURS, TORCH_COMPILE, Measurement
from dsmoe_compiler.cli.bench_torch_compile import torch_compiled
from dsmoe_compiler.cli.measure import interleaved
from dsmoe_compiler.cli.model_argument import device_of
from dsmoe_compiler.cli.stages import Stage
from dsmoe_compiler.ir.errors import InputError, ShapeError

MOST_ROUNDS = 200
Run = Callable[..., Any]


class Runner:
    """A model and its compiled program on this machine. `torch_seconds` is what torch.compile has taken so
    far, `notes` what was left out, and why.
    """

    def __init__(self, text: str, model: Run, program: Run, options: Options, stage: Stage) -> None:
        self._text, self._model, self._program = text, model, program
        self._options, self._stage = options, stage
        self._torch_compile = options.torch_compile
        self.torch_seconds = 0.0
        self.notes: list[str] = []

    def measured(self, load: Workload) -> Measurement | None:
        """The candidates on these inputs, all answers compared with eager's first.

        None, with a note, where the model takes no inputs of that length. Raises InputError where that is
        what the user asked for, or it fails on its example.
        """
        try:
            self._require_taken(load)
        except InputError as e:
            if self._options.tokens or load.tokens is None:
                raise
            self.notes.append(f"{load.where} is left out: {e}")
            return None
        candidates = {EAGER: self._model, **self._compiled_by_torch(load), OURS: self._program}
        self._stage(f"compare answers, {load.where}")
        found = {name: self._difference(run, load) for name, run in candidates.items() if name != EAGER}
        wrong = {name: each.wrong for name, each in found.items() if each.wrong}
        right = {name: run for name, run in candidates.items() if name not in wrong}
        self._stage(f"measure {load.where}")
        rounds = interleaved(
            {name: self._turns(run, place, load) for place, (name, run) in enumerate(right.items())},
            self._options.rounds or MOST_ROUNDS,
            budget_seconds=None if self._options.rounds else self._options.seconds,
        )
        return Measurement(
            load.label,
            load.shape,
            load.tokens,
            milliseconds={name: 1e3 * rounds.median(name) for name in right},
            times_faster={name: rounds.ratio(name, OURS) for name in right if OURS in right and name != OURS},
            errors={name: each.error for name, each in found.items()},
            wrong=wrong,
            rounds=rounds.kept,
            discarded=rounds.discarded,
        )

    def _require_taken(self, load: Workload) -> None:
        """Raises InputError unless model and program take inputs of this shape."""
        args, kwargs = load.calls[0]
        self._stage(f"call, {load.where}")
        try:
            self._model(*args, **kwargs)
        except Exception as e:  # the user's code raises whatever it likes
            reason = next(iter(str(e).splitlines()), "") or type(e).__name__
            raise InputError(f"{self._text} itself fails on inputs of {list(load.shape)}: {reason}") from e
        try:
            self._program(*args, **kwargs)
        except ShapeError as e:
            raise InputError(f"{self._text}, compiled, takes no inputs of {list(load.shape)}: {e}") from e

    def _compiled_by_torch(self, load: Workload) -> dict[str, Run]:
        """torch.compile's candidate for these inputs; none, with a note, after it has failed once."""
        if not self._torch_compile:
            return {}
        self._stage(f"torch.compile, {load.where}")
        compiled = torch_compiled(self._model, load.calls, self._options.compile_limit)
        self.torch_seconds += compiled.seconds
        if compiled.run is None:
            self._torch_compile = False
            self.notes.append(f"torch.compile is left out from {load.where} on: {compiled.why}")
            return {}
        return {TORCH_COMPILE: compiled.run}

    def _difference(self, run: Run, load: Workload) -> Difference:
        answers = ((run(*args, **kwargs), self._model(*args, **kwargs)) for args, kwargs in load.calls)
        return difference(answers, rounding_of(self._model))

    def _turns(self, run: Run, place: int, load: Workload) -> Callable[[int], None]:
        """A candidate on another input each round, and not on the one that another candidate has just had."""
        waits = device_of(self._model) != "cpu"

        def turn(i: int) -> None:
            args, kwargs = load.calls[(i + place) % len(load.calls)]
            run(*args, **kwargs)
            if waits:
                torch.accelerator.synchronize()

        return turn
