"""A compiled program: callable as the model was, with its report, in memory or in a file."""

from __future__ import annotations

import io
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from dsmoe_compiler.inputs import CallSignature, Inputs
from dsmoe_compiler.ir.errors import InputError, LoadError
from dsmoe_compiler.outputs import Structure
from dsmoe_compiler.quiet import silenced
from dsmoe_compiler.report.report import Report
from dsmoe_compiler.runtime.lower import Backend, choose, lower
from dsmoe_compiler.runtime.straight_line import straight_line

_FORMAT = 1
_RECORD = "dsmoe.json"
_TRACES = ("stack_trace", "source_fn_stack", "torch_fn")
_OVERHEAD = 1.01  # of the weights' size: past this the graph's text is worth a second writing


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

    @cached_property
    def module(self) -> GraphModule:
        """The runnable form, its layers run by the backend."""
        return lower(self.exported, self.backend)

    @cached_property
    def _run(self) -> Callable[..., Any]:
        return straight_line(self.module)

    def with_report(self, report: Report) -> Program:
        """The same program telling another story; what was lowered stays lowered."""
        changed = replace(self, report=report)
        changed.__dict__.update({k: v for k, v in self.__dict__.items() if k in ("module", "inputs", "_run")})
        return changed

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one file, all or nothing. Raises InputError when the place cannot be
        written.
        """
        record = {
            "format": _FORMAT,
            "call": {**asdict(self.call), "defaults": dict(self.call.defaults)},
            "outputs": asdict(self.outputs),
            "report": json.loads(self.report.to_json()),
        }
        with written_whole(Path(path)) as partial, _as_stored(self.exported), silenced("torch.export"):
            writer = _Patient(partial)
            torch.export.save(self.exported, writer, extra_files={_RECORD: json.dumps(record)})  # type: ignore[arg-type]
            if writer.error is not None:
                raise writer.error
            if partial.seek(0, os.SEEK_END) > _OVERHEAD * weights_size(self.exported):
                _compress_texts(partial)


def load(path: str | os.PathLike[str], *, backend: str = "auto") -> Program:
    """A program saved by `Program.save`. Raises LoadError when the file is missing, damaged or another's."""
    path = Path(path)
    if not path.is_file():
        raise LoadError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}; give a saved program")
    try:
        record = _read_record(path)
        with silenced("torch.export"):
            exported = torch.export.load(path)
        call = record["call"]
        names, keywords = tuple(call["names"]), tuple(call["keywords"])
        signature = CallSignature(names, call["positional"], keywords, call["defaults"], call["exact"])
        outputs = Structure.from_json(record["outputs"])
        report = Report.from_json(json.dumps(record["report"]))
    except LoadError:
        raise
    except Exception as e:  # a damaged archive may fail anywhere in torch's reader
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise LoadError(f"{path}: cannot be read ({reason[:120]}); save it again") from e
    return Program(exported, signature, outputs, report, choose(backend, exported))


def _read_record(path: Path) -> dict[str, Any]:
    """What was saved beside the graph. Raises LoadError on a file that is damaged, another's or from the
    future.
    """
    if not zipfile.is_zipfile(path):
        raise LoadError(
            f"{path}: not a saved program, or a damaged one; `dsmoe compile MODEL -o {path.name}` saves one"
        )
    with zipfile.ZipFile(path) as archive:
        entry = next((name for name in archive.namelist() if name.endswith(f"/{_RECORD}")), None)
        if entry is None:
            raise LoadError(
                f"{path}: a zip file, but not a program saved by this package; compile its model instead"
            )
        if (bad := archive.testzip()) is not None:
            raise LoadError(f"{path}: damaged at {bad}; save it again")
        record: dict[str, Any] = json.loads(archive.read(entry))
    if record["format"] > _FORMAT:
        raise LoadError(
            f"{path}: written by a newer version (format {record['format']}); update this package"
        )
    return record


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name only when it is complete. Raises InputError when it cannot be
    written.
    """
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give a file name")
    try:
        handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as e:
        raise InputError(f"{path}: cannot be written ({e.strerror}); choose another place") from e
    try:
        with os.fdopen(handle, "w+b") as file:
            yield file
        os.chmod(partial, path.stat().st_mode if path.exists() else 0o666 & ~_umask())
        os.replace(partial, path)
    except OSError as e:
        raise InputError(f"{path}: cannot be written ({e.strerror}); choose another place") from e
    finally:
        Path(partial).unlink(missing_ok=True)


class _Patient:
    """A file whose errors wait: torch's archive writer ends the process when a write fails while it is
    torn down.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: BaseException | None = None

    def write(self, data: bytes) -> int:
        """Write, unless an earlier write failed."""
        if self.error is None:
            try:
                self._file.write(data)
            except BaseException as e:  # an interruption too
                self.error = e
        return len(data)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _compress_texts(file: BinaryIO) -> None:
    """Rewrite an archive with its texts deflated; tensors stay as they are, readable in place."""
    whole = io.BytesIO()
    file.seek(0)
    with zipfile.ZipFile(file) as stored, zipfile.ZipFile(whole, "w") as packed:
        for entry in stored.infolist():
            texts = entry.filename.endswith(".json")
            kind = zipfile.ZIP_DEFLATED if texts else zipfile.ZIP_STORED
            packed.writestr(entry.filename, stored.read(entry), compress_type=kind)
    file.seek(0)
    file.truncate()
    file.write(whole.getbuffer())


@contextmanager
def _as_stored(exported: ExportedProgram) -> Iterator[None]:
    """While open, the program holds neither its example (the user's data) nor stack traces (the user's
    folders).
    """
    example = exported.example_inputs
    traces = []
    for part in exported.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, GraphModule) else ():
            traces.append((node, {key: node.meta.pop(key) for key in _TRACES if key in node.meta}))
    exported.example_inputs = None
    try:
        yield
    finally:
        exported.example_inputs = example
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


def weights_size(exported: ExportedProgram) -> int:
    """Bytes of the program's tensors, shared ones once."""
    tensors = [
        t
        for t in (*exported.state_dict.values(), *exported.constants.values())
        if isinstance(t, torch.Tensor)
    ]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
