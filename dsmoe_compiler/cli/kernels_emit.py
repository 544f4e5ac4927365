"""`dsmoe kernels --emit`: a layer's module of kernels, and what a compiler makes of each."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import click

from dsmoe_compiler.cli.kernels_model import FusedModel
from dsmoe_compiler.cli.kernels_table import named, plan_record, title
from dsmoe_compiler.cli.output_file import write_text
from dsmoe_compiler.cli.stages import Stage
from dsmoe_compiler.ir.errors import InputError
from dsmoe_compiler.nearest import unknown
from dsmoe_compiler.report.grid import Column, Grid, Row

if TYPE_CHECKING:
    from dsmoe_compiler.runtime.kernels import FusedLayer, Gpu, Kernel, Planned

Emit: TypeAlias = Literal["triton", "ttir", "ttgir", "llir", "ptx", "sass", "amdgcn", "resources"]
# What a comment begins with where it is not "//".
_COMMENTS = {"llir": ";", "amdgcn": ";"}


# Pygments' names of the languages; the others are printed as they are.
_LEXERS = {"triton": "python", "llir": "llvm", "ptx": "ptx", "amdgcn": "gas"}


@dataclass(frozen=True)
class Wanted:
    """What is emitted: for how many tokens, which kernel (None: all), into which file (None: stdout)."""

    emit: Emit
    tokens: tuple[int, ...]
    kernel: str | None
    output: Path | None


@dataclass(frozen=True)
class Text:
    """The answer of `--emit`, but for resources."""

    wanted: Wanted
    text: str
    notes: tuple[str, ...]

    def print(self, as_json: bool) -> None:
        """To its file; on a terminal in colour, elsewhere exactly as it is."""
        if self.wanted.output is not None:
            write_text(self.wanted.output, self.text)
            return
        from dsmoe_compiler.cli.paint import console, print_code

        to, lexer = console(), _LEXERS.get(self.wanted.emit)
        if to.is_terminal and lexer:
            print_code(to, self.text, lexer)
        else:
            click.echo(self.text, nl=False)


@dataclass(frozen=True)
class Taken:
    """Kernels of a layer for so many tokens, to say what each takes."""

    fused: FusedLayer
    plan: Planned
    kernels: tuple[Kernel, ...]


@dataclass(frozen=True)
class Takings:
    """The answer of `--emit resources`."""

    found: tuple[Taken, ...]
    output: Path | None
    notes: tuple[str, ...] = ()

    def print(self, as_json: bool) -> None:
        """As tables, or as one JSON record."""
        if as_json or self.output is not None:
            text = (
                json.dumps([self._record(each) for each in self.found], indent=2) if as_json else self._text()
            )
            if self.output is None:
                click.echo(text)
            else:
                write_text(self.output, text + "\n")
            return
        from dsmoe_compiler.cli.paint import console, print_grid, print_lines

        to = console()
        for at, each in enumerate(self.found):
            if at:
                to.print()
            print_lines(to, [_heading(each)], style="bold cyan")
            print_grid(to, resources_grid(each.kernels))

    def _text(self) -> str:
        return "\n\n".join(
            "\n".join([_heading(each), *resources_grid(each.kernels).lines()]) for each in self.found
        )

    def _record(self, taken: Taken) -> dict[str, Any]:
        return {
            "layers": list(taken.fused.names),
            "gpu": taken.plan.choice.gpu.name,
            "plan": plan_record(taken.plan),
            "kernels": resources_records(taken.kernels),
        }


def _heading(taken: Taken) -> str:
    return f"{title(taken.fused)}, T={taken.plan.tokens} on {named(taken.plan.choice.gpu)}"


def require_stage(gpu: Gpu, emit: Emit) -> None:
    """Raise InputError where another vendor's machine code is asked for, before the long work."""
    amd = gpu.target.startswith("gfx")
    if emit in (("ptx", "sass") if amd else ("amdgcn",)):
        other = "amdgcn" if amd else "ptx and sass"
        raise InputError(f"there is no {emit} for {gpu.target}: its machine code is {other}")


def emitted(model: FusedModel, wanted: Wanted, gpu: Gpu, stage: Stage) -> Text | Takings:
    """What is wanted of the model's kernels; of the first of its distinct layers, or of all resources.

    Raises InputError where nothing is fused or has kernels, and for a kernel or a stage that there is not.
    """
    if not model.layers:
        why = f"`dsmoe explain {model.text}` says why"
        raise InputError(f"no layer of {model.text} is fused, so there are no kernels: {why}")
    if wanted.emit == "resources":
        found = []
        for fused in model.layers:
            for tokens in wanted.tokens:
                plan = plan_of(fused, tokens, gpu)
                kernels = tuple(compile_kernels(fused, plan, wanted.kernel, stage))
                found.append(Taken(fused, plan, kernels))
        return Takings(tuple(found), wanted.output)
    fused, *others = model.layers
    notes = tuple[str, ...]()
    if others:
        more = ", ".join(other.names[0] for other in others)
        notes = (f"this is {title(fused)}; other kernels, with --layer: {more}",)
    plan = plan_of(fused, wanted.tokens[0], gpu)
    if wanted.emit == "triton":
        return Text(wanted, module_text(fused, plan, wanted.kernel), notes)
    compiled = compile_kernels(fused, plan, wanted.kernel, stage)
    return Text(wanted, compiled_text(compiled, wanted.emit), notes)


