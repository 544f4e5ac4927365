"""From an exported program to an MLIR module, by torch-mlir's importer and passes."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping

import torch
from torch.export import ExportedProgram
from torch_mlir.dialects.torch import register_dialect
from torch_mlir.extras.fx_decomp_util import get_decomposition_table
from torch_mlir.extras.fx_importer import FxImporter
from torch_mlir.ir import Context, MLIRError, Module
from torch_mlir.passmanager import PassManager

from dsmoe_compiler.export.mlir.comparisons import match_scatter, rank_topk
from dsmoe_compiler.export.mlir.reshapes import spell_reshapes
from dsmoe_compiler.export.mlir.sizes import require_integers, settle_sizes
from dsmoe_compiler.export.mlir.weights import NamedWeights
from dsmoe_compiler.ir.decompose import DECOMPOSITIONS
from dsmoe_compiler.ir.errors import InputError
from dsmoe_compiler.quiet import silenced
from dsmoe_compiler.turns import turn

Decompositions = Mapping[torch._ops.OpOverload, Callable[..., object]]

_FOR_LINALG: Decompositions = {
    torch.ops.aten.topk.default: rank_topk,
    torch.ops.aten.scatter.value: match_scatter,
    **DECOMPOSITIONS,
}

# torch-mlir's own pipelines (its fx.py), but for the operators that `spell_reshapes` spells reshapes in: left
# as they are until they become tensor.collapse_shape and tensor.expand_shape.
_TO_LINALG = (
    "torchdynamo-export-to-torch-backend-pipeline"
    "{backend-legal-ops=aten.flatten.using_ints,aten.unflatten.int}",
    "torch-backend-to-linalg-on-tensors-backend-pipeline{allow-non-finites=true}",
)


def in_torch(exported: ExportedProgram) -> Module:
    """The program in torch-mlir's dialect, as it was captured and fused; `exported` is left as it was."""
    context = _context()
    # Only what the dialect has no operator for. (torch also makes the program functional.)
    table = {op: how for op, how in get_decomposition_table().items() if not _knows(context, op)}
    return _passed(_imported(_decomposed(exported, table), context, symbols=True), ("cse",))


def in_linalg(exported: ExportedProgram) -> Module:
    """The program in linalg on tensors; `exported` is left as it was."""
    program = _decomposed(exported, {**get_decomposition_table(), **_FOR_LINALG})
    spell_reshapes(program.graph)
    return _passed(_imported(program, _context(), symbols=False), _TO_LINALG)


def _context() -> Context:
    context = Context()
    register_dialect(context)
    return context


def _knows(context: Context, op: torch._ops.OpOverload) -> bool:
    name = ".".join(["torch", *op._schema.name.split("::"), op._schema.overload_name])
    return bool(context.is_registered_operation(name.removesuffix(".")))


def _decomposed(exported: ExportedProgram, table: Decompositions) -> ExportedProgram:
    with turn(), warnings.catch_warnings(), silenced("torch.export"):
        warnings.simplefilter("ignore")  # torch's, about itself
        program: ExportedProgram = exported.run_decompositions(dict(table))
    settle_sizes(program.graph)
    require_integers(program.graph)
    return program


def _imported(program: ExportedProgram, context: Context, *, symbols: bool) -> Module:
    """The program as it stands; `symbols` are the names of sizes, which the lowering does not take."""
    importer = FxImporter(context=context, hooks=NamedWeights(program))
    try:
        # Of torch-mlir's two entries this one binds weights to nodes. The other puts tensors into the nodes'
        # arguments, and refuses them in lists, which is where a fused layer has them.
        importer.import_program(program, func_name="main", import_symbolic_shape_expressions=symbols)
    except (NotImplementedError, TypeError, AssertionError, KeyError, RuntimeError, ValueError) as e:
        raise InputError(f"torch-mlir cannot express this program: {_first_line(e)}") from e
    return importer.module


def _passed(module: Module, passes: tuple[str, ...]) -> Module:
    with module.context:
        for each in passes:
            try:
                PassManager.parse(f"builtin.module({each})").run(module.operation)
            except MLIRError as e:
                why = e.error_diagnostics[0].message if e.error_diagnostics else _first_line(e)
                raise InputError(f"torch-mlir cannot lower this program: {_shortened(why)}") from e
    return module


def _shortened(diagnostic: str) -> str:
    """Without the operation that it spells out, but for the name of one that the dialect does not have."""
    why, _, operation = diagnostic.partition(": %")
    name = re.search(r'<{name = "(.*?)"', operation)
    return f"{why} ({name[1]})" if name else why[:200]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
