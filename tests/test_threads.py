"""Several models, several threads: graphs and numbers are those of one thread, and nothing is left behind."""

import logging
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dsmoe_compiler as dsmoe
from dsmoe_compiler.ir.graph import ProgramGraph
from dsmoe_compiler.ir.printer import print_graph
from dsmoe_compiler.turns import TURN
from tests.process_state import differences, process_state
from tests.tiny_models import Experts, SeparateExperts, relative, tiny, tokens

x_TD = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
ids_BL = tokens(2, 5)


@pytest.fixture(autouse=True)
def _many_switches() -> Iterator[None]:
    """Threads take turns fifty times as often as they would."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(interval)


def together(*work: Callable[[], Any]) -> list[Any]:
    """What each returns, all started at once; the first exception is raised."""
    ready = threading.Barrier(len(work))

    def start(one: Callable[[], Any]) -> Any:
        ready.wait()
        return one()

    with ThreadPoolExecutor(len(work)) as pool:
        return [each.result() for each in [pool.submit(start, one) for one in work]]


def run(program: dsmoe.Program, x: Tensor) -> Tensor:
    """Without gradients."""
    with torch.no_grad():
        out: Tensor = program(x)
    return out


def text(program: dsmoe.Program) -> str:
    """The whole program, printed."""
    return print_graph(ProgramGraph(program.exported))


def repeated(
    program: dsmoe.Program, x: Tensor, expected: Tensor, until: threading.Event, least: int = 4
) -> int:
    """Run until told to stop, but a few times; how often."""
    times = 0
    with torch.no_grad():
        while times < least or not until.is_set():
            assert program(x).equal(expected)
            times += 1
            time.sleep(0.01)  # on few cores a loop that never rests starves the thread it runs beside
    return times


@pytest.mark.parametrize("layer", [Experts, SeparateExperts])
def test_ten_threads_compile_what_one_does(layer: Callable[[], nn.Module]) -> None:
    """Six of them the same two objects, four of them models of their own."""
    shared, x = (tiny(), layer()), (ids_BL, x_TD)
    texts = [text(dsmoe.compile(shared[i], (x[i],), verify="off")) for i in (0, 1)]
    models = [*shared * 3, tiny(), layer(), tiny(), layer()]
    with torch.no_grad():
        expected = [model(x[i % 2]) for i, model in enumerate(models)]

    def one(i: int) -> dsmoe.Program:
        return dsmoe.compile(models[i], (x[i % 2],), verify="numeric" if i < 2 else "off")

    for i, program in enumerate(together(*(partial(one, i) for i in range(10)))):
        assert text(program) == texts[i % 2]
        assert relative(run(program, x[i % 2]), expected[i]) < 1e-5


def test_inspect_and_compile_and_save_and_load_at_once(tmp_path: Path) -> None:
    """torch's serialiser refuses to work in two threads at once, and its tracer to be traced with."""
    programs = [dsmoe.compile(Experts(), (x_TD,), verify="off") for _ in "abc"]
    with torch.no_grad():
        expected = programs[0](x_TD)

    def again(i: int) -> Tensor:
        for _ in range(3):
            programs[i].save(tmp_path / f"{i}.pt2")
            loaded = dsmoe.load(tmp_path / f"{i}.pt2")
        return run(loaded, x_TD)

    def report() -> int:
        return dsmoe.inspect(Experts(), (x_TD,)).fused

    def compiled() -> Tensor:
        return run(dsmoe.compile(Experts(), (x_TD,)), x_TD)

    fused, new, *loaded = together(report, compiled, *(partial(again, i) for i in range(3)))
    assert fused == 1 and all(t.equal(expected) for t in (new, *loaded))


def test_one_file_saved_by_many(tmp_path: Path) -> None:
    """Each writes a whole file; whoever comes last has the name."""
    programs = [dsmoe.compile(Experts(hidden=hidden), (x_TD,), verify="off") for hidden in (4, 8)]
    with torch.no_grad():
        expected = [program(x_TD) for program in programs]
    together(*(partial(p.save, tmp_path / "p.pt2") for p in programs * 3))
    with torch.no_grad():
        found = dsmoe.load(tmp_path / "p.pt2")(x_TD)
    assert any(found.equal(t) for t in expected) and len(list(tmp_path.iterdir())) == 1


