"""The two graphs of `dsmoe diff`: each an `.onnx` file, a `.pt2` file, or a model that is captured."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dsmoe_compiler.cli.input_option import ExampleInput
from dsmoe_compiler.cli.model_argument import is_saved_program, resolve
from dsmoe_compiler.cli.stages import Stage, load_modules
from dsmoe_compiler.graph_diff.facts import GraphFacts

if TYPE_CHECKING:
    from dsmoe_compiler.instrument import PassRun
    from dsmoe_compiler.ir.graph import ProgramGraph
    from dsmoe_compiler.ir.passes import Pass


@dataclass(frozen=True)
class Sides:
    """What is compared, and what the user should be told of how it came to be."""

    a: GraphFacts
    b: GraphFacts
    notes: tuple[str, ...]


def is_onnx(text: str) -> bool:
    """Whether an argument names an `.onnx` file."""
    return text.lower().endswith(".onnx") and not text.startswith("hf:")


def sides(first: str, second: str | None, inputs: tuple[ExampleInput, ...], stage: Stage) -> Sides:
    """Read both; without a second, what the passes make of the first. Raises InputError where one is not what
    the user believes, UsageError where there is nothing to compare with.
    """
    given = [text for text in (first, second) if text is not None]
    if inputs and all(map(_is_file, given)):
        raise click.UsageError("--input is for a MODEL, and there is none: files are not captured again.")
    if second is None:
        if _is_file(first):
            raise click.UsageError(f"give a second graph to compare {first} with.")
        return _before_and_after(first, inputs, stage)
    a, b = (_side(text, inputs, stage) for text in (first, second))
    return Sides(a.a, b.a, tuple(dict.fromkeys((*a.notes, *b.notes))))


def _is_file(text: str) -> bool:
    return is_onnx(text) or is_saved_program(text)


def _side(text: str, inputs: tuple[ExampleInput, ...], stage: Stage) -> Sides:
    """One argument's graph, as `a`."""
    if is_onnx(text):
        from dsmoe_compiler.graph_diff.onnx_file import onnx_facts

        stage(f"read {text}")
        facts = onnx_facts(Path(text))
        return Sides(facts, facts, facts.notes)
    if not is_saved_program(text):
        return _before_and_after(text, inputs, stage)
    load_modules(stage, "dsmoe_compiler.program")
    from dsmoe_compiler.graph_diff.program_facts import as_reported, program_facts
    from dsmoe_compiler.ir.graph import ProgramGraph
    from dsmoe_compiler.program import load

    stage(f"load {text}")
    program = load(Path(text), backend="reference")  # which every machine has, and nothing is run
    layers, size = as_reported(program.report.layers), Path(text).stat().st_size
    facts = program_facts(text, "compiled program", ProgramGraph(program.exported), layers, size)
    return Sides(facts, facts, ())


def _before_and_after(text: str, inputs: tuple[ExampleInput, ...], stage: Stage) -> Sides:
    """A model's graph as captured, and as the default pipeline leaves it."""
    load_modules(stage, "dsmoe_compiler.api")
    from dsmoe_compiler import api
    from dsmoe_compiler.graph_diff.layers import in_order
    from dsmoe_compiler.graph_diff.program_facts import as_reported, as_written, program_facts

    stage(f"build {text}")
    call, captured = resolve(text, inputs, with_weights=False), _Captured(text)
    done = api.optimize(
        call.model, call.args, call.kwargs, verify="off", progress=stage, instruments=(captured,)
    )
    layers = done.report.layers
    (before,) = captured.facts
    before = replace(before, layers=in_order(as_written(layers)))
    after = program_facts(text, "after the passes", done.graph, as_reported(layers))
    return Sides(before, after, call.notes)


@dataclass
class _Captured:
    """An instrument that keeps what is known of the graph before the first pass."""

    source: str
    facts: list[GraphFacts] = field(default_factory=list)

    def before(self, step: Pass, graph: ProgramGraph) -> None:
        """As Instrument.before."""
        from dsmoe_compiler.graph_diff.program_facts import program_facts

        if not self.facts:
            self.facts.append(program_facts(self.source, "captured graph", graph))

    def after(self, step: Pass, graph: ProgramGraph, run: PassRun) -> None:
        """As Instrument.after."""
