"""What a compiled kernel takes of the GPU: compiled for a target by name, on any machine, and read from the
machine code.

Triton brings its own assemblers, so that no GPU and no driver is needed; the occupancy follows from the
architecture's facts.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from dsmoe_compiler.codegen.architecture import architecture

# An instruction of a listing: its name after an address and a predicate.
_SASS = re.compile(r"^\s*(?:/\*[0-9a-f]+\*/)?\s*(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", re.MULTILINE)
_AMDGCN = re.compile(r"^\s+([a-z][a-z0-9_]+)", re.MULTILINE)


@dataclass(frozen=True)
class Signature:
    """A kernel's parameters as a launch with these arguments specialises them: `types` by name ("*bf16",
    "i32", "tensordesc<bf16[1, 64, 64]>", "constexpr"), the values of constants and the attributes of the
    others (divisible by 16) by position, as `triton.compiler.ASTSource` takes them.
    """

    types: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], list[list[object]]]


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled for `target` ("sm_90")."""

    name: str
    target: str
    kernel: Any  # triton.compiler.CompiledKernel

    @property
    def stages(self) -> tuple[str, ...]:
        """The texts there are, from source to machine code."""
        last = ("amdgcn",) if self.kernel.metadata.target.backend == "hip" else ("ptx", "sass")
        return ("ttir", "ttgir", "llir", *last)

    def text(self, stage: str) -> str:
        """One of `stages`. Raises ValueError for another."""
        if stage not in self.stages:
            raise ValueError(f"{self.target} has no {stage!r}; it has {', '.join(self.stages)}")
        return self._sass if stage == "sass" else str(self.kernel.asm[stage])

    @property
    def _sass(self) -> str:
        return _on_binary(triton.knobs.nvidia.nvdisasm.path, "-c", self.kernel.asm["cubin"])


@dataclass(frozen=True)
class Resources:
    """What a block of a compiled kernel takes.

    `registers`: vector registers a thread (on AMD, accumulation registers included), `scalar_registers` those
    of a warp (AMD). `spill_stores` and `spill_loads`: instructions that move registers to memory and back.
    `shared` in bytes; `resident`: blocks that a processor holds at once, 0 if not one fits. Instructions:
    `wgmma` products by four warps, `mma` by one, `tma_loads` by descriptor, `cp_async` from memory straight
    to shared memory.
    """

    registers: int
    spill_stores: int
    spill_loads: int
    shared: int
    threads: int
    resident: int
    wgmma: int = 0
    mma: int = 0
    tma_loads: int = 0
    cp_async: int = 0
    scalar_registers: int = 0


def compile_launch(
    kernel: Any, arguments: Mapping[str, object], options: Mapping[str, object], target: str
) -> Compiled:
    """Compile a `triton.jit` kernel as a launch with these arguments would, without launching it.

    `arguments` by name: tensors (of the meta device too; their data counts as 16-byte aligned), numbers, host
    `TensorDescriptor`s, constants; `options` as at a launch: num_warps, num_stages. Raises ValueError for an
    unknown target, and whatever Triton's compiler does.
    """
    made_for = _gpu_target(target)
    signed, parsed = _bound(kernel, arguments, options, made_for)
    source = ASTSource(kernel, signed.types, signed.constants, signed.attributes)
    return Compiled(kernel.__name__, target, triton.compile(source, target=made_for, options=parsed.__dict__))


def signature(kernel: Any, arguments: Mapping[str, object], target: str) -> Signature:
    """How a launch with these arguments specialises the kernel: ints of 1 become constants, multiples of 16
    are marked, descriptors carry their block's shape.
    """
    return _bound(kernel, arguments, {}, _gpu_target(target))[0]


def resources(compiled: Compiled) -> Resources:
    """Read a kernel's resources from its machine code."""
    if compiled.kernel.metadata.target.backend == "hip":
        return _amd(compiled)
    return _nvidia(compiled)


def _gpu_target(target: str) -> GPUTarget:
    facts = architecture(target)
    if target.startswith("gfx"):
        return GPUTarget("hip", target, facts.warp)
    return GPUTarget("cuda", int(target.removeprefix("sm_")), facts.warp)


def _bound(
    kernel: Any, arguments: Mapping[str, object], options: Mapping[str, object], target: GPUTarget
) -> tuple[Signature, Any]:
    """Through Triton's own binder, so that what is compiled here is what a launch would compile."""
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    # Unset, multiply-adds are fused in Triton 3.9 with a warning, and in 3.10 no longer.
    values, specialised, given = bind(**arguments, **{"enable_fp_fusion": True, **options})
    parsed, types, constants, attributes = kernel._pack_args(backend, given, values, specialised, given)
    return Signature(types, constants, attributes), parsed


def _nvidia(compiled: Compiled) -> Resources:
    listing = _on_binary(
        triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", compiled.kernel.asm["cubin"]
    )
    registers = int(_found(r"REG:(\d+)", listing))
    threads = int(_found(r"\.reqntid\s+(\d+)", compiled.text("ptx")))
    shared = int(compiled.kernel.metadata.shared)
    facts = architecture(compiled.target)
    names = _SASS.findall(compiled.text("sass"))
    return Resources(
        registers=registers,
        spill_stores=_count(names, "STL"),
        spill_loads=_count(names, "LDL"),
        shared=shared,
        threads=threads,
        resident=facts.resident_blocks(registers, shared, threads // facts.warp),
        wgmma=_count(names, "HGMMA", "QGMMA", "IGMMA", "UTCHMMA", "UTCQMMA"),
        mma=_count(names, "HMMA", "QMMA", "IMMA"),
        tma_loads=_count(names, "UTMALDG"),
        cp_async=_count(names, "LDGSTS"),
    )


def _amd(compiled: Compiled) -> Resources:
    text, metadata = compiled.text("amdgcn"), compiled.kernel.metadata
    registers = int(_found(r"\.vgpr_count:\s+(\d+)", text))
    facts = architecture(compiled.target)
    names = _AMDGCN.findall(text)
    return Resources(
        registers=registers,
        spill_stores=_count(names, "scratch_store"),
        spill_loads=_count(names, "scratch_load"),
        shared=int(metadata.shared),
        threads=int(metadata.num_warps) * facts.warp,
        resident=facts.resident_blocks(registers, int(metadata.shared), int(metadata.num_warps)),
        mma=_count(names, "v_mfma_"),
        cp_async=len(
            re.findall(r"^\s+(?:buffer|global)_load_\w+.*\blds\b|^\s+global_load_lds_", text, re.MULTILINE)
        ),
        scalar_registers=int(_found(r"\.sgpr_count:\s+(\d+)", text)),
    )


def _on_binary(tool: str, option: str, binary: bytes) -> str:
    """What one of Triton's tools prints about a binary."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(binary)
        return subprocess.run([tool, option, str(file)], capture_output=True, text=True, check=True).stdout


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"the compiler's listing says nothing of {pattern!r}: not a Triton it was made for")
    return match[1]


def _count(names: list[str], *prefixes: str) -> int:
    return sum(name.startswith(prefixes) for name in names)
