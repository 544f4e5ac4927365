"""The file of a program: whatever befalls it, loading says so in one line or gives the very same program."""

import io
import os
import random
import re
import stat
import subprocess
import sys
import threading
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dsmoe_compiler as dsmoe
from dsmoe_compiler import archive
from tests.tiny_models import Experts, tiny, tokens

Saved = tuple[bytes, Tensor, Tensor]
HEADER = 16 + 99  # the first two lines


class _Deep(nn.Module):
    """A plain model with a size no section's block divides."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(37, 37) for _ in range(5)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).relu()  # type: ignore[no-any-return]


def _call(width: int) -> Tensor:
    return torch.randn(3, width, generator=torch.Generator().manual_seed(2))


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "zoo": (tiny, tokens(2, 3)),
    "layer": (Experts, _call(16)),
    "plain": (_Deep, _call(37)),
}


@pytest.fixture(scope="module", params=MODELS)
def saved(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[bytes, Tensor, Tensor]:
    """A file's bytes, an input, and the program's output for it."""
    build, x = MODELS[request.param]
    program = dsmoe.compile(build(), (x,), verify="off")
    path = tmp_path_factory.mktemp("archive") / "p.pt2"
    program.save(path)
    with torch.no_grad():
        return path.read_bytes(), x, program(x)


def _harmless(path: Path, content: bytes, x: Tensor, expected: Tensor) -> bool:
    """Whether the content loads and computes the same bits; any failure is a LoadError of one line."""
    path.write_bytes(content)
    try:
        program = dsmoe.load(path)
    except dsmoe.LoadError as e:
        assert str(e).startswith(f"{path}: ") and "\n" not in str(e)
        return False
    with torch.no_grad():
        assert program(x).equal(expected)
    return True


def test_an_untouched_file_loads(saved: Saved, tmp_path: Path) -> None:
    assert _harmless(tmp_path / "p.pt2", *saved)


def test_a_wrong_byte_anywhere(saved: Saved, tmp_path: Path) -> None:
    whole, x, expected = saved
    generator = random.Random(0)
    harmless = 0
    for _ in range(100):
        place, content = generator.randrange(len(whole)), bytearray(whole)
        content[place] ^= generator.randrange(1, 256)
        harmless += _harmless(tmp_path / "p.pt2", bytes(content), x, expected)
    assert harmless < 5, "only bytes between sections may be lost unnoticed"


def test_a_wrong_bit_in_every_byte_of_the_first_lines(saved: Saved, tmp_path: Path) -> None:
    whole, x, expected = saved
    for place in range(HEADER):
        content = bytearray(whole)
        content[place] ^= 1 << place % 8
        assert not _harmless(tmp_path / "p.pt2", bytes(content), x, expected)


def test_wrong_bytes_in_the_index(saved: Saved, tmp_path: Path) -> None:
    whole, x, expected = saved
    start = whole.rindex(b'{"record"')
    for place in range(start, len(whole), max(1, (len(whole) - start) // 50)):
        content = bytearray(whole)
        content[place] ^= 1
        assert not _harmless(tmp_path / "p.pt2", bytes(content), x, expected)


def test_a_file_cut_off(saved: Saved, tmp_path: Path) -> None:
    whole, x, expected = saved
    generator = random.Random(1)
    for length in (
        0,
        1,
        17,
        18,
        HEADER,
        len(whole) - 1,
        *(generator.randrange(len(whole)) for _ in range(30)),
    ):
        assert not _harmless(tmp_path / "p.pt2", whole[:length], x, expected)


def test_bytes_inserted_removed_and_appended(saved: Saved, tmp_path: Path) -> None:
    whole, x, expected = saved
    generator = random.Random(2)
    for _ in range(30):
        place, extra = generator.randrange(len(whole) + 1), generator.randbytes(generator.randrange(1, 100))
        assert not _harmless(tmp_path / "p.pt2", whole[:place] + extra + whole[place:], x, expected)
        assert not _harmless(tmp_path / "p.pt2", whole[:place] + whole[place + len(extra) :], x, expected)


def test_blocks_zeroed_and_moved(saved: Saved, tmp_path: Path) -> None:
    whole, x, expected = saved
    generator = random.Random(3)
    for _ in range(10):
        a, b = (generator.randrange(HEADER, len(whole) - 512) for _ in "ab")
        assert not _harmless(tmp_path / "p.pt2", whole[:a] + bytes(512) + whole[a + 512 :], x, expected)
        moved = bytearray(whole)
        moved[a : a + 512] = whole[b : b + 512]
        if moved != whole:
            assert not _harmless(tmp_path / "p.pt2", bytes(moved), x, expected)


def test_nothing_is_unpickled_or_parsed_before_it_is_verified(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph's section is damaged: torch, and even the decompressor, must not see it."""
    whole, _, _ = saved
    path = tmp_path / "p.pt2"
    path.write_bytes(whole)
    with archive.opened(path) as file:
        graph = whole.index(file.read("graph"))
    content = bytearray(whole)
    content[graph + 100] ^= 4
    path.write_bytes(content)
    monkeypatch.setattr(torch.export, "load", lambda *_: pytest.fail("torch read a damaged graph"))
    with pytest.raises(dsmoe.LoadError, match="damaged at graph; save it again"):
        dsmoe.load(path)


