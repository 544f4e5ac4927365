"""One layer at one number of tokens: ways are checked against eager, the hopeless left out, the rest timed.

T tokens, K experts per token.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.cpu_floor import Probes, Rates, layer_floor, routed_floor
from benchmarks.cpu_shapes import Shape
from benchmarks.cpu_ways import OURS, ROUTED, Input, Way, inputs
from benchmarks.measure import Rounds, interleaved

# Of an answer, relative to its size: sums in another order, and in bfloat16 other roundings between them.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
HOPELESS = 5  # times the fastest: what takes longer when warmed up cannot be the best
_GATHERED = 2e9  # bytes: what gathers more, a matrix for every pair, is hopeless and may not fit into memory
_AWAKE = 16  # tokens up to which a call is so short that waking threads would show
_REST = 0.03  # seconds after which the threads of another way no longer spin
_TRIES, _LONG = 4, 0.5  # calls before one is hopeless, and seconds that need no second thought
_ROUNDS, _LEAST_SECONDS = 100, 1.0  # at most so many rounds, for at least so long


@dataclass(frozen=True)
class Subject:
    """A layer's copies in memory and the ways to run them; `absent`: ways that there are none of, and why."""

    shape: Shape
    dtype: torch.dtype
    layers: Sequence[nn.Module]
    ways: Sequence[Way]
    probes: Probes
    absent: Mapping[str, str]


@dataclass(frozen=True)
class Figure:
    """One way: median milliseconds, how many times the floor (the routed experts' where it runs only those),
    how many times faster ours is, the distance of the quartiles, relative to the median, and how many of its
    layers took turns.
    """

    milliseconds: float
    over_floor: float
    ours_faster: float
    spread: float
    layers: int


@dataclass(frozen=True)
class Case:
    """All ways to run a layer at T tokens. `touched`: experts with tokens, on average; `routed_floor` of the
    routed experts alone and `layer_floor` in milliseconds; `best`: the fastest of the others; `rounds` are
    those kept, `discarded` the more disturbed ones.
    """

    shape: str
    dtype: str
    tokens: int
    touched: float
    rates: Rates
    routed_floor: float
    layer_floor: float
    figures: Mapping[str, Figure]
    best: str
    left_out: Mapping[str, str]
    rounds: int
    discarded: int


