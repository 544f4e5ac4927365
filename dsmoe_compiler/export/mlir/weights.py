"""Weights as resources of their own names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch_mlir.extras.fx_importer import (
    FxImporterHooks,
    GraphNodeImporter,
    InputInfo,
    create_mlir_tensor_type,
)
from torch_mlir.ir import DenseResourceElementsAttr, Operation, Type, Value

from dsmoe_compiler.ir.errors import InputError
from dsmoe_compiler.storages import plain


class NamedWeights(FxImporterHooks):  # type: ignore[misc]
    """Has torch-mlir's importer make each of a program's tensors a `dense_resource` of the tensor's name.

    The importer's own way makes lists of Python numbers of them, and names them by their shapes. The bytes
    are the tensors' own memory where they lie contiguous on the CPU; tensors that share one are one resource.
    """

    def __init__(self, program: ExportedProgram) -> None:
        kept = {**program.constants, **program.state_dict}
        self._names = {id(tensor): name for name, tensor in kept.items()}
        self._made: dict[tuple[object, ...], DenseResourceElementsAttr] = {}

    def resolve_literal(self, gni: GraphNodeImporter, literal: Any, info: InputInfo | None) -> Value | None:
        """A `torch.vtensor.literal`; None, and so the importer's way, for what is no tensor of numbers."""
        if not isinstance(literal, Tensor) or literal.numel() == 1:  # one number stands in the text
            return None
        name = info.input_spec.target if info else self._names.get(id(literal), "constant")
        tensor = literal.detach()
        if not plain(tensor):
            raise InputError(f"{name}: is no plain tensor, which torch-mlir cannot express")
        kind = create_mlir_tensor_type(tensor)
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if key not in self._made:
            data = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            self._made[key] = DenseResourceElementsAttr.get_from_buffer(
                data, name, kind, alignment=tensor.element_size()
            )
        value_type = Type.parse(f"!torch.vtensor<{list(tensor.shape)},{kind.element_type}>")
        literal_op = Operation.create(
            "torch.vtensor.literal", results=[value_type], attributes={"value": self._made[key]}
        )
        return literal_op.result

    def store_produced_value(
        self, gni: GraphNodeImporter, py_value: Any, produced_ir_value: Value, info: InputInfo
    ) -> None:
        """Called for a buffer that the program writes to: raises InputError."""
        raise InputError(
            f"{info.input_spec.target}: the program writes to this buffer, which a function in MLIR cannot; "
            "give a model that does not (in eval mode)"
        )
