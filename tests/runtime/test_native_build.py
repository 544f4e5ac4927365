"""The native library: built once however many ask, kept, replaced when damaged, and done without."""

import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import dsmoe_compiler as dsmoe
from dsmoe_compiler.codegen.native.sources import sources
from dsmoe_compiler.interrupt import Deferred
from dsmoe_compiler.runtime.native import levels, library
from dsmoe_compiler.runtime.native.cache import Place
from dsmoe_compiler.runtime.native.compiler import Compiler, find_compiler
from dsmoe_compiler.runtime.native.library import LEVELS, Library, Unavailable, describe, native
from tests.tiny_models import Experts

GXX = shutil.which("g++") or ""
AS_STARTED = {name: value for name, value in os.environ.items() if name != levels.VARIABLE}
pytestmark = pytest.mark.skipif(
    not GXX or not levels.supported_platform(), reason="needs g++ on x86_64 Linux to build anything"
)

# A library that says to know AVX512-BF16 and no more.
ENTRY = 'extern "C" __attribute__((visibility("default"))) int dsmoe_best_level() { return 3; }'
TINY = {"entry.cpp": ENTRY.encode()}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a process that has neither loaded a library nor said anything: the tiny one is its
    own, on a machine with everything.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("DSMOE_CPU_LEVEL", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(library, "_opened", None)
    monkeypatch.setattr(library, "sources", lambda: TINY)
    monkeypatch.setattr(library, "machine_level", lambda: len(LEVELS))
    library._warn.cache_clear()
    return tmp_path / "cache" / "dsmoe" / "native"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny library as it lies in a cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("built")))
        patch.delenv("CXX", raising=False)
        patch.setattr(library, "_opened", None)
        patch.setattr(library, "sources", lambda: TINY)
        patch.setattr(library, "machine_level", lambda: len(LEVELS))
        assert isinstance(native(), Library)
        found = place().found()
        assert found is not None
        return found


@pytest.fixture
def kept(built: Path, cache: Path) -> Path:
    """The cache with the tiny library in it."""
    cache.mkdir(parents=True)
    return Path(shutil.copy(built, cache))


def place() -> Place:
    """Of the tiny library, by the compiler that is found now."""
    compiler = find_compiler()
    return Place.of(TINY, compiler if isinstance(compiler, Compiler) else None)


def program(path: Path, text: str) -> str:
    """A program of the shell."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def counting_compiler(tmp_path: Path) -> tuple[str, Path]:
    """g++, and the file in which each compilation by it leaves a line."""
    log = tmp_path / "compilations"
    note = f'case " $* " in *" -c "*) echo one >>"{log}";; esac'
    return program(tmp_path / "counting-g++", f'{note}\nexec {GXX} "$@"'), log


ASKING = f"""
from concurrent.futures import ThreadPoolExecutor
from dsmoe_compiler.runtime.native import library
library.sources, library.machine_level = lambda: {TINY!r}, lambda: 4
with ThreadPoolExecutor(2) as pool:
    found = [pool.submit(library.native) for _ in range(2)]
