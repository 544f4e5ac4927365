"""The C++ compiler of this machine, and how the library is compiled by it."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

# No level's instructions but where a function asks for them: -march stands last, after the user's own.
COMPILE = (
    "-O3",
    "-std=c++17",
    "-fopenmp",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-lto",
    "-g0",
    "-march=x86-64",
)
# GCC first: another's OpenMP would run threads of its own beside those of torch.
_USUAL = ("g++", "c++", "clang++")
_USERS_FLAGS = ("CPPFLAGS", "CFLAGS", "CXXFLAGS", "LDFLAGS")


@dataclass(frozen=True)
class Compiler:
    """`command` is how it is called (a path, perhaps with options), `version` what it says of itself,
    `flags` the user's own, by the environment variable they stand in.
    """

    command: tuple[str, ...]
    version: str
    flags: tuple[tuple[str, str], ...]

    def environment(self) -> dict[str, str]:
        """The variables by which setuptools takes this compiler for everything, whichever built Python."""
        command = shlex.join(self.command)
        shared = f"{command} -shared"
        return {"CC": command, "CXX": command, "LDSHARED": shared, "LDCXXSHARED": shared}


@dataclass(frozen=True)
class NoCompiler:
    """Why there is none, in one line."""

    because: str


def find_compiler() -> Compiler | NoCompiler:
    """`$CXX`, or the first of g++, c++ and clang++ on the path."""
    named = os.environ.get("CXX", "").strip()
    try:
        wanted = shlex.split(named)
    except ValueError:
        return NoCompiler(f"CXX={named} cannot be read as a command")
    for first, *options in [wanted] if wanted else [[name] for name in _USUAL]:
        path = shutil.which(first)
        if path is not None:
            return _compiler((os.path.abspath(path), *options))
    return NoCompiler(f"CXX={named} is no program" if named else "no C++ compiler was found")


def _compiler(command: tuple[str, ...]) -> Compiler | NoCompiler:
    try:
        version = _version(command, os.stat(command[0]).st_mtime_ns)
    except (OSError, subprocess.SubprocessError) as e:
        return NoCompiler(f"{shlex.join(command)} does not run ({str(e).splitlines()[0]})")
    return Compiler(command, version, tuple((each, os.environ.get(each, "")) for each in _USERS_FLAGS))


@lru_cache(maxsize=8)
def _version(command: tuple[str, ...], changed: int) -> str:
    """What a compiler, whose file was last changed then, says of itself."""
    said = subprocess.run([*command, "--version"], capture_output=True, timeout=30, check=True).stdout
    return said.decode(errors="replace").partition("\n")[0].strip()


def link_options() -> tuple[str, ...]:
    """Those that bind the library to the OpenMP that torch brings along: two would each have threads, one a
    core. Its name may be one that only torch's wheel uses.
    """
    package = Path(torch.__file__).parent
    for folder in (package / "lib", package.with_name("torch.libs")):
        for brought in sorted(folder.glob("libgomp*.so*")):
            return (str(brought), "-pthread")
    return ("-fopenmp",)