def measure(subject: Subject, tokens: int, seconds: float) -> Case:
    """Check, warm up, and take turns for what is left of `seconds`: for half of them at least, as the first
    call of a compiled way may take them all.

    Raises RuntimeError where our own answer is wrong.
    """
    start = time.perf_counter()
    given = inputs(subject.layers[0], tokens, count=max(4, min(64, 1024 // tokens)))
    ways, left_out = _worth_timing(subject, tokens, given)
    place = {way.name: i for i, way in enumerate(ways)}

    def turn(way: Way, ahead: int) -> Callable[[int], Tensor]:
        # Each way meets every input and every layer, but not what another has used a few rounds ago.
        at = place[way.name]
        return lambda i: way.runs[(i + at + ahead) % len(way.runs)](given[(i + 5 * at + ahead) % len(given)])

    calls: dict[str, Callable[[int], object]] = {way.name: turn(way, 0) for way in ways}
    before = {way.name: _prepared(way, turn(way, len(given) // 2), tokens) for way in ways}
    if tokens <= _AWAKE:
        before |= subject.probes.ahead
    calls |= subject.probes.calls
    found = interleaved(
        calls,
        _ROUNDS,
        budget_seconds=max(_LEAST_SECONDS, seconds / 2, seconds - (time.perf_counter() - start)),
        before=before,
    )
    return _case(subject, tokens, statistics.mean(i.touched for i in given), found, left_out)


def _case(subject: Subject, tokens: int, touched: float, found: Rounds, left_out: Mapping[str, str]) -> Case:
    shape, dtype = subject.shape, subject.dtype
    rates = subject.probes.rates(found)
    routed, whole = (f(shape, dtype, tokens, touched, rates) for f in (routed_floor, layer_floor))
    figures, layers = {}, {way.name: len(way.runs) for way in subject.ways}
    for name in (name for name in found.seconds if name in layers):
        median, floor = found.median(name), routed if name == ROUTED else whole
        lower, _, upper = statistics.quantiles(found.seconds[name], n=4)
        figures[name] = Figure(
            1e3 * median, median / floor, found.ratio(name, OURS), (upper - lower) / median, layers[name]
        )
    others = [name for name in figures if name not in (OURS, ROUTED)]
    return Case(
        shape.name,
        str(dtype).removeprefix("torch."),
        tokens,
        touched,
        rates,
        1e3 * routed,
        1e3 * whole,
        figures,
        min(others, key=found.median),
        left_out,
        found.kept,
        found.discarded,
    )


def _worth_timing(subject: Subject, tokens: int, given: Sequence[Input]) -> tuple[list[Way], dict[str, str]]:
    """The ways that are right and not hopeless, and why others are not among them."""
    left_out, warm = dict(subject.absent), list[Way]()
    wanted, experts = _wanted(subject, given[0])
    gathered = tokens * subject.shape.top_k * subject.shape.expert_numbers * subject.dtype.itemsize
    for way in subject.ways:
        if way.gathers and gathered > _GATHERED:
            left_out[way.name] = f"would gather {gathered / 1e9:.0f} GB of weights"
        elif wrong := _what_is_wrong(
            way, given[0], experts if way.name == ROUTED else wanted, TOLERANCE[subject.dtype]
        ):
            if way.ours:
                raise RuntimeError(f"{subject.shape.name}, {subject.dtype}, T={tokens}: {way.name} {wrong}")
            left_out[way.name] = wrong
        else:
            warm.append(way)
    seconds = {way.name: min(_seconds(way, given[-1]) for _ in range(2)) for way in warm}
    fastest = min(seconds[way.name] for way in warm if not way.ours)
    for way in warm:
        again = _TRIES  # a disturbed call seems hopeless
        while again and seconds[way.name] > HOPELESS * fastest:
            seconds[way.name] = min(seconds[way.name], _seconds(way, given[-1]))
            again = 0 if seconds[way.name] > _LONG else again - 1
        if seconds[way.name] > HOPELESS * fastest and not way.ours:
            left_out[way.name] = f"{seconds[way.name] / fastest:.0f} times the fastest"
    return [way for way in warm if way.name not in left_out], left_out


def _wanted(subject: Subject, i: Input) -> tuple[Tensor, Tensor]:
    """What the layer itself answers, and its experts, run as its model's code has it: one after another."""
    layer = subject.layers[0]
    assert isinstance(layer.experts, nn.Module)
    return layer(i.x), layer.experts(i.x[0], i.ids, i.weights)


def _what_is_wrong(way: Way, i: Input, wanted: Tensor, tolerance: float) -> str:
    """Empty where the answer is right."""
    try:
        answer = way.runs[0](i)
    except RuntimeError as e:
        return f"{type(e).__name__}: {(str(e).strip() or 'no message').splitlines()[0][:100]}"
    wanted = wanted.float().flatten()
    error = ((answer.float().flatten() - wanted).norm() / wanted.norm()).item()
    return "" if error <= tolerance else f"is off by {error:.1e} from eager"


def _prepared(way: Way, call: Callable[[int], object], tokens: int) -> Callable[[int], object]:
    """Other threads have stopped spinning; where calls are short, one on other tokens has woken the way's."""

    def prepare(i: int) -> None:
        if way.own_threads:
            time.sleep(_REST)
        if tokens <= _AWAKE:
            call(i)

    return prepare


def _seconds(way: Way, i: Input) -> float:
    start = time.perf_counter()
    way.runs[-1](i)
    return time.perf_counter() - start
