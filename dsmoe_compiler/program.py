"""A compiled program: callable as the model was, with its report, in memory or in a file."""

from __future__ import annotations

import io
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._export.serde.serialize import SerializeError
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from dsmoe_compiler import archive
from dsmoe_compiler.atomic import written_whole
from dsmoe_compiler.inputs import CallSignature, Inputs
from dsmoe_compiler.interrupt import Deferred
from dsmoe_compiler.ir.errors import InputError, LoadError
from dsmoe_compiler.load_counter import CountedRun, LoadCounter, counted_layers, uncounted
from dsmoe_compiler.outputs import Structure
from dsmoe_compiler.quiet import silenced
from dsmoe_compiler.report.report import Report
from dsmoe_compiler.runtime.counting_form import counting_form
from dsmoe_compiler.runtime.lower import Backend, choose, lower
from dsmoe_compiler.runtime.native.library import describe
from dsmoe_compiler.runtime.straight_line import straight_line
from dsmoe_compiler.storages import Plan, content, memory, plain
from dsmoe_compiler.turns import TURN, turn

_TRACES = ("stack_trace", "source_fn_stack", "torch_fn")
_STATE, _CONSTANTS = "state:", "constant:"  # before a tensor's name, by where the program keeps it
_Built = TypeVar("_Built")
_SWAP = Lock()  # held while a program begins or ends to be counted


@dataclass(frozen=True)
class Program:
    """A model after compilation. It aliases the model's parameters: training or loading one shows in the
    other.

    `exported` holds the optimised graph with its `dsmoe::` ops, which returns a flat tuple; `outputs` says
    what that becomes, `report` what was found and done.
    """

    exported: ExportedProgram
    call: CallSignature
    outputs: Structure
    report: Report
    backend: Backend

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What model(*args, **kwargs) returns. Raises ShapeError or InputError where the inputs do not
        fit.
        """
        return self.outputs.build(self._run(*self.inputs.flat(args, kwargs)))

    @cached_property
    def inputs(self) -> Inputs:
        """What the program may be called with."""
        return Inputs(self.exported, self.call)

    @property
    def module(self) -> GraphModule:
        """The runnable form, its layers run by the backend."""
        return self._built("_module", lambda: lower(self.exported, self.backend))

    def prepare(self) -> None:
        """Do now what the first call would do."""
        _ = self._run

    @property
    def _run(self) -> Callable[..., Any]:
        return self._built("_function", lambda: straight_line(self.module))

    def _built(self, name: str, build: Callable[[], _Built]) -> _Built:
        """What `build` makes, once; not while another thread traces, which changes what modules do."""
        if name not in self.__dict__:
            with TURN, Deferred():
                if name not in self.__dict__:
                    self.__dict__[name] = build()
        built: _Built = self.__dict__[name]
        return built

    def with_report(self, report: Report) -> Program:
        """The same program telling another story; what was lowered stays lowered."""
        changed = replace(self, report=report)
        changed.__dict__.update({k: v for k, v in self.__dict__.items() if k in ("_module", "inputs")})
        if "_function" in self.__dict__:
            changed.__dict__["_function"] = uncounted(self._run)
        return changed

    @contextmanager
    def count_load(self) -> Iterator[LoadCounter]:
        """While open, count how many tokens this program's calls give each expert of each fused layer.

        Calls count that begin and return meanwhile, in any thread; one that raises does not. Several may be
        open at once. Their outputs are the same, bit for bit. Where nothing is counted this costs nothing.

            with program.count_load() as load:
                program(input_ids)
            load.save("load.json")
            print(load)

        Raises InputError for a program that was saved before its layers could be counted.
        """
        counter = LoadCounter(self.report)
        counted = self._built("_counted", self._counted_run)
        try:
            with Deferred(), _SWAP:
                self.__dict__["_function"] = counted.opened(counter)
            yield counter
        finally:
            with Deferred(), _SWAP:
                self.__dict__["_function"] = counted.closed(counter)

    def _counted_run(self) -> CountedRun:
        names = [layer.op for layer in counted_layers(self.report)]
        return CountedRun(uncounted(self._run), counting_form(self.module, self.exported, names))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one file, all or nothing. Raises InputError when the place cannot be
        written, or something in the graph.
        """
        with Deferred(), written_whole(Path(path)) as file:
            tensors = _tensors(self.exported)
            plan, storages = Plan.of(tensors)
            record = {
                "torch": str(torch.__version__),
                "call": {**asdict(self.call), "defaults": dict(self.call.defaults)},
                "outputs": asdict(self.outputs),
                "report": json.loads(replace(self.report, kernels="").to_json()),  # those are a machine's
                "weights": asdict(plan),
            }
            texts = {"record": json.dumps(record).encode(), "graph": _graph(self.exported, tensors)}
            spans = enumerate(zip(plan.spans, storages, strict=True))
            archive.write(
                file,
                [
                    *((name, [memoryview(zlib.compress(text))]) for name, text in texts.items()),
                    *((f"weights {i}", content(span, storage)) for i, (span, storage) in spans),
                ],
            )