def test_a_program_runs_while_another_is_compiled() -> None:
    program, model = dsmoe.compile(tiny(), (ids_BL,), verify="off"), tiny()
    with torch.no_grad():
        expected, done = program(ids_BL), threading.Event()

    def compile_twice() -> dsmoe.Program:
        try:
            dsmoe.inspect(Experts(), (x_TD,))
            return dsmoe.compile(model, (ids_BL,))
        finally:
            done.set()

    other, times = together(compile_twice, lambda: repeated(program, ids_BL, expected, done))
    with torch.no_grad():
        assert times > 4 and other(ids_BL).equal(expected)


def test_a_program_of_the_very_model_that_is_being_compiled_again() -> None:
    """Tracing puts fake tensors into the model, and the program shares the model's."""
    model = Experts()
    program, done = dsmoe.compile(model, (x_TD,), verify="off"), threading.Event()
    with torch.no_grad():
        expected = program(x_TD)

    def again() -> None:
        try:
            for _ in range(3):
                dsmoe.compile(model, (x_TD,))
        finally:
            done.set()

    assert together(again, lambda: repeated(program, x_TD, expected, done))[1] > 4


def test_a_loaded_programs_first_call_waits_for_no_wrong_moment(tmp_path: Path) -> None:
    """It is lowered then, which looks into modules, while tracing has changed how modules are looked into."""
    saved, path = dsmoe.compile(Experts(), (x_TD,), verify="off"), tmp_path / "p.pt2"
    saved.save(path)
    with torch.no_grad():
        expected = saved(x_TD)
    programs = [dsmoe.load(path) for _ in range(4)]

    # Twice each: both threads find it not lowered yet.
    work = [partial(run, p, x_TD) for p in programs for _ in "ab"]
    _, *found = together(lambda: dsmoe.compile(tiny(), (ids_BL,)), *work)
    assert all(t.equal(expected) for t in found)


def test_lowering_waits_for_its_turn_and_running_does_not(tmp_path: Path) -> None:
    """As a thread in `compile` would, this one holds the turn."""
    program = dsmoe.compile(Experts(), (x_TD,), verify="off")
    program.save(tmp_path / "p.pt2")
    loaded, done = dsmoe.load(tmp_path / "p.pt2"), list[Tensor]()
    with TURN:
        first = threading.Thread(target=lambda: done.append(run(loaded, x_TD)))
        first.start()
        first.join(0.5)
        assert done == []
        lowered = threading.Thread(target=lambda: done.append(run(program, x_TD)))
        lowered.start()
        lowered.join(30)
        assert len(done) == 1
    first.join(30)
    assert done[0].equal(done[1])


def test_programs_run_side_by_side() -> None:
    """Two threads a program, each with inputs of its own sizes."""
    models: list[tuple[nn.Module, Tensor]] = [(tiny(), ids_BL), (Experts(), x_TD), (Experts(16, 20, 4), x_TD)]
    work = list[Callable[[], int]]()
    for model, x in models:
        program = dsmoe.compile(model, (x,), verify="off")
        for rows in (x, x[:1]):
            with torch.no_grad():
                expected = program(rows)
                assert relative(expected, model(rows)) < 1e-5
            done = threading.Event()
            done.set()
            work.append(partial(repeated, program, rows, expected, done, 60))
    assert together(*work) == [60] * 6


def test_gradients_side_by_side() -> None:
    """Threads with gradients beside threads without: grad mode is a thread's own."""
    model = Experts()
    program = dsmoe.compile(model, (x_TD,), verify="off")
    with torch.no_grad():
        expected = program(x_TD)

    def gradient() -> Tensor:
        x = x_TD.clone().requires_grad_()
        (found,) = torch.autograd.grad(program(x).square().sum(), x)
        return found

    alone = gradient()
    found = together(*(gradient, partial(run, program, x_TD)) * 4)
    assert all(t.allclose(alone, atol=1e-6) for t in found[::2])
    assert all(t.equal(expected) for t in found[1::2])