print(*(each.result().level for each in found), len({{id(each.result().handle) for each in found}}))
"""


def test_two_processes_of_two_threads_build_it_once(cache: Path, tmp_path: Path) -> None:
    compiler, log = counting_compiler(tmp_path)
    command = [sys.executable, "-c", ASKING]
    both = [
        subprocess.Popen(command, env={**os.environ, "CXX": compiler}, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [each.communicate()[0] for each in both] == ["avx512_bf16 avx512_bf16 1\n"] * 2
    assert log.read_text() == "one\n"
    assert len(list(cache.glob("*.so"))) == 1 and not list(cache.glob(".*.so.*"))


def test_what_was_built_is_not_built_again(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "build", None)
    found = native()
    assert isinstance(found, Library) and found.level == "avx512_bf16"
    assert found.handle.dsmoe_best_level() == 3 and native() == found


@pytest.mark.parametrize(
    ("environment", "because"),
    [
        ({"CXX": "/nonexistent"}, "CXX=/nonexistent is no program"),
        ({"CXX": "'"}, "CXX=' cannot be read as a command"),
        ({"CXX": "false"}, f"{shutil.which('false')} does not run"),
        ({"PATH": ""}, "no C++ compiler was found"),
    ],
    ids=["missing", "no command", "no compiler", "nothing on the path"],
)
def test_without_a_compiler(
    environment: dict[str, str], because: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert describe().startswith(f"torch operators: {because}")
    with pytest.warns(UserWarning, match="run by torch's operators") as said:
        first, second = native(), native()
    assert isinstance(first, Unavailable) and first.because.startswith(because) and second == first
    assert len(said) == 1, "once"
    assert describe() == f"torch operators: {first.because}"


def test_without_a_compiler_what_another_has_built_serves(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/nonexistent")
    assert describe() == "native kernels, amx"
    assert isinstance(native(), Library)


def test_a_build_that_fails_is_told_and_not_tried_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler, log = counting_compiler(tmp_path)
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(library, "sources", lambda: {"entry.cpp": b"#error not this time\n"})
    with pytest.warns(UserWarning, match="not this time") as said:
        found, again = native(), native()
    because = "the C++ build failed: entry.cpp:1:2: error: #error not this time"
    assert found == again == Unavailable(because)
    assert describe() == f"torch operators: {because}"
    assert len(said) == 1 and log.read_text() == "one\n" and not list(cache.glob("*.so"))


def test_a_library_that_lacks_its_entry_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "sources", lambda: {"entry.cpp": b"int other() { return 1; }\n"})
    with pytest.warns(UserWarning, match="has no dsmoe_best_level"):
        assert isinstance(native(), Unavailable)


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match=f"built anew by every process: .*{tmp_path / 'file'}") as said:
        found = native()
    assert isinstance(found, Library) and found.handle.dsmoe_best_level() == 3
    assert len(said) == 1 and describe() == "native kernels, avx512_bf16"


@pytest.mark.parametrize("damage", ["half of it", "a bit of it", "nothing of it"])
def test_a_damaged_file_is_not_loaded(kept: Path, damage: str) -> None:
    assert place().found() == kept
    content = bytearray(kept.read_bytes())
    content[len(content) // 2] ^= 1
    kept.write_bytes({"half of it": content[: len(content) // 2], "a bit of it": content}.get(damage, b""))
    assert place().found() is None


def test_a_file_of_another_machine_is_replaced(kept: Path, tmp_path: Path) -> None:
    (tmp_path / "foreign").write_bytes(b"\x7fELF, of a machine with another C library")
    assert place().keep(tmp_path / "foreign") == kept == place().found()
    found = native()
    assert isinstance(found, Library) and found.handle.dsmoe_best_level() == 3
    assert b"another C library" not in kept.read_bytes()


def test_what_nobody_uses_goes(kept: Path, cache: Path, tmp_path: Path) -> None:
    old, used = cache / "0123-4567.so", cache / "89ab-cdef.so"
    for file, days in ((old, 31), (used, 29), (kept, 29)):
        file.touch()
        os.utime(file, (time.time() - 86400 * days,) * 2)
    assert place().found() == kept and time.time() - kept.stat().st_mtime < 86400, "marked as used"
    (tmp_path / "new").write_bytes(b"new")
    place().keep(tmp_path / "new")
    assert sorted(cache.glob("*.so")) == sorted([kept, used])


def test_its_place_is_that_of_sources_and_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    before = place()
    assert place() == before
    assert Place.of({"entry.cpp": b"// other"}, None).what != before.what
    monkeypatch.setenv("CXXFLAGS", "-fno-inline")
    assert place().what == before.what and place().file != before.file


@pytest.mark.parametrize("level", LEVELS[:3])
def test_a_level_that_is_asked_for(level: str, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSMOE_CPU_LEVEL", level)
    found = native()
    assert isinstance(found, Library) and found.level == level
    assert describe() == f"native kernels, {level}"


def test_a_level_that_the_system_does_not_grant(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSMOE_CPU_LEVEL", "amx")
    for _ in range(2):
        with pytest.raises(
            dsmoe.InputError, match="amx: this machine does not .* avx2, avx512, avx512_bf16, torch"
        ):
            native()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("AVX2", "^DSMOE_CPU_LEVEL=AVX2: choose one of avx2, avx512, avx512_bf16, amx, torch$"),
        ("avx512", "^DSMOE_CPU_LEVEL=avx512: this machine does not have it; choose one of avx2, torch$"),
    ],
)
def test_no_level_of_this_machine(asked: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "machine_level", lambda: 1)
    monkeypatch.setattr(library, "build", None)
    monkeypatch.setenv("DSMOE_CPU_LEVEL", asked)
    for door in (native, describe):
        with pytest.raises(dsmoe.InputError, match=message):
            door()


def test_torch_asked_for_is_not_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "build", None)
    monkeypatch.setenv("DSMOE_CPU_LEVEL", "torch")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native() == Unavailable("DSMOE_CPU_LEVEL=torch")
    assert describe() == "torch operators: DSMOE_CPU_LEVEL=torch"


FMA = "fpu sse4_2 avx avx2 f16c fma"
AVX512 = f"{FMA} avx512f avx512dq avx512bw avx512vl avx512cd"


@pytest.mark.parametrize(
    ("flags", "level"),
    [
        ("fpu sse4_2 avx", 0),
        (FMA, 1),
        (f"{FMA} avx512f", 1),  # Knights Landing
        (AVX512, 2),
        (f"{AVX512} avx512_bf16", 3),
        (f"{AVX512} avx512_bf16 amx_tile amx_int8", 3),
        (f"{AVX512} avx512_bf16 amx_tile amx_bf16", 4),
        (f"{AVX512} amx_tile amx_bf16", 2),
    ],
)
def test_levels_of_processors(
    flags: str, level: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t: amx_bf16\n\n")
    monkeypatch.setattr(levels, "_CPUINFO", tmp_path / "cpuinfo")
    assert levels.machine_level() == level


def test_another_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(library, "machine_level", levels.machine_level)
    monkeypatch.setattr(library, "build", None)
    with pytest.warns(UserWarning, match="torch's operators"):
        found = native()
    assert found == Unavailable("native kernels are for x86_64 Linux, this is aarch64 Linux")
    assert describe() == f"torch operators: {found.because}"


@pytest.fixture
def ordinary_ctrl_c() -> Iterator[None]:
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


def test_ctrl_c_ends_a_build(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ordinary_ctrl_c: None
) -> None:
    """Also while compile defers it; nothing is left, no compiler goes on, and whoever asks next builds."""
    started, scratch = tmp_path / "started", tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    version = 'case "$1" in --version) echo slow; exit;; esac'
    monkeypatch.setenv(
        "CXX",
        program(
            tmp_path / "slow",
            f'{version}\necho $$ >"{started}.new"\nmv "{started}.new" "{started}"\nsleep 60',
        ),
    )

    def press() -> None:
        while not started.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    presser = threading.Thread(target=press, daemon=True)
    presser.start()
    with pytest.raises(KeyboardInterrupt), Deferred():
        native()
    presser.join()
    assert not list(scratch.iterdir()) and not list(cache.glob("*.so"))
    assert not running(int(started.read_text()))
    assert library._opened is None and library._TURN.acquire(blocking=False)
    library._TURN.release()


def running(pid: int) -> bool:
    """Whether the process is there and not a zombie that nobody waits for."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_reports_say_what_a_cpu_runs_layers_by(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x_TD = torch.randn(5, 16)
    monkeypatch.setenv("DSMOE_CPU_LEVEL", "avx2")
    inspected = dsmoe.inspect(Experts(), (x_TD,))
    assert inspected.kernels == "native kernels, avx2"
    assert dsmoe.Report.from_json(inspected.to_json()) == inspected
    assert "\non a CPU: native kernels, avx2\n" in str(inspected)
    monkeypatch.setenv("DSMOE_CPU_LEVEL", "torch")
    compiled = dsmoe.compile(Experts(), (x_TD,), verify="off").report
    assert "backend cpu (torch operators: DSMOE_CPU_LEVEL=torch)" in str(compiled).replace("\n    ", " ")
    assert not dsmoe.compile(Experts(), (x_TD,), backend="reference", verify="off").report.kernels
    monkeypatch.setenv("DSMOE_CPU_LEVEL", "mmx")
    with pytest.raises(dsmoe.InputError, match="choose one of avx2"):
        dsmoe.inspect(Experts(), (x_TD,))


def test_a_loaded_program_tells_of_the_machine_it_is_on(
    kept: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DSMOE_CPU_LEVEL", "torch")
    dsmoe.compile(Experts(), (torch.randn(5, 16),), verify="off").save(tmp_path / "p.pt2")
    monkeypatch.delenv("DSMOE_CPU_LEVEL")
    assert dsmoe.load(tmp_path / "p.pt2").report.kernels == "native kernels, amx"


REAL = """
from dsmoe_compiler.runtime.native.library import native
print(native().level)
print(*{line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line})
"""


@pytest.mark.skipif(not levels.machine_level(), reason="this processor has no AVX2")
def test_the_library_itself_builds_and_has_its_threads_from_torch() -> None:
    """In the user's own cache, as any process."""
    command = [sys.executable, "-c", REAL]
    done = subprocess.run(command, env=AS_STARTED, stdout=subprocess.PIPE, text=True, check=True)
    level, openmp = done.stdout.splitlines()
    assert level in LEVELS[: levels.machine_level()]
    assert Path(openmp).is_relative_to(Path(torch.__file__).parents[1]), "one, torch's own"
    assert b"#pragma omp" in b"".join(sources().values()), "or nothing was shown"