def load(path: str | os.PathLike[str], *, backend: str = "auto") -> Program:
    """A program saved by `Program.save`. Raises LoadError when the file is missing, damaged or another's."""
    path = Path(path)
    with Deferred(), archive.opened(path) as file:
        writer = "of another version"
        try:
            record = json.loads(zlib.decompress(file.read("record")))
            writer = record["torch"]
            exported = _exported(zlib.decompress(file.read("graph")))
            plan = Plan.from_json(record["weights"])
            spans = [torch.empty(span.size, dtype=torch.uint8) for span in plan.spans]
            file.fill((f"weights {i}", memory(t)) for i, t in enumerate(spans))
            _fill(exported, plan.tensors(spans))
            call = record["call"]
            names, keywords = tuple(call["names"]), tuple(call["keywords"])
            signature = CallSignature(names, call["positional"], keywords, call["defaults"], call["exact"])
            outputs = Structure.from_json(record["outputs"])
            report = Report.from_json(json.dumps(record["report"]))
        except LoadError:
            raise
        except Exception as e:  # whole, but made with another version of torch or for another machine
            reason = (str(e).splitlines() or [type(e).__name__])[0][:120]
            versions = f"written with torch {writer}, this is torch {torch.__version__}"
            raise LoadError(f"{path}: cannot be read here: {reason} ({versions}); save it again") from e
        chosen = choose(backend, exported)
        # Its layers are run by what is here, not where it was saved.
        kernels = describe() if chosen == "cpu" else ""
        report = replace(report, backend=chosen, kernels=kernels)
        return Program(exported, signature, outputs, report, chosen)


def _tensors(exported: ExportedProgram) -> dict[str, Tensor]:
    """The tensors that are written by us; the others (subclasses, quantised ones) are torch's to write."""
    kept = ((_STATE, exported.state_dict), (_CONSTANTS, exported.constants))
    return {where + name: t for where, values in kept for name, t in values.items() if plain(t)}


def _graph(exported: ExportedProgram, tensors: Iterable[str]) -> bytes:
    """torch's own archive of the program, without the tensors named."""
    small, buffer = copy(exported), io.BytesIO()
    small._state_dict = _emptied(exported.state_dict, _STATE, tensors)
    small._constants = _emptied(exported.constants, _CONSTANTS, tensors)
    small._example_inputs = None  # the user's data
    with turn(), _without_traces(exported), silenced("torch.export"):
        try:
            torch.export.save(small, buffer)
        except SerializeError as e:
            why = str(e).splitlines()[0][:200]
            raise InputError(f"the program cannot be saved, torch cannot write it: {why}") from e
    return buffer.getvalue()


def _emptied(values: Mapping[str, Any], where: str, tensors: Iterable[str]) -> dict[str, Any]:
    left_out = set(tensors)
    return {name: _empty(v) if where + name in left_out else v for name, v in values.items()}


def _empty(t: Tensor) -> Tensor:
    empty = t.detach().new_empty(0)
    return torch.nn.Parameter(empty, t.requires_grad) if isinstance(t, torch.nn.Parameter) else empty


def _exported(graph: bytes) -> ExportedProgram:
    """The inverse of `_graph`, still without the tensors left out."""
    with turn(), silenced("torch.export"):
        return torch.export.load(io.BytesIO(graph))


def _fill(exported: ExportedProgram, tensors: Mapping[str, Tensor]) -> None:
    """Put the tensors where they were left out."""
    for name, tensor in tensors.items():
        values = exported.state_dict if name.startswith(_STATE) else exported.constants
        values[name.removeprefix(_STATE).removeprefix(_CONSTANTS)] = tensor


@contextmanager
def _without_traces(exported: ExportedProgram) -> Iterator[None]:
    """While open, the graph holds no stack traces (the user's folders)."""
    traces = []
    for part in exported.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, GraphModule) else ():
            traces.append((node, {key: node.meta.pop(key) for key in _TRACES if key in node.meta}))
    try:
        yield
    finally:
        for node, trace in traces:
            node.meta.update(trace)


def name_outputs(exported: ExportedProgram) -> None:
    """Have the signature name the values the graph returns now: a pass may have replaced what was
    returned.
    """
    (results,) = exported.graph.output_node().args
    assert isinstance(results, tuple)
    specs = exported.graph_signature.output_specs
    for i, (spec, value) in enumerate(zip(specs, results, strict=True)):
        if isinstance(value, Node) and getattr(spec.arg, "name", value.name) != value.name:
            specs[i] = replace(spec, arg=type(spec.arg)(name=value.name))
