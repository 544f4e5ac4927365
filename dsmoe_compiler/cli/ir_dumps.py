"""The graph as text, before and after passes: on stderr, or a file a dump."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from dsmoe_compiler.cli.output_file import write_text
from dsmoe_compiler.instrument import PassRun
from dsmoe_compiler.ir.errors import InputError
from dsmoe_compiler.ir.graph import ProgramGraph, module_path
from dsmoe_compiler.ir.passes import Pass
from dsmoe_compiler.ir.printer import print_graph
from dsmoe_compiler.nearest import unknown


@dataclass(frozen=True)
class Moments:
    """When to print: before and after passes by name, and after every pass, or only those that changed the
    graph.
    """

    before: frozenset[str]
    after: frozenset[str]
    after_all: bool
    after_change: bool

    def __bool__(self) -> bool:
        return bool(self.before or self.after or self.after_all or self.after_change)

    @property
    def names(self) -> frozenset[str]:
        """The passes named."""
        return self.before | self.after

    def is_after(self, step: str, changed: bool) -> bool:
        """Whether to print after this pass."""
        wanted = self.after_all and not self.after_change
        return wanted or step in self.after or (self.after_change and changed)


class Dump(Protocol):
    """Takes one printed graph: "before" or "after", the pass, the text with its banner."""

    def __call__(self, moment: str, step: str, text: str) -> None: ...


@dataclass
class IRDumps:
    """An instrument that prints the graph at the moments asked for."""

    moments: Moments
    show: Callable[[ProgramGraph], str]
    dump: Dump
    _before: str = field(default="", init=False)

    def before(self, step: Pass, graph: ProgramGraph) -> None:
        """As Instrument.before."""
        if self.moments.after_change:
            self._before = print_graph(graph)
        if step.name in self.moments.before:
            self._print("before", step.name, graph)

    def after(self, step: Pass, graph: ProgramGraph, run: PassRun) -> None:
        """As Instrument.after. A rewrite that was taken back changed nothing, so the texts are compared."""
        changed = self.moments.after_change and print_graph(graph) != self._before
        if self.moments.is_after(step.name, changed):
            self._print("after", step.name, graph)

    def _print(self, moment: str, step: str, graph: ProgramGraph) -> None:
        banner = f"# -----// IR Dump {moment.capitalize()} {step} //----- #"
        self.dump(moment, step, f"{banner}\n{self.show(graph)}")


@dataclass
class DumpFolder:
    """One file a dump, numbered in order: `00_after_normalize.txt`."""

    folder: Path
    _count: int = field(default=0, init=False)

    def __call__(self, moment: str, step: str, text: str) -> None:
        """Write one. Raises InputError when that fails."""
        write_text(self.folder / f"{self._count:02}_{moment}_{step}.txt", text)
        self._count += 1


def shower(layer: str | None) -> Callable[[ProgramGraph], str]:
    """How to print a graph: all of it, or one module's values, numbered as in the whole."""
    if layer is None:
        return lambda graph: print_graph(graph, modules=True)
    wanted = tuple(layer.split("."))

    def show(graph: ProgramGraph) -> str:
        inside = [node for node in graph.nodes if module_path(node)[: len(wanted)] == wanted]
        return print_graph(graph, inside, modules=True)

    return show


@dataclass
class ModuleCheck:
    """An instrument that wants the first graph it sees to have values of a module; of any for None."""

    layer: str | None
    _done: bool = field(default=False, init=False)

    def __call__(self, graph: ProgramGraph) -> None:
        """Raises InputError, with the nearest names, when the first graph has none."""
        if self._done or self.layer is None:
            return
        paths = {module_path(node) for node in graph.nodes}
        known = sorted({".".join(path[:end]) for path in paths for end in range(1, len(path) + 1)})
        if self.layer not in known:
            raise InputError(f"--layer: {unknown('module', self.layer, known)}")
        self._done = True

    def before(self, step: Pass, graph: ProgramGraph) -> None:
        """As Instrument.before."""
        self(graph)

    def after(self, step: Pass, graph: ProgramGraph, run: PassRun) -> None:
        """As Instrument.after."""