def test_a_program_replaced_while_it_is_loaded(tmp_path: Path) -> None:
    """By renaming: one of the two. By overwriting in place: one of the two, or an error, never a mixture."""
    path, contents, outputs, x = tmp_path / "p.pt2", list[bytes](), list[Tensor](), _call(64)
    for seed in range(2):
        torch.manual_seed(seed)
        program = dsmoe.compile(nn.Sequential(*(nn.Linear(64, 64) for _ in range(40))), (x,), verify="off")
        program.save(path)
        contents.append(path.read_bytes())
        outputs.append(program(x).detach())
    for in_place in (False, True):
        stop, loaded, refused = threading.Event(), 0, 0

        def disturb(in_place: bool = in_place, stop: threading.Event = stop) -> None:
            while not stop.is_set():
                for content in contents:
                    if in_place:
                        with path.open("r+b") as file:
                            file.write(content)
                            file.truncate()
                    else:
                        (tmp_path / "new").write_bytes(content)
                        os.replace(tmp_path / "new", path)

        thread = threading.Thread(target=disturb)
        thread.start()
        try:
            for _ in range(15):
                try:
                    found = dsmoe.load(path)(x).detach()
                except dsmoe.LoadError:
                    refused += 1
                else:
                    loaded += 1
                    assert any(found.equal(expected) for expected in outputs)
        finally:
            stop.set()
            thread.join()
        assert loaded == 15 or in_place


def _old_zip(record: bytes, size: int = 0) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("archive/archive_format", "pt2")
        file.writestr("archive/extra/dsmoe.json", record)
        file.writestr("archive/data", bytes(size))
    return buffer.getvalue()


def _torch_archive() -> bytes:
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), buffer)
    return buffer.getvalue()


def _torch_weights() -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(2)}, buffer)
    return buffer.getvalue()


STRANGERS: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "not a saved program"),
    "random": (lambda: random.Random(0).randbytes(5000), "not a saved program"),
    "text": (lambda: b"dsmoe program\n", "not a saved program"),
    "newer": (lambda: b"dsmoe program 3\n" + b"\0\xff" * 99, "newer version (format 3); update this package"),
    "much newer": (lambda: b"dsmoe program 1000\n", "newer version (format 1000)"),
    "older": (lambda: _old_zip(b'{"format": 1, "call": {}}'), "older version (format 1)"),
    "newer, as older ones were": (lambda: _old_zip(b'{"format": 9}'), "newer version (format 9)"),
    "another's .pt2": (_torch_archive, "a zip file, but not a program saved by this package"),
    "weights only": (_torch_weights, "a zip file, but not a program saved by this package"),
    "a zip without entries": (lambda: b"PK\5\6" + bytes(18), "a zip file, but not a program"),
    "a directory that lies": (lambda: b"PK\5\6" + b"\xff" * 16 + bytes(2), "zip file"),
}


@pytest.mark.parametrize("kind", STRANGERS)
def test_files_that_are_no_program(kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    build, says = STRANGERS[kind]
    path = tmp_path / "p.pt2"
    path.write_bytes(build())
    capfd.readouterr()
    with pytest.raises(dsmoe.LoadError, match=re.escape(says)) as caught:
        dsmoe.load(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_places_that_hold_no_file(tmp_path: Path) -> None:
    """A pipe that nobody writes into must not be waited for."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for place, says in (
        ("missing", "no such file"),
        ("", "is a folder"),
        ("pipe", "is no ordinary file"),
        ("loop", "cannot be read (Too many levels of symbolic links)"),
        ("x" * 300, "cannot be read (File name too long)"),
        ("a\0b", "cannot be read (embedded null byte)"),
    ):
        with pytest.raises(dsmoe.LoadError, match=re.escape(says)) as caught:
            dsmoe.load(tmp_path / place)
        assert "\n" not in str(caught.value)
    with pytest.raises(dsmoe.LoadError, match="is no ordinary file"):
        dsmoe.load(os.devnull)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = tmp_path / "p.pt2"
    path.touch(mode=stat.S_IWUSR)
    with pytest.raises(dsmoe.LoadError, match="Permission denied"):
        dsmoe.load(path)


def test_a_whole_file_of_a_record_unknown_here(tmp_path: Path) -> None:
    """As another version might write: every digest right, but no report."""
    with (tmp_path / "p.pt2").open("wb") as file:
        archive.write(file, [("record", [memoryview(zlib.compress(b'{"weights": {}}'))])])
    with pytest.raises(dsmoe.LoadError, match="cannot be read here: .*; save it again"):
        dsmoe.load(tmp_path / "p.pt2")


@pytest.mark.parametrize("sizes", [(), (0,), (1,), (63, 64, 65), (archive._BLOCK, archive._BLOCK + 1, 0)])
def test_sections_come_back(sizes: tuple[int, ...], tmp_path: Path) -> None:
    sections = {f"s{i}": os.urandom(size) for i, size in enumerate(sizes)}
    with (tmp_path / "a").open("wb") as file:
        archive.write(file, ((name, [memoryview(content)]) for name, content in sections.items()))
    with archive.opened(tmp_path / "a") as found:
        for name, content in sections.items():
            assert found.read(name) == content and found.size(name) == len(content)
        with pytest.raises(dsmoe.LoadError, match="damaged at other"):
            found.read("other")


def test_the_file_of_a_process_that_was_killed_is_the_old_one(tmp_path: Path) -> None:
    script = (
        "import os, sys, dsmoe_compiler.archive as archive, torch, dsmoe_compiler as dsmoe\n"
        "program = dsmoe.compile(torch.nn.Linear(8, 8), (torch.ones(2, 8),), verify='off')\n"
        "program.save(sys.argv[1])\n"
        "real = archive.sha256\n"
        "def die(block): os._exit(9)\n"
        "archive.sha256 = die\n"
        "program.save(sys.argv[1])"
    )
    path = tmp_path / "p.pt2"
    assert subprocess.run([sys.executable, "-c", script, str(path)]).returncode == 9
    assert dsmoe.load(path)(torch.ones(1, 8)).shape == (1, 8)