def plan_of(fused: FusedLayer, tokens: int, gpu: Gpu) -> Planned:
    """The plan whose kernels are emitted. Raises InputError where the layer has none."""
    from dsmoe_compiler.runtime.kernels import Unsupported, planned, text_of

    try:
        plan = planned(fused, tokens, gpu)
        text_of(fused, plan)
    except Unsupported as e:
        raise InputError(f"there are no kernels for {fused.names[0] or 'this layer'}: {e}") from None
    return plan


def module_text(fused: FusedLayer, plan: Planned, kernel: str | None) -> str:
    """The layer's module, or one of its functions with all that it calls. Raises InputError."""
    from dsmoe_compiler.runtime.kernels import text_of

    text = text_of(fused, plan)
    return text if kernel is None else _one_function(text, kernel)


def _one_function(text: str, name: str) -> str:
    body = ast.parse(text).body
    functions = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
    if name not in functions:
        raise InputError(unknown("kernel", name, functions))
    needed, stack = set[str](), [name]
    while stack:
        at = stack.pop()
        if at not in needed:
            needed.add(at)
            stack += [n.id for n in ast.walk(functions[at]) if isinstance(n, ast.Name) and n.id in functions]
    lines = text.splitlines()
    parts = [
        "\n".join(lines[min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1 : node.end_lineno])
        for node in functions.values()
        if node.name in needed
    ]
    return "\n\n\n".join(["import triton\nimport triton.language as tl", *parts]) + "\n"


def compile_kernels(fused: FusedLayer, plan: Planned, kernel: str | None, stage: Stage) -> list[Kernel]:
    """The layer's launches, compiled for the architecture that was planned for. Raises InputError."""
    from dsmoe_compiler.runtime.kernels import compiled, launched

    launches = launched(fused, plan)
    if kernel is not None:
        names = [launch.name for launch in launches]
        if kernel not in names:
            raise InputError(unknown("kernel", kernel, names))
        launches = [launch for launch in launches if launch.name == kernel]
    return list(compiled(launches, plan.choice.gpu.target, stage))


def compiled_text(kernels: Sequence[Kernel], emit: Emit) -> str:
    """The kernels' texts at one stage, a line above each. Raises InputError where the target has none."""
    return "\n".join(
        f"{line}\n{kernel.text(emit).rstrip()}\n" for kernel in kernels for line in _head(kernel, emit)
    )


def _head(kernel: Kernel, emit: Emit) -> Iterator[str]:
    launch = kernel.launch
    told = ", ".join(f"{name} {value}" for name, value in launch.options.items())
    yield f"{_COMMENTS.get(emit, '//')} {launch.name}: grid {launch.grid}, {told}, {kernel.compiled.target}"


def resources_grid(kernels: Sequence[Kernel]) -> Grid:
    """What a block of each kernel takes; a row that spills is marked."""
    amd = kernels[0].compiled.target.startswith("gfx")
    products = ("mfma",) if amd else ("wgmma", "mma", "tma")
    titles = [
        "warps",
        *(["vgprs", "sgprs"] if amd else ["regs"]),
        "spills",
        "shared",
        "per CU" if amd else "per SM",
        *products,
        "to LDS" if amd else "cp.async",
    ]
    rows = []
    for kernel in kernels:
        found = kernel.resources
        spills = found.spill_stores + found.spill_loads
        cells = [
            kernel.launch.options.get("num_warps", 4),
            found.registers,
            *([found.scalar_registers] if amd else []),
            spills,
            f"{found.shared / 1024:.1f} KB",
            found.resident,
            *([found.mma] if amd else [found.wgmma, found.mma, found.tma_loads]),
            found.cp_async,
        ]
        rows.append(Row((kernel.launch.name, *map(str, cells)), alert=spills > 0))
    return Grid((Column("kernel"), *(Column(t, number=True) for t in titles)), tuple(rows))


def resources_records(kernels: Sequence[Kernel]) -> list[dict[str, Any]]:
    """The same as data, with each launch's grid and options; `shared` in bytes."""
    return [
        {
            "kernel": kernel.launch.name,
            "target": kernel.compiled.target,
            "grid": list(kernel.launch.grid),
            **kernel.launch.options,
            **asdict(kernel.resources),
        }
        for kernel in kernels
    ]
