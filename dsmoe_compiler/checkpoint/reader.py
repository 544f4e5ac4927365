"""Tensors out of files, each byte read once and straight into the memory where it stays."""

from __future__ import annotations

import contextlib
import math
from io import FileIO
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from dsmoe_compiler.checkpoint.errors import CheckpointError, damaged
from dsmoe_compiler.checkpoint.header import StoredTensor
from dsmoe_compiler.checkpoint.memory import writable_bytes
from dsmoe_compiler.checkpoint.sources import BlockScaled, Source
from dsmoe_compiler.interrupt import poll

_PIECE = 16 << 20  # bytes: the most that is read before a Ctrl-C is obeyed, and that a cast keeps aside


class Reader:
    """Reads tensors; enter it, for it keeps files open. No file is mapped: its pages would count as memory.

    `bytes_read` counts the bytes of tensors since it was made.
    """

    def __init__(self) -> None:
        self.bytes_read = 0
        self._files = dict[Path, FileIO]()
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.clear()
        self._open.close()

    def fill(self, destination: Tensor, source: Source) -> None:
        """Read a tensor into one of its shape, cast where dtypes differ.

        `destination` is contiguous memory of the CPU, a whole parameter or a part of a stacked one; what it
        holds after an error is undefined. Raises CheckpointError when a file is not what its header said.
        """
        if destination.shape != source.shape:
            raise ValueError(f"{list(source.shape)} does not go into {list(destination.shape)}")
        with torch.no_grad():
            if isinstance(source, BlockScaled):
                self._fill_scaled(destination, source)
            elif source.dtype is destination.dtype:
                self._read(writable_bytes(destination), source, 0)
            else:
                self._fill_cast(destination, source)

    def _fill_cast(self, destination: Tensor, source: StoredTensor) -> None:
        flat = destination.view(-1)
        aside = torch.empty(min(len(flat), _PIECE // source.dtype.itemsize), dtype=source.dtype)
        for begin in range(0, len(flat), max(1, len(aside))):
            piece = aside[: len(flat) - begin]
            self._read(writable_bytes(piece), source, begin * source.dtype.itemsize)
            flat[begin : begin + len(piece)].copy_(piece)

    def _fill_scaled(self, destination: Tensor, source: BlockScaled) -> None:
        """A row of blocks at a time: that much of float32 is kept aside, never a matrix."""
        *_, rows, columns = source.shape
        stack = math.prod(source.shape[:-2])
        scales_SIJ = torch.empty(source.scales.shape)
        self.fill(scales_SIJ, source.scales)
        down, across = scales_SIJ.shape[-2:]
        out_SRC, scales_SIJ = destination.view(stack, rows, columns), scales_SIJ.view(stack, down, across)
        height, width = source.block
        for s in range(stack):
            for i in range(down):
                out_rC = out_SRC[s, i * height : (i + 1) * height]
                values_rC = torch.empty(out_rC.shape, dtype=source.values.dtype)
                self._read(writable_bytes(values_rC), source.values, (s * rows + i * height) * columns)
                scale_C = scales_SIJ[s, i].repeat_interleave(width)[:columns]
                out_rC.copy_(values_rC.float() * scale_C)

    def _read(self, memory: memoryview, source: StoredTensor, offset: int) -> None:
        """The tensor's bytes from `offset` on, as many as fit."""
        try:
            file = self._file(source.file)
            file.seek(source.start + offset)
            done = 0
            while done < len(memory):
                poll()
                got = file.readinto(memory[done : done + _PIECE])
                if not got:
                    raise damaged(source.file, f"cut off within {source.name} while it was read")
                done += got
                self.bytes_read += got
        except OSError as e:
            raise CheckpointError(f"{source.file}: {source.name} cannot be read ({e.strerror or e})") from e

    def _file(self, path: Path) -> FileIO:
        if path not in self._files:
            file = open(path, "rb", buffering=0)  # noqa: SIM115  (closed with the reader)
            self._files[path] = self._open.enter_context(file)
        return self._files[path]
