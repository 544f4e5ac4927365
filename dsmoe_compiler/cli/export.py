"""`dsmoe export`: a model in, an ONNX model or an MLIR text out."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import click

from dsmoe_compiler.cli.input_option import ExampleInput, input_option
from dsmoe_compiler.cli.memory import readable, require_disk
from dsmoe_compiler.cli.model_argument import is_saved_program, resolve, weight_bytes
from dsmoe_compiler.cli.output_file import require_place, require_text_place
from dsmoe_compiler.cli.stages import Stage, load_modules, stages
from dsmoe_compiler.ir.errors import InputError

if TYPE_CHECKING:
    from dsmoe_compiler.exports import Exported

Target = Literal["standard", "ort"]
Weights = Literal["int8", "int4"]
Dialect = Literal["torch", "linalg"]


@click.command("export", short_help="Write MODEL as optimised ONNX, or as MLIR.")
@click.argument("text", metavar="MODEL")
@click.option(
    "--onnx",
    type=click.Path(path_type=Path),
    metavar="FILE.onnx",
    help="Where to write the ONNX model; its weights go to FILE.onnx.data beside it.",
)
@click.option(
    "--mlir", type=click.Path(path_type=Path), metavar="FILE.mlir", help="Where to write the MLIR text."
)
@click.option(
    "--target",
    type=click.Choice(get_args(Target)),
    default="standard",
    show_default=True,
    help="standard: ONNX's own operators, for any runtime; ort: onnxruntime's MoE where a layer fits it.",
)
@click.option(
    "--weights",
    type=click.Choice(get_args(Weights)),
    help="Keep the experts' matrices in 8 or 4 bits, in blocks of 32.",
)
@click.option(
    "--verify/--no-verify",
    default=True,
    show_default=True,
    help="Run the written model in onnxruntime against the program.",
)
@click.option(
    "--dialect",
    type=click.Choice(get_args(Dialect)),
    default="torch",
    show_default=True,
    help="MLIR: torch keeps a layer as one operator, linalg lowers everything.",
)
@click.option("--with-weights", is_flag=True, help="MLIR: write the weights' bytes too.")
@input_option
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")
def export(
    text: str,
    onnx: Path | None,
    mlir: Path | None,
    target: Target,
    weights: Weights | None,
    verify: bool,
    dialect: Dialect,
    with_weights: bool,
    inputs: tuple[ExampleInput, ...],
    as_json: bool,
) -> None:
    """Write MODEL as an ONNX model, as MLIR, or both.

    MODEL may be a FILE.pt2 that `dsmoe compile` wrote. Models of the zoo have random weights, and so have
    hf: folders without any.

    \b
    Examples:
      dsmoe export deepseek-moe-tiny --onnx tiny.onnx
      dsmoe export hf:./Mixtral-8x7B-v0.1 --onnx mixtral.onnx --weights int4
      dsmoe export deepseek-moe-tiny --mlir tiny.mlir --dialect linalg
    """
    if onnx is None and mlir is None:
        raise InputError("nothing to write: give --onnx FILE.onnx, or --mlir FILE.mlir, or both")
    if onnx is not None:
        require_place(onnx, ".onnx", "an ONNX model")
    if mlir is not None:
        require_text_place(mlir)
    order = _Order(onnx, mlir, target, weights, verify, dialect, with_weights)
    with stages() as stage:
        start = time.perf_counter()
        written = _write(text, inputs, order, stage)
        seconds = time.perf_counter() - start
    for note in written.notes:
        click.echo(f"note: {note}", err=True)
    if as_json:
        click.echo(json.dumps({**written.record(), "seconds": round(seconds, 3)}, indent=2))
        return
    if written.onnx is not None:
        _print(written.onnx)
    if mlir is not None:
        click.echo(f"wrote {mlir}, {readable(mlir.stat().st_size)}, in the {dialect} dialect")


@dataclass(frozen=True)
class _Order:
    """What the options ask for."""

    onnx: Path | None
    mlir: Path | None
    target: Target
    weights: Weights | None
    verify: bool
    dialect: Dialect
    with_weights: bool


@dataclass(frozen=True)
class _Written:
    """What lies in files now."""

    onnx: Exported | None
    mlir: Path | None
    dialect: Dialect
    notes: tuple[str, ...]

    def record(self) -> dict[str, object]:
        """As JSON has it."""
        record = dict[str, object]()
        if self.onnx is not None:
            sizes = {"graph_bytes": self.onnx.graph_bytes, "data_bytes": self.onnx.data_bytes}
            record["onnx"] = json.loads(json.dumps({**asdict(self.onnx), **sizes}, default=str))
        if self.mlir is not None:
            size = self.mlir.stat().st_size
            record["mlir"] = {"path": str(self.mlir), "dialect": self.dialect, "bytes": size}
        return record


def _write(text: str, inputs: tuple[ExampleInput, ...], order: _Order, stage: Stage) -> _Written:
    load_modules(stage, "dsmoe_compiler.exports")
    from dsmoe_compiler import api, exports
    from dsmoe_compiler.program import load

    if is_saved_program(text):
        if inputs:
            raise InputError("--input is for models: a .pt2 file knows what it takes")
        stage(f"read {text}")
        program, call = load(text), None
    else:
        stage(f"build {text}")
        call = resolve(text, inputs, with_weights=True)
        if order.onnx is not None:
            require_disk(weight_bytes(call.model), order.onnx)
        program = api.compile(call.model, call.args, call.kwargs, backend="cpu", progress=stage)
    exported = None
    if order.onnx is not None:
        exported = exports.export_onnx(
            program,
            call.args if call else (),
            call.kwargs if call else None,
            path=order.onnx,
            target=order.target,
            weights=order.weights,
            verify=order.verify,
            progress=stage,
        )
    if order.mlir is not None:
        exports.export_mlir(
            program, path=order.mlir, dialect=order.dialect, weights=order.with_weights, progress=stage
        )
    return _Written(exported, order.mlir, order.dialect, call.notes if call else ())


def _print(exported: Exported) -> None:
    """The layers, a line a kind of them, and the files."""
    forms = Counter((layer.form, layer.remark) for layer in exported.layers)
    for (form, remark), count in forms.items():
        plural = "" if count == 1 else "s"
        click.echo(f"{count} MoE layer{plural}: {form}{f' ({remark})' if remark else ''}")
    if not forms:
        click.echo("no MoE layers")
    if exported.quantized:
        worst = max(exported.quantized, key=lambda each: each.relative_l2)
        click.echo(
            f"experts in {worst.bits} bits: relative error at most {worst.relative_l2:.1e}, {worst.name}"
        )
    if exported.error is None:
        click.echo("not verified")
    else:
        click.echo(f"verified in onnxruntime: relative error {exported.error:.1e}")
    data = f" + {exported.data} {readable(exported.data_bytes)}" if exported.data else ""
    click.echo(
        f"wrote {exported.path} {readable(exported.graph_bytes)}{data}, {exported.nodes} nodes, "
        f"opset {exported.opset}"
    )