@pytest.mark.slow
def test_the_same_text_in_every_process() -> None:
    """Whatever order Python's sets have there."""
    script = (
        "import torch, dsmoe_compiler as dsmoe\n"
        "from dsmoe_compiler.ir.graph import ProgramGraph\n"
        "from dsmoe_compiler.ir.printer import print_graph\n"
        "from tests.tiny_models import SeparateExperts, tiny\n"
        "for _ in range(2):\n"
        "    for model, x in (tiny(), torch.ones(2, 5).long()), (SeparateExperts(), torch.ones(5, 16)):\n"
        "        print(print_graph(ProgramGraph(dsmoe.compile(model, (x,), verify='off').exported)))"
    )
    texts = list[str]()
    for seed in "01":
        done = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parents[1],
            env={"PYTHONHASHSEED": seed, "PATH": "", "OMP_NUM_THREADS": "1"},
        )
        texts += [done.stdout[: len(done.stdout) // 2], done.stdout[len(done.stdout) // 2 :]]
    assert len(set(texts)) == 1 and "dsmoe.moe" in texts[0].replace("::", ".")


class _Loud(nn.Module):
    """Changes what a process has one of, in every call."""

    def forward(self, x: Tensor) -> Tensor:
        warnings.warn("loud", stacklevel=1)
        torch.manual_seed(3)
        self.seen = x
        return x + torch.rand_like(x) * 0


def _refused(x: Tensor) -> Tensor:
    return x[x[:, :5].topk(2).indices].cumsum(0).sum(1)


LINEAR = nn.Linear(16, 4)
FAILS = ("one that cannot be captured", "one that fails", "one that is refused", "load nothing")
WORK: dict[str, Callable[[Path], object]] = {
    "compile": lambda _: dsmoe.compile(tiny(), (ids_BL,)),
    "compile as written": lambda _: dsmoe.compile(Experts(), (x_TD,), capture="as_written"),
    "a function": lambda _: dsmoe.compile(lambda x: x.sin() + 1, (x_TD,)),
    "a loud model": lambda _: dsmoe.compile(_Loud(), (x_TD,)),
    "one that cannot be captured": lambda _: dsmoe.compile(lambda x: x if x.sum() > 0 else -x, (x_TD,)),
    "one that fails": lambda _: dsmoe.compile(LINEAR, (x_TD[:, :3],)),
    "one that is refused": lambda _: dsmoe.compile(_refused, (x_TD,), require_fused=True),
    "inspect": lambda _: dsmoe.inspect(tiny(), (ids_BL,)),
    "save and load": lambda path: _saved_and_loaded(path),
    "load nothing": lambda path: dsmoe.load(path),
}


def _saved_and_loaded(path: Path) -> Tensor:
    dsmoe.compile(Experts(), (x_TD,), verify="off").save(path)
    loaded: Tensor = dsmoe.load(path)(x_TD)
    return loaded


@pytest.fixture(scope="module")
def _torch_has_set_itself_up() -> None:
    """Its logging and its patches of the first use are not ours."""
    torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),))


@pytest.mark.usefixtures("_torch_has_set_itself_up")
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("what", WORK)
def test_nothing_is_left_behind(what: str, grad: bool, tmp_path: Path) -> None:
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = process_state()
        with pytest.raises(dsmoe.DsmoeError) if what in FAILS else nullcontext():
            WORK[what](tmp_path / "p.pt2")
        assert differences(before, process_state()) == {}


def test_what_would_be_left_behind_is_seen() -> None:
    """The test above can fail."""
    before, generator = process_state(), torch.get_rng_state()
    logger, call = logging.getLogger("torch.export"), nn.Module.__call__
    level = logger.level
    try:
        torch.set_default_dtype(torch.float64)
        logger.setLevel(logging.CRITICAL + 7)
        nn.Module.__call__ = lambda self, *args: call(self, *args)  # type: ignore[method-assign]
        torch.rand(1)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("always")
            found = differences(before, process_state())
    finally:
        torch.set_default_dtype(torch.float32)
        logger.setLevel(level)
        nn.Module.__call__ = call  # type: ignore[method-assign]
        torch.set_rng_state(generator)
    assert found.keys() == {"default dtype", "levels", "attributes", "random", "filters", "gradients"}
    assert differences(before, process_state()) == {}
