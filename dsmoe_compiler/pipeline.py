"""The passes in execution order, each one's work checked before the next begins."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from dsmoe_compiler.instrument import Instrument, PassRun
from dsmoe_compiler.ir.errors import DsmoeError, InputError, Refusal
from dsmoe_compiler.ir.graph import ProgramGraph, erase_dead
from dsmoe_compiler.ir.passes import LayerFacts, Pass, PassLog, Remark, Replacement
from dsmoe_compiler.passes.fuse_router import FuseRouter
from dsmoe_compiler.passes.fuse_shared_experts import FuseSharedExperts
from dsmoe_compiler.passes.lift_experts import LiftExperts
from dsmoe_compiler.passes.normalize import Normalize
from dsmoe_compiler.pipeline_text import parse
from dsmoe_compiler.report.remarks import remarks_of
from dsmoe_compiler.report.report import LayerReport, Left, PassReport
from dsmoe_compiler.validate import Verdict, validate

Verify = Literal["numeric", "off"]
Progress = Callable[[str], None]

# Every pass that a pipeline's text can name, in execution order.
PASSES: Mapping[str, type[Pass]] = {
    each.name: each for each in (Normalize, LiftExperts, FuseRouter, FuseSharedExperts)
}
DEFAULT: tuple[Pass, ...] = (Normalize(), LiftExperts(), FuseRouter(), FuseSharedExperts())


class PassFailed(DsmoeError):
    """A pass raised or left an ill-formed graph: a bug, with the pass named."""


@dataclass(frozen=True)
class Outcome:
    """What a pipeline found and did."""

    layers: tuple[LayerReport, ...]
    passes: tuple[PassReport, ...]
    remarks: tuple[str, ...]


def steps_of(pipeline: Sequence[Pass] | str | None) -> tuple[Pass, ...]:
    """The passes to run: those given, those a text names, the default ones for None. Raises InputError."""
    if isinstance(pipeline, str):
        return parse(pipeline, PASSES)
    try:
        return DEFAULT if pipeline is None else tuple(pipeline)
    except TypeError as e:
        raise InputError(f"pipeline={pipeline!r}: give passes, or their names in a text") from e


def run(
    graph: ProgramGraph,
    passes: Sequence[Pass],
    verify: Verify,
    progress: Progress | None = None,
    instruments: Sequence[Instrument] = (),
) -> Outcome:
    """Run the passes over the graph, in place, watched by the instruments. Raises PassFailed naming the pass
    when one breaks.
    """
    check = verify == "numeric" and not graph.on_meta()
    log, reports = PassLog(), list[PassReport]()
    for step in passes:
        if progress:
            progress(step.name)
        for each in instruments:
            each.before(step, graph)
        ran = _run_one(graph, step, log, check)
        for each in instruments:
            each.after(step, graph, ran)
        reports.append(ran.report)
    layers = sorted(log.layers.values(), key=lambda f: f.order)
    told = tuple(_layer_report(f, log.remarks) for f in layers)
    return Outcome(told, tuple(reports), tuple(map(str, log.remarks)))


def _run_one(graph: ProgramGraph, step: Pass, log: PassLog, check: bool) -> PassRun:
    start, before, known = time.perf_counter(), len(graph.nodes), dict(log.layers)
    said = len(log.remarks)
    log.replacements.clear()
    try:
        changed = step.run(graph, log)
        verdicts = (
            [_checked(graph, step, log, i, known) for i in range(len(log.replacements))] if check else []
        )
        erase_dead(graph.graph, [c.old for c in log.replacements])
        graph.graph.lint()
        graph.exported.graph_module.recompile()
    except DsmoeError:
        raise
    except Exception as e:
        raise PassFailed(f"pass {step.name} failed: {type(e).__name__}: {e}") from e
    errors = [v.error for v in verdicts if v.passed]
    error = max(errors) if errors else None
    seconds = time.perf_counter() - start
    return PassRun(
        PassReport(step.name, seconds, before, len(graph.nodes), changed, error),
        found=len(log.layers.keys() - known.keys()),
        replaced=len(log.replacements),
        taken_back=sum(not v.passed for v in verdicts),
        remarks=remarks_of(step.name, known, log.layers, log.remarks[said:]),
        layers=tuple(sorted(log.layers.values(), key=lambda f: f.order)),
        changes=tuple(c for i, c in enumerate(log.replacements) if not verdicts or verdicts[i].passed),
    )


def _checked(
    graph: ProgramGraph, step: Pass, log: PassLog, which: int, known: dict[str, LayerFacts]
) -> Verdict:
    """Check one replacement; one that fails is taken back, also as a later one's input, and its layer says
    so.
    """
    change = log.replacements[which]
    verdict = validate(graph, change)
    if not verdict.passed:
        change.new.replace_all_uses_with(change.old)
        for i, later in enumerate(log.replacements[which + 1 :], which + 1):
            inputs = tuple(change.old if n is change.new else n for n in later.inputs)
            log.replacements[i] = replace(later, inputs=inputs)
        refusal = _refusal(step, change, verdict)
        facts, earlier = log.layers[change.layer], known.get(change.layer)
        if earlier is not None and earlier.spec is not None:
            log.layer(replace(earlier, remarks=(*earlier.remarks, str(refusal))))
        else:
            log.layer(replace(facts, spec=None, op="", refusal=replace(refusal, source=facts.source)))
    return verdict


def _refusal(step: Pass, change: Replacement, verdict: Verdict) -> Refusal:
    if verdict.has_nan:
        return Refusal("R305", "its weights hold NaN, so no rewrite can be checked", change.old.name)
    if verdict.outside:
        because = f"it reads a size that depends on %{verdict.outside}, so no rewrite of it can be checked"
        return Refusal(change.refused, because, change.old.name)
    because = (
        f"pass {step.name} changed the answer: relative error {verdict.error:.1e}, "
        f"{verdict.allowed:.1e} is what rounding explains"
    )
    return Refusal(change.refused, because, change.old.name)


def _layer_report(facts: LayerFacts, said: Sequence[Remark]) -> LayerReport:
    left = tuple(Left(r.text, r.refusal) for r in said if r.layer == facts.name)
    what = (facts.name, facts.idiom, facts.fused, facts.spec, facts.refusal, facts.source, facts.remarks)
    return LayerReport(*what, facts.explanation, left, facts.op)
