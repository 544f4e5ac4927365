"""What understanding and compiling a model cost.

    python -m benchmarks.compile_cost [--quick] [--json PATH]

1. `inspect` of the 16B and the 145B on the meta device against a bare torch.export.export of the same model:
   CPU seconds, each in a process of its own, taking turns; and the peak memory of `inspect`.
2. `compile`, every rewrite checked on numbers, as layers double and as experts grow sixteenfold: CPU seconds
   in one process, the sizes taking turns. One thread: OpenMP's threads burn CPU seconds while they wait.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import dsmoe_compiler
from benchmarks.measure import Target, finish, in_fresh_process, wide_console
from benchmarks.one_capture import Cost
from dsmoe_compiler.models.config import DeepSeekMoEConfig
from dsmoe_compiler.models.deepseek_moe import DeepSeekMoEForCausalLM
from dsmoe_compiler.models.random_weights import randomise

MOE_LAYERS = {"deepseek-moe-16b": 27, "deepseek-moe-145b": 61}
INSPECT_RATIO, INSPECT_MEGABYTES = 1.8, 2000.0
LAYERS_RATIO, EXPERTS_RATIO = 2.3, 1.3
# (layers, experts): the second doubles the first's layers, the third has 16 times its experts.
SIZES = ((12, 16), (24, 16), (12, 256))


@dataclass(frozen=True)
class InspectCost:
    """One model: every round's bare export and inspection."""

    model: str
    export: tuple[Cost, ...]
    inspect: tuple[Cost, ...]

    def seconds(self, what: str, *, imports: bool) -> float:
        """The median CPU seconds of "export" or "inspect", with or without importing what they need."""
        costs = self.export if what == "export" else self.inspect
        return statistics.median(c.call_seconds + imports * c.import_seconds for c in costs)

    def ratio(self, *, imports: bool) -> float:
        """How many times the CPU seconds of a bare export `inspect` takes."""
        return self.seconds("inspect", imports=imports) / self.seconds("export", imports=imports)

    @property
    def megabytes(self) -> float:
        """The peak resident memory of inspect in the worst round."""
        return max(c.peak_megabytes for c in self.inspect)

    @property
    def fused(self) -> int:
        """The MoE layers fused in the worst round."""
        return min(c.fused for c in self.inspect)


@dataclass(frozen=True)
class CompileCost:
    """One model size: the CPU seconds of every round, and the median wall seconds of each pass."""

    family: str
    layers: int
    experts: int
    seconds: tuple[float, ...]
    passes: Mapping[str, float]

    @property
    def median(self) -> float:
        """The median CPU seconds."""
        return statistics.median(self.seconds)


def inspect_costs(rounds: int, console: Console) -> list[InspectCost]:
    """Export and inspect by turns, each in a process of its own."""
    found: dict[tuple[str, str], list[Cost]] = {(m, w): [] for m in MOE_LAYERS for w in ("export", "inspect")}
    for i in range(rounds):
        for (model, what), costs in found.items():
            with console.status(f"round {i + 1} of {rounds}: {what} {model}"):
                costs.append(Cost(**in_fresh_process("benchmarks.one_capture", what, model)))
    return [InspectCost(m, tuple(found[m, "export"]), tuple(found[m, "inspect"])) for m in MOE_LAYERS]


def deepseek(layers: int, experts: int) -> nn.Module:
    """DeepSeekMoE with small random weights: D=128, F=64, K=4, S=2."""
    config = DeepSeekMoEConfig(
        hidden_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        vocab_size=512,
        n_routed_experts=experts,
        n_shared_experts=2,
        num_experts_per_tok=4,
        moe_intermediate_size=64,
    )
    model = DeepSeekMoEForCausalLM(config).eval()
    randomise(model, seed=0)
    return model


