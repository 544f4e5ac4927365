"""Compiled against eager and against transformers on a CPU: the demo model, and single MoE layers.

    python -m benchmarks.cpu_layers [--quick] [--one-thread] [--json PATH]

The eager loop is the zoo's own, as DeepSeek and transformers write it: one expert after another, each on the
tokens that chose it. Layers take turns with other layers' weights and other tokens, as in a whole model, so
that no figure tells of weights that a cache happened to hold. Every answer is compared with eager's first.

`--one-thread` measures CPU seconds of one thread: other programs on the machine hardly change those, while
threads that wait for each other are at the mercy of the scheduler.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import dsmoe_compiler
from benchmarks.measure import Target, finish, interleaved, wide_console
from benchmarks.peers import IMPLEMENTATIONS, with_transformers_experts
from dsmoe_compiler.models import zoo
from dsmoe_compiler.models.config import DeepSeekMoEConfig
from dsmoe_compiler.models.deepseek_moe import MoE
from dsmoe_compiler.models.random_weights import randomise

DEMO = "deepseek-moe-demo"
WIDTHS = ((768, 256), (1024, 704))  # D and F of the single layers; E=64, K=6, S=2 in all
ROUNDS = {1: 120, 16: 40, 128: 24, 1024: 12}  # by T
DTYPES = (torch.float32, torch.bfloat16)
TURNS = 4  # layers, and inputs, that take turns
# Of an answer, relative to its size: sums in another order, and in bfloat16 other roundings between them.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Subject:
    """What is measured: by candidate, the same model or models (taking turns), and an input of T tokens."""

    what: str
    dtype: torch.dtype
    candidates: Mapping[str, Sequence[Run]]
    example: Callable[[int, int], Tensor]  # (T, seed)


@dataclass(frozen=True)
class Case:
    """One subject at one T: each candidate's median milliseconds, and how many times faster than eager it is.

    `rounds` are those kept, `discarded` the more disturbed ones.
    """

    what: str
    dtype: str
    tokens: int
    milliseconds: Mapping[str, float]
    times_faster: Mapping[str, float]
    rounds: int
    discarded: int


def demo(dtype: torch.dtype) -> Subject:
    """The demo model, end to end, from ids to logits."""
    model = zoo.build(DEMO, dtype=dtype)
    candidates: dict[str, Sequence[Run]] = {"eager": [model]}
    for how in IMPLEMENTATIONS:
        twin = zoo.build(DEMO, device="meta", dtype=dtype)
        candidates[f"transformers {how}"] = [with_transformers_experts(model, twin, how)]
    candidates["compiled"] = [dsmoe_compiler.compile(model, (), zoo.example_inputs(DEMO), require_fused=True)]
    vocabulary = model.config.vocab_size

    def ids(tokens: int, seed: int) -> Tensor:
        return torch.randint(vocabulary, (1, tokens), generator=torch.Generator().manual_seed(seed))

    return Subject(DEMO, dtype, candidates, ids)


def layer(width: int, hidden: int, dtype: torch.dtype) -> Subject:
    """One MoE layer with its router and shared experts, out of several that take turns."""
    config = DeepSeekMoEConfig(
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=1,
        vocab_size=1,
        n_routed_experts=64,
        n_shared_experts=2,
        num_experts_per_tok=6,
        moe_intermediate_size=hidden,
    )

    def empty() -> MoE:
        with torch.device("meta"):
            return MoE(config).to(dtype).eval()

    def hidden_states(tokens: int, seed: int) -> Tensor:
        return torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(seed)).to(dtype)

    layers = [empty().to_empty(device="cpu") for _ in range(TURNS)]
    for seed, each in enumerate(layers):
        randomise(each, seed)
    candidates: dict[str, Sequence[Run]] = {"eager": layers}
    for how in IMPLEMENTATIONS:
        candidates[f"transformers {how}"] = [with_transformers_experts(each, empty(), how) for each in layers]
    example = (hidden_states(33, 0).view(3, 11, width),)
    candidates["compiled"] = [dsmoe_compiler.compile(each, example, require_fused=True) for each in layers]
    return Subject(f"layer D={width} F={hidden}", dtype, candidates, hidden_states)


def measure(subject: Subject, tokens: int, rounds: int, clock: Callable[[], float]) -> Case:
    """Every candidate once a round, none on the layer and tokens that another has just used.

    Raises RuntimeError on a wrong answer.
    """
    examples = [subject.example(tokens, seed) for seed in range(TURNS)]
    check_answers(subject, examples[0])

    def turn(runs: Sequence[Run], place: int) -> Callable[[int], Tensor]:
        return lambda i: runs[(i + place) % len(runs)](examples[(i + place) % TURNS])

    calls = {name: turn(runs, place) for place, (name, runs) in enumerate(subject.candidates.items())}
    found = interleaved(calls, rounds, clock)
    milliseconds = {name: 1e3 * found.median(name) for name in calls}
    times_faster = {name: found.ratio("eager", name) for name in calls if name != "eager"}
    dtype = str(subject.dtype).removeprefix("torch.")
    return Case(
        subject.what, dtype, tokens, milliseconds, times_faster, rounds - found.discarded, found.discarded
    )


def check_answers(subject: Subject, example: Tensor) -> None:
    """Raises RuntimeError when a candidate's answer is not eager's."""
    wanted = subject.candidates["eager"][0](example).float()
    for name, runs in subject.candidates.items():
        error = ((runs[0](example).float() - wanted).norm() / wanted.norm()).item()
        if not error <= TOLERANCE[subject.dtype]:
            raise RuntimeError(
                f"{subject.what}: {name} is off by {error:.1e} from eager on {tuple(example.shape)}"
            )


def subjects() -> Iterator[Subject]:
    """One at a time: each holds up to two gigabytes of weights."""
    for dtype in DTYPES:
        yield demo(dtype)
        for width, hidden in WIDTHS:
            yield layer(width, hidden, dtype)


def targets(cases: Sequence[Case]) -> list[Target]:
    """On the demo model, compiled is faster than either eager loop at every T."""
    return [
        Target(f"demo {c.dtype}, T={c.tokens}: compiled against {name}", ratio, 1.0, at_least=True)
        for c in cases
        if c.what == DEMO
        for name, ratio in _against_loops(c).items()
    ]


def _against_loops(case: Case) -> dict[str, float]:
    ours = case.times_faster["compiled"]
    theirs = case.times_faster.get("transformers eager")
    return {"eager": ours} if theirs is None else {"eager": ours, "transformers eager": ours / theirs}


def print_cases(console: Console, cases: Sequence[Case]) -> None:
    """One row a case: medians, and in brackets how many times faster than eager."""
    table = Table(
        title=f"median ms (times faster than eager), {torch.get_num_threads()} threads", title_justify="left"
    )
    for column in ("subject", "dtype"):
        table.add_column(column)
    for column in ("T", *cases[0].milliseconds, "rounds"):
        table.add_column(column, justify="right")
    for c in cases:
        cells = [_cell(ms, c.times_faster.get(name)) for name, ms in c.milliseconds.items()]
        last = c.tokens == max(ROUNDS)
        table.add_row(c.what, c.dtype, str(c.tokens), *cells, str(c.rounds), end_section=last)
    console.print(table)


def _cell(milliseconds: float, times_faster: float | None) -> str:
    return f"{milliseconds:.2f}" + ("" if times_faster is None else f" ({times_faster:.2f})")


@click.command(help="Compiled against eager and transformers on a CPU.")
@click.option("--quick", is_flag=True, help="A quarter of the rounds.")
@click.option("--one-thread", is_flag=True, help="CPU seconds of one thread instead of wall seconds.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the figures to this file.")
def main(quick: bool, one_thread: bool, path: Path | None) -> None:
    console, cases = wide_console(), list[Case]()
    clock = time.process_time if one_thread else time.perf_counter
    if one_thread:
        torch.set_num_threads(1)
    for subject in subjects():
        for tokens, rounds in ROUNDS.items():
            with console.status(f"{subject.what}, {subject.dtype}, T={tokens}"), torch.inference_mode():
                cases.append(measure(subject, tokens, rounds // 4 if quick else rounds, clock))
    print_cases(console, cases)
    results = {
        "threads": torch.get_num_threads(),
        "clock": "CPU" if one_thread else "wall",
        "cases": [asdict(c) for c in cases],
    }
    raise SystemExit(finish(console, "cpu_layers", results, targets(cases), path))


if __name__ == "__main__":
    main()
