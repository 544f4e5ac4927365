"""Ways to make an ONNX file of one model: ours, transformers' exporter, and torch's alone.

Every one exports ids (batch, length), both dynamic, to logits, with the weights in a file beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import dsmoe_compiler as dsmoe
from dsmoe_compiler.exports import Target, Weights

EAGER, GROUPED = "torch eager", "torch grouped_mm"
STANDARD, ORT = "standard", "ort"
VERIFIED = "standard + verify"
TRANSFORMERS, FUSED = "transformers", "transformers + ort_fusions"
BATCHED = "torch.onnx batched_mm"

_NAME = "model.onnx"  # which transformers gives it
# Writes a folder's model.onnx, given the model and an example.
Export = Callable[[PreTrainedModel, Tensor, Path], None]


@dataclass(frozen=True)
class Way:
    """`bits` of the experts' weights. `alone`: takes so much memory, and so long, that it is timed with our
    standard form only; not `timed`: the file is the same as another way's.
    """

    export: Export
    ours: bool = False
    bits: int = 32
    alone: bool = False
    timed: bool = True


def _dsmoe(target: Target, weights: Weights | None = None, verify: bool = False) -> Export:
    """Others do not run what they wrote; only `verify` does."""

    def export(model: PreTrainedModel, ids: Tensor, folder: Path) -> None:
        dsmoe.export_onnx(
            model,
            kwargs={"input_ids": ids},
            path=folder / _NAME,
            target=target,
            weights=weights,
            verify=verify,
        )

    return export


def _transformers(fusions: Literal["cpu"] | None) -> Export:
    """As its documentation has it."""

    def export(model: PreTrainedModel, ids: Tensor, folder: Path) -> None:
        from transformers.exporters.configs import OnnxConfig
        from transformers.exporters.exporter_onnx import OnnxExporter

        config = OnnxConfig(dynamic=True, ort_fusions=fusions)
        exporter = OnnxExporter()  # type: ignore[no-untyped-call]
        exporter.export(model, {"input_ids": ids}, config=config).save_pretrained(folder)

    return export


def _torch_batched(model: PreTrainedModel, ids: Tensor, folder: Path) -> None:
    """The only one of transformers' implementations that torch's exporter takes alone."""
    model.set_experts_implementation("batched_mm")
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.onnx.export(
        _Logits(model), (ids,), dynamo=True, dynamic_shapes={"input_ids": sizes}, verbose=False
    )
    assert program is not None
    program.save(folder / _NAME, external_data=True)


class _Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids).logits
        return logits


WAYS = {
    STANDARD: Way(_dsmoe("standard"), ours=True),
    ORT: Way(_dsmoe("ort"), ours=True),
    f"{STANDARD} int8": Way(_dsmoe("standard", "int8"), ours=True, bits=8),
    f"{ORT} int8": Way(_dsmoe("ort", "int8"), ours=True, bits=8),
    f"{STANDARD} int4": Way(_dsmoe("standard", "int4"), ours=True, bits=4),
    f"{ORT} int4": Way(_dsmoe("ort", "int4"), ours=True, bits=4),
    VERIFIED: Way(_dsmoe("standard", verify=True), ours=True, timed=False),
    TRANSFORMERS: Way(_transformers(None)),
    FUSED: Way(_transformers("cpu")),
    BATCHED: Way(_torch_batched, alone=True),
}