def qwen3(layers: int, experts: int) -> nn.Module:
    """Transformers' Qwen3-MoE of the same sizes."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=512,
        num_experts=experts,
        num_experts_per_tok=4,
        moe_intermediate_size=64,
        use_cache=False,
    )
    config.head_dim = 32
    model: nn.Module = Qwen3MoeForCausalLM(config)
    return model.eval()


def compile_costs(
    family: str, build: Callable[[int, int], nn.Module], rounds: int, console: Console
) -> list[CompileCost]:
    """Compile every size once a round."""
    ids = torch.randint(512, (3, 11), generator=torch.Generator().manual_seed(0))
    _compile(build(2, 4), ids)  # first calls import and warm up
    seconds: dict[tuple[int, int], list[float]] = {size: [] for size in SIZES}
    passes: dict[tuple[int, int], list[Mapping[str, float]]] = {size: [] for size in SIZES}
    for i in range(rounds):
        for layers, experts in SIZES:
            with console.status(f"round {i + 1} of {rounds}: compile {family}, {layers} layers, E={experts}"):
                spent, of_passes = _compile(build(layers, experts), ids)
            seconds[layers, experts].append(spent)
            passes[layers, experts].append(of_passes)
    by_pass = {s: {n: statistics.median(p[n] for p in passes[s]) for n in passes[s][0]} for s in SIZES}
    return [CompileCost(family, *size, tuple(seconds[size]), by_pass[size]) for size in SIZES]


def _compile(model: nn.Module, ids: Tensor) -> tuple[float, Mapping[str, float]]:
    start = time.process_time()
    program = dsmoe_compiler.compile(model, (), {"input_ids": ids}, require_fused=True)
    spent = time.process_time() - start
    return spent, {p.name: p.seconds for p in program.report.passes}


def targets(inspections: Sequence[InspectCost], compiles: Sequence[CompileCost]) -> list[Target]:
    """What the figures are held to."""
    found = []
    for cost in inspections:
        found += [
            Target(f"{cost.model}: inspect / export, CPU s", cost.ratio(imports=False), INSPECT_RATIO),
            Target(f"{cost.model}: the same with imports", cost.ratio(imports=True), INSPECT_RATIO),
            Target(f"{cost.model}: peak MB of inspect", cost.megabytes, INSPECT_MEGABYTES),
            Target(f"{cost.model}: MoE layers fused", cost.fused, MOE_LAYERS[cost.model], at_least=True),
        ]
    for small, deep, wide in zip(compiles[::3], compiles[1::3], compiles[2::3], strict=True):
        found += [
            Target(f"{small.family}: compile, 24 layers / 12", deep.median / small.median, LAYERS_RATIO),
            Target(f"{small.family}: compile, E=256 / E=16", wide.median / small.median, EXPERTS_RATIO),
        ]
    return found


def print_inspections(console: Console, costs: Sequence[InspectCost]) -> None:
    """One row a model; medians."""
    table = Table("model", title="inspect against a bare export: CPU seconds, medians", title_justify="left")
    timed = ("export", "inspect", "ratio")
    for column in (*timed, *(f"{name}, with imports" for name in timed), "peak MB", "fused"):
        table.add_column(column, justify="right")
    for c in costs:
        cells = []
        for imports in (False, True):
            cells += [f"{c.seconds(what, imports=imports):.2f}" for what in ("export", "inspect")]
            cells.append(f"{c.ratio(imports=imports):.2f}")
        table.add_row(c.model, *cells, f"{c.megabytes:.0f}", f"{c.fused} of {c.inspect[0].layers}")
    console.print(table)


def print_compiles(console: Console, costs: Sequence[CompileCost]) -> None:
    """One row a size; each pass's share of the wall time."""
    names = list(dict.fromkeys(name for c in costs for name in c.passes))
    table = Table(
        "model",
        "layers",
        "E",
        "CPU s",
        title="compile: median CPU seconds, and each pass's share",
        title_justify="left",
    )
    for name in names:
        table.add_column(name, justify="right")
    for c in costs:
        whole = sum(c.passes.values())
        shares = [f"{c.passes.get(name, 0.0) / whole:.0%}" for name in names]
        table.add_row(c.family, str(c.layers), str(c.experts), f"{c.median:.2f}", *shares)
    console.print(table)


@click.command(help="What understanding and compiling a model cost.")
@click.option("--quick", is_flag=True, help="One round of everything.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the figures to this file.")
def main(quick: bool, path: Path | None) -> None:
    torch.set_num_threads(1)
    console, rounds = wide_console(), 1 if quick else 3
    inspections = inspect_costs(rounds, console)
    print_inspections(console, inspections)
    compiles = compile_costs("DeepSeekMoE", deepseek, rounds, console)
    if find_spec("transformers"):
        compiles += compile_costs("transformers Qwen3-MoE", qwen3, rounds, console)
    print_compiles(console, compiles)
    results = {"inspect": [asdict(c) for c in inspections], "compile": [asdict(c) for c in compiles]}
    raise SystemExit(finish(console, "compile_cost", results, targets(inspections, compiles), path))


if __name__ == "__main__":
    main()
