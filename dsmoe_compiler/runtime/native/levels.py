"""Instruction levels: those the library has kernels for, this machine's best, the one the user asked for."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from dsmoe_compiler.ir.errors import InputError

LEVELS = ("avx2", "avx512", "avx512_bf16", "amx")
"""Ascending; level n is LEVELS[n - 1], 0 is none."""

VARIABLE = "DSMOE_CPU_LEVEL"
TORCH = "torch"  # what the variable says to have no native kernels

# What each level needs beyond the one before, as /proc/cpuinfo names it: what the processor has and the
# kernel lets a process use.
_NEEDS = (
    {"avx2", "fma", "f16c"},
    {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    {"avx512_bf16"},
    {"amx_tile", "amx_bf16"},
)
_CPUINFO = Path("/proc/cpuinfo")


def asked() -> str | None:
    """What DSMOE_CPU_LEVEL says: a level, "torch", or None where it is not set. Raises InputError on
    anything else.
    """
    named = os.environ.get(VARIABLE, "")
    if not named:
        return None
    if named not in (*LEVELS, TORCH):
        raise InputError(f"{VARIABLE}={named}: choose one of {', '.join((*LEVELS, TORCH))}")
    return named


def this_platform() -> str:
    """ "x86_64 Linux"."""
    return f"{platform.machine()} {platform.system()}"


def supported_platform() -> bool:
    """Whether the library is written for machines like this one."""
    return this_platform() == "x86_64 Linux"


def machine_level() -> int:
    """The best level that this machine offers, before any library was built: 0 to 4.

    Only the library can ask the kernel for the use of AMX, so its own answer counts where there is one.
    """
    if not supported_platform():
        return 0
    flags, level = _flags(), 0
    while level < len(_NEEDS) and _NEEDS[level] <= flags:
        level += 1
    return level


def require(level: str, best: int) -> None:
    """Raise InputError where the machine, whose best is `best`, lacks a level that was asked for."""
    if LEVELS.index(level) >= best:
        choices = ", ".join((*LEVELS[:best], TORCH))
        raise InputError(f"{VARIABLE}={level}: this machine does not have it; choose one of {choices}")


def _flags() -> set[str]:
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:
        return set()
    named = next((line for line in lines if line.startswith("flags")), "")
    return set(named.partition(":")[2].split())
