"""What a captured model costs, and how it is found: everything is read off its graph after the passes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dsmoe_compiler.cost_model.held import Held, fused_ops, held, routing_of
from dsmoe_compiler.cost_model.parts import Part, parts_of
from dsmoe_compiler.cost_model.sizes import Sizes, sizes_at
from dsmoe_compiler.cost_model.step import Step, step
from dsmoe_compiler.cost_model.work import KINDS, Worked, work_of
from dsmoe_compiler.ir.errors import InputError, ShapeError
from dsmoe_compiler.ir.graph import ProgramGraph
from dsmoe_compiler.report.layer_names import collapse
from dsmoe_compiler.report.report import Report
from dsmoe_compiler.report.story import WHOLE_MODEL
from dsmoe_compiler.runtime.gpu_catalogue import ceilings, named

USUAL_GPU = "H200"
BACKWARD = 2  # a product's backward is two of its size: of its gradients with respect to either operand


@dataclass(frozen=True)
class Parameters:
    """`total`: of the model, tied ones once. `activated`: all but those of the routed experts that a token
    did not choose. `lookup`: those of tables that are only looked up in (an input embedding), part of both.
    """

    total: int
    activated: int
    lookup: int


@dataclass(frozen=True)
class Cost:
    """The cost of one forward of `batch` sequences of `seq` tokens, as matrix products; a multiply-add is
    two FLOPs.

    `training_flops`: forward and backward of one sequence as the DeepSeekMoE paper counts, three times the
    forward's products without the routers'. `kinds`: the forward's FLOPs by what is multiplied. `steps`: the
    forward, and before it the one with a single token of each sequence. `remarks` say what is not counted.
    """

    model: str
    batch: int
    seq: int
    dtypes: tuple[str, ...]
    parameters: Parameters
    flops: int
    training_flops: int
    kinds: tuple[tuple[str, int], ...]
    parts: tuple[Part, ...]
    gpu: str
    steps: tuple[Step, ...]
    remarks: tuple[str, ...]

    def to_json(self) -> str:
        """One record; what is computed from its fields is in it, too."""
        record: dict[str, Any] = asdict(self)
        record["kinds"] = dict(self.kinds)
        for each, part in zip(record["parts"], self.parts, strict=True):
            each["share"] = part.total / self.flops if self.flops else 0.0
        for each, one in zip(record["steps"], self.steps, strict=True):
            each |= {
                "tokens": one.tokens,
                "weight_bytes_per_token": one.bytes_per_token,
                "intensity": one.intensity,
                "seconds": one.seconds,
                "bound": one.bound,
            }
        return json.dumps(record, indent=2)


def cost_of(
    graph: ProgramGraph, report: Report, *, batch: int = 1, seq: int | None = None, gpu: str = USUAL_GPU
) -> Cost:
    """The cost of a graph after its passes; `seq` None: 4096, or the most the model takes.

    Raises InputError where the model takes no such sizes, or the catalogue has no such GPU.
    """
    _require_positive(batch=batch, seq=seq)
    on = ceilings(named(gpu))
    sizes = sizes_at(graph.exported, batch, seq)
    tensors, worked = held(graph), work_of(graph, sizes)
    routings = [routing_of(node) for node in fused_ops(graph)]
    steps = [step(worked, sizes, tensors, routings, on)]
    if (short := _one_token(graph, sizes)) is not None:
        steps.insert(0, step(work_of(graph, short), short, tensors, routings, on))
    kinds = Counter({kind: 0 for kind in KINDS})
    for work in worked.works:
        kinds[work.kind] += work.flops
    return Cost(
        model=report.model,
        batch=sizes.batch,
        seq=sizes.length,
        dtypes=_dtypes(worked),
        parameters=_parameters(tensors),
        flops=worked.flops,
        training_flops=(1 + BACKWARD) * (worked.flops - kinds["router"]) // max(sizes.batch, 1),
        kinds=tuple((kind, flops) for kind, flops in kinds.items() if flops),
        parts=parts_of(graph, report, worked, sizes, tensors),
        gpu=on.name,
        steps=tuple(steps),
        remarks=tuple(_remarks(report, worked, sizes)),
    )


def parameters_of(graph: ProgramGraph) -> Parameters:
    """Those of a graph after its passes, alone."""
    return _parameters(held(graph))


def _require_positive(**given: int | None) -> None:
    for name, value in given.items():
        if value is not None and value < 1:
            raise InputError(f"{name}={value}: give a positive number")


def _one_token(graph: ProgramGraph, sizes: Sizes) -> Sizes | None:
    """The sizes of a step with one token of each sequence, where that is another one and can be."""
    if sizes.length == 1:
        return None
    try:
        found = sizes_at(graph.exported, sizes.batch, 1)
    except ShapeError:
        return None
    return found if found.tokens < sizes.tokens else None


def _parameters(tensors: Sequence[Held]) -> Parameters:
    own = [tensor for tensor in tensors if tensor.is_parameter]
    return Parameters(
        total=sum(tensor.numel for tensor in own),
        activated=int(sum(tensor.activated for tensor in own)),
        lookup=sum(tensor.numel for tensor in own if tensor.rows is not None),
    )


def _dtypes(worked: Worked) -> tuple[str, ...]:
    """Those that are multiplied, most FLOPs first."""
    found = Counter[str]()
    for work in worked.works:
        found[work.dtype] += work.flops
    return tuple(dtype for dtype, _ in found.most_common())


def _remarks(report: Report, worked: Worked, sizes: Sizes) -> Iterator[str]:
    reasons = dict[str, list[str]]()
    for unknown in worked.unknown:
        reasons.setdefault(unknown.why, []).append(".".join(unknown.module) or WHOLE_MODEL)
    for why, places in reasons.items():
        many = "1 product is" if len(places) == 1 else f"{len(places)} products are"
        yield f"{many} not counted, {why}: {collapse(places)}"
    if refused := [layer.name or WHOLE_MODEL for layer in report.layers if not layer.fused]:
        yield f"not fused, counted as written and with all experts activated: {collapse(refused)}"
    written = [x.name or WHOLE_MODEL for x in report.layers if x.fused and x.spec and x.spec.router is None]
    if written:
        yield f"routers that stayed as written count as other products do: {collapse(written)}"
    if sizes.kept:
        yield f"as it was captured, {', '.join(sizes.kept)}"
