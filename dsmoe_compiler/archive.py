"""The file of a saved program: named sections of bytes, each block of them with a digest.

    dsmoe program 2
    0000000000123456 0000000000000789 <SHA-256 of the index>
    …sections, each at a multiple of 64…
    {"record": [64, 1234, [<SHA-256 of every 8 MiB>]], …}        the index, and nothing after it

The first line never changes but for the number, so that any version can tell which one wrote a file. Nothing
is believed before its digest was compared, and what was compared is what is used: every byte is read once,
into memory of ours, so that a file that changes while it is read is found damaged. What lies between sections
has no meaning.
"""

from __future__ import annotations

import json
import os
import re
import stat
import threading
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

from dsmoe_compiler.interrupt import poll
from dsmoe_compiler.ir.errors import LoadError

FORMAT = 2
_BLOCK = 8 << 20  # bytes with one digest: small against memory, large against the cost of a call
_ALIGNED = 64
_FIRST = re.compile(rb"dsmoe program (\d{1,9})\n")
_SECOND = re.compile(rb"(\d{16}) (\d{16}) ([0-9a-f]{64})\n")
_SECOND_SIZE = 16 + 1 + 16 + 1 + 64 + 1
_THREADS = min(4, os.cpu_count() or 1)  # one reads, the others digest: more only wait for memory
_OLDEST_RECORD = "dsmoe.json"  # in the zip files of format 1

Section = tuple[int, int, list[str]]


def write(file: BinaryIO, sections: Iterable[tuple[str, Iterable[memoryview]]]) -> None:
    """Write sections, each of them given in pieces, in order; a name stands once."""
    index = dict[str, Section]()
    first = f"dsmoe program {FORMAT}\n".encode()
    file.write(first + bytes(_SECOND_SIZE))
    for name, pieces in sections:
        file.write(bytes(-file.tell() % _ALIGNED))
        start, digests = file.tell(), list[str]()
        for block in _blocks(pieces):
            poll()
            copy = bytes(block)  # what is digested is what is written, whoever trains the model meanwhile
            digests.append(sha256(copy).hexdigest())
            file.write(copy)
        index[name] = (start, file.tell() - start, digests)
    start, text = file.tell(), json.dumps(index, separators=(",", ":")).encode()
    file.write(text)
    file.seek(len(first))
    file.write(f"{start:016} {len(text):016} {sha256(text).hexdigest()}\n".encode())


def _blocks(pieces: Iterable[memoryview]) -> Iterator[memoryview]:
    """Every piece but the last of a section is a multiple of the block."""
    for piece in pieces:
        for start in range(0, len(piece), _BLOCK):
            yield piece[start : start + _BLOCK]


@contextmanager
def opened(path: Path) -> Iterator[Archive]:
    """The archive at `path`. Raises LoadError, naming it, for anything that is none or is damaged."""
    try:
        # Opening a pipe would wait for somebody to write into it.
        with open(path, "rb", opener=lambda p, f: os.open(p, f | getattr(os, "O_NONBLOCK", 0))) as file:
            kind = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(kind):
                raise LoadError(f"{path}: is no ordinary file; give a saved program")
            yield Archive(path, file, _index(path, file))
    except FileNotFoundError as e:
        raise LoadError(f"{path}: no such file; give a saved program") from e
    except IsADirectoryError as e:
        raise LoadError(f"{path}: is a folder; give a saved program") from e
    except (OSError, ValueError) as e:
        reason = (e.strerror if isinstance(e, OSError) else None) or str(e)
        raise LoadError(f"{path}: cannot be read ({reason})") from e


class Archive:
    """An archive open for reading."""

    def __init__(self, path: Path, file: BinaryIO, index: Mapping[str, Section]) -> None:
        self._path, self._file, self._index = path, file, index
        self._reading = threading.Lock()

    def size(self, name: str) -> int:
        """Bytes of a section."""
        if name not in self._index:
            raise LoadError(f"{self._path}: damaged at {name}; save it again")
        return self._index[name][1]

    def read(self, name: str) -> bytes:
        """A section's content. Raises LoadError when it is not what was written."""
        content = bytearray(self.size(name))
        self.fill([(name, memoryview(content))])
        return bytes(content)

    def fill(self, targets: Iterable[tuple[str, memoryview]]) -> None:
        """Read sections into memory of their sizes. Raises LoadError when they are not what was written."""
        blocks = [
            (name, offset + i * _BLOCK, target[i * _BLOCK : (i + 1) * _BLOCK], digest)
            for name, target in targets
            for offset, _, digests in (self._index[name],)
            for i, digest in enumerate(digests)
        ]
        # One reads while another computes digests: either leaves Python to others meanwhile.
        with ThreadPoolExecutor(_THREADS) as pool:
            try:
                for done in [pool.submit(self._check, batch) for batch in _batches(blocks)]:
                    done.result()
                    poll()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _check(self, batch: list[tuple[str, int, memoryview, str]]) -> None:
        for name, offset, target, digest in batch:
            with self._reading:
                self._file.seek(offset)
                complete = self._file.readinto(target) == len(target)  # type: ignore[attr-defined]
            if not complete or sha256(target).hexdigest() != digest:
                raise LoadError(f"{self._path}: damaged at {name}; save it again")


def _batches(
    blocks: list[tuple[str, int, memoryview, str]],
) -> Iterator[list[tuple[str, int, memoryview, str]]]:
    """Small blocks together: a task of a pool costs as much as reading 100 kB."""
    batch, size = list[tuple[str, int, memoryview, str]](), 0
    for block in blocks:
        batch.append(block)
        size += len(block[2])
        if size >= _BLOCK:
            yield batch
            batch, size = [], 0
    yield batch


def _index(path: Path, file: BinaryIO) -> dict[str, Section]:
    """The sections, once the file's own lines and the index are proven whole."""
    first = _FIRST.fullmatch(file.readline(64))
    if first is None:
        raise LoadError(f"{path}: {_stranger(path, file)}")
    if int(first[1]) != FORMAT:
        raise LoadError(f"{path}: {_other_format(int(first[1]))}")
    second, end = _SECOND.fullmatch(file.read(_SECOND_SIZE)), file.seek(0, os.SEEK_END)
    if second is None or int(second[1]) + int(second[2]) != end:
        raise LoadError(f"{path}: damaged, or cut off; save it again")
    file.seek(int(second[1]))
    text = file.read(int(second[2]))
    if sha256(text).hexdigest().encode() != second[3]:
        raise LoadError(f"{path}: damaged at its index; save it again")
    return {name: (start, size, digests) for name, (start, size, digests) in json.loads(text).items()}


def _other_format(number: int) -> str:
    if number > FORMAT:
        return f"written by a newer version (format {number}); update this package"
    return f"written by an older version (format {number}) that kept no digests; compile and save it again"


def _stranger(path: Path, file: BinaryIO) -> str:
    """What a file is that does not begin as ours do."""
    if not zipfile.is_zipfile(file):
        return f"not a saved program, or a damaged one; `dsmoe compile MODEL -o {path.name}` saves one"
    try:
        with zipfile.ZipFile(file) as archive:
            for name in archive.namelist():
                if name.endswith(f"/{_OLDEST_RECORD}"):
                    with archive.open(name) as record:
                        found = re.match(rb'{"format": (\d{1,9})', record.read(32))
                    return _other_format(int(found[1]) if found else 1)
    except Exception as e:  # Python's reader raises whatever damaged directories lead to
        return f"a damaged zip file ({type(e).__name__}); save it again"
    return "a zip file, but not a program saved by this package; compile its model instead"
