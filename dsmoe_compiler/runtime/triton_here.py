"""Whether generated kernels can run here."""

from __future__ import annotations

from collections.abc import Set


def unavailable(devices: Set[str]) -> str | None:
    """Why kernels cannot run a model on these devices ("cuda", "cpu"), or None where they can."""
    try:
        import triton
    except ImportError:
        return "Triton is not installed: pip install 'dsmoe-compiler[triton]'"
    if triton.knobs.runtime.interpret:
        return None
    if devices - {"cuda"}:
        where = ", ".join(sorted(devices))
        return (
            f"it is on {where}: move it to a CUDA device, or set TRITON_INTERPRET=1 to interpret the kernels"
        )
    return None
