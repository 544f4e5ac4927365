"""A compiled program: callable as the model was, with its report, in memory or in a file."""

from __future__ import annotations

import io
import json
import os
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule

from dsmoe_compiler.inputs import CallSignature, Inputs
from dsmoe_compiler.ir.errors import InputError, LoadError
from dsmoe_compiler.report.report import Report
from dsmoe_compiler.runtime.lower import Backend, choose, lower

_FORMAT = 1
_RECORD = "dsmoe.json"
_OVERHEAD = 1.01  # of the weights' size: past this the graph's text is worth a second writing


@dataclass(frozen=True)
class Program:
    """A model after compilation. It aliases the model's parameters: training or loading one shows in the other.

    `exported` holds the optimised graph with its `dsmoe::` ops, `report` what was found and done.
    """

    exported: ExportedProgram
    call: CallSignature
    report: Report
    backend: Backend

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What model(*args, **kwargs) returns. Raises ShapeError or InputError where the inputs do not fit."""
        bound_args, bound_kwargs = self.inputs.bind(args, kwargs)
        return self.module(*bound_args, **bound_kwargs)

    @cached_property
    def inputs(self) -> Inputs:
        """What the program may be called with."""
        return Inputs(self.exported, self.call)

    @cached_property
    def module(self) -> GraphModule:
        """The runnable form, its layers run by the backend."""
        return lower(self.exported, self.backend)

    def with_report(self, report: Report) -> Program:
        """The same program telling another story; what was lowered stays lowered."""
        changed = replace(self, report=report)
        changed.__dict__.update({k: v for k, v in self.__dict__.items() if k in ("module", "inputs")})
        return changed

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one file, all or nothing. Raises InputError when the place cannot be written."""
        record = {
            "format": _FORMAT,
            "call": {**asdict(self.call), "defaults": dict(self.call.defaults)},
            "report": json.loads(self.report.to_json()),
        }
        with written_whole(Path(path)) as partial, without_traces(self.exported):
            torch.export.save(self.exported, partial, extra_files={_RECORD: json.dumps(record)})
            if partial.seek(0, os.SEEK_END) > _OVERHEAD * weights_size(self.exported):
                _compress_texts(partial)


def load(path: str | os.PathLike[str], *, backend: str = "auto") -> Program:
    """A program saved by `Program.save`. Raises LoadError when the file is missing, damaged or another's."""
    path = Path(path)
    if not path.is_file():
        raise LoadError(f"{path}: no such file")
    if not zipfile.is_zipfile(path):
        raise LoadError(f"{path}: not a saved program (or a damaged one); save one with `dsmoe compile MODEL -o {path.name}`")
    extra = {_RECORD: ""}
    try:
        with zipfile.ZipFile(path) as archive:
            if not any(name.endswith(_RECORD) for name in archive.namelist()):
                raise LoadError(f"{path}: a .pt2 file, but not one saved by this package; compile its model instead")
            if (bad := archive.testzip()) is not None:
                raise LoadError(f"{path}: damaged at {bad}; save it again")
        exported = torch.export.load(path, extra_files=extra)
        record = json.loads(extra[_RECORD])
        if record["format"] > _FORMAT:
            raise LoadError(f"{path}: written by a newer version (format {record['format']}); update this package")
        call = record["call"]
        signature = CallSignature(tuple(call["names"]), call["positional"], tuple(call["keywords"]), call["defaults"])
        report = Report.from_json(json.dumps(record["report"]))
    except LoadError:
        raise
    except Exception as e:  # a damaged archive may fail anywhere in torch's reader
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise LoadError(f"{path}: cannot be read ({reason[:120]}); save it again") from e
    return Program(exported, signature, report, choose(backend, exported))


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name only when it is complete. Raises InputError when it cannot be written."""
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give a file name")
    try:
        handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as e:
        raise InputError(f"{path}: cannot be written ({e.strerror}); choose another place") from e
    try:
        with os.fdopen(handle, "w+b") as file:
            yield file
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


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
def without_traces(exported: ExportedProgram) -> Iterator[None]:
    """While open, the graph carries no stack traces: they name the user's folders and outweigh small models."""
    kept = []
    for node in exported.graph.nodes:
        kept.append((node, {k: node.meta.pop(k) for k in ("stack_trace", "source_fn_stack", "torch_fn") if k in node.meta}))
    try:
        yield
    finally:
        for node, traces in kept:
            node.meta.update(traces)


def weights_size(exported: ExportedProgram) -> int:
    """Bytes of the program's tensors, shared ones once."""
    tensors = [t for t in (*exported.state_dict.values(), *exported.constants.values()) if isinstance(t, torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
