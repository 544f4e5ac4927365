"""compile and inspect: what they take, what they report, and models without weights."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dsmoe_compiler as dsmoe
from dsmoe_compiler.ir.graph import ProgramGraph
from dsmoe_compiler.ir.printer import print_graph
from dsmoe_compiler.models.zoo import build
from dsmoe_compiler.runtime.lower import BACKENDS
from tests.tiny_models import Experts, relative, tiny, tokens

x_TD = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))


class _Half(nn.Module):
    """One layer that is understood, one whose ids select rows of nothing the compiler knows."""

    def __init__(self) -> None:
        super().__init__()
        self.good, self.table = Experts(), nn.Parameter(torch.randn(8, 16))

    def forward(self, x: Tensor) -> Tensor:
        ids = x[:, :8].topk(2).indices
        return self.good(x) + torch.cumsum(self.table[ids], 0).sum(1)  # type: ignore[no-any-return]


def test_the_passes_in_order_with_their_figures() -> None:
    report = dsmoe.compile(Experts(), (x_TD,)).report
    names = [step.name for step in report.passes]
    assert names[0] == "capture" and names[-2:] == ["lower", "check"]
    assert names.index("normalize") < names.index("lift_experts") < names.index("fuse_router")
    assert all(step.seconds >= 0 for step in report.passes)
    by_name = {step.name: step for step in report.passes}
    assert by_name["capture"].nodes_before == 0 < by_name["capture"].nodes_after
    lifted, check = by_name["lift_experts"].max_error, by_name["check"].max_error
    assert lifted is not None and lifted < 1e-5 and check is not None and check < 1e-5
    assert report.program_error == check


def test_verify_off_checks_nothing() -> None:
    report = dsmoe.compile(Experts(), (x_TD,), verify="off").report
    assert {step.max_error for step in report.passes} == {None}
    assert [step.name for step in report.passes][-1] == "lower"


def test_require_fused_lists_the_refusals() -> None:
    assert [layer.fused for layer in dsmoe.compile(_Half(), (x_TD,)).report.layers] == [True, False]
    with pytest.raises(dsmoe.NotFused) as caught:
        dsmoe.compile(_Half(), (x_TD,), require_fused=True)
    assert [refusal.code[0] for _, refusal in caught.value.refusals] == ["R"]
    assert "1 layer(s) not fused" in str(caught.value) and "\n" not in str(caught.value)


def test_no_layers_is_no_failure() -> None:
    program = dsmoe.compile(nn.Linear(4, 4), (torch.ones(2, 4),), require_fused=True)
    assert program.report.layers == ()


def test_the_stages_are_told_as_they_begin() -> None:
    told: list[str] = []
    dsmoe.compile(Experts(), (x_TD,), progress=told.append)
    assert told[0] == "capture" and told[-2:] == ["lower", "check"] and "lift_experts" in told


def test_passes_of_the_users_choice() -> None:
    report = dsmoe.compile(Experts(), (x_TD,), pipeline=()).report
    assert [step.name for step in report.passes] == ["capture", "lower", "check"] and report.layers == ()


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "backend": ({"backend": "cuda"}, "backend='cuda': choose one of 'auto', 'cpu', 'triton', 'reference'"),
    "verify": ({"verify": True}, "verify=True: choose one of 'numeric', 'off'"),
    "capture": ({"capture": "grouped"}, "capture='grouped': choose one of 'auto', 'as_written'"),
    "args": ({"args": x_TD}, "args is a Tensor: give the positional arguments as a tuple"),
    "kwargs": ({"kwargs": [x_TD]}, "kwargs is a list: give the arguments by name as a dict"),
    "dynamic_shapes": ({"dynamic_shapes": "all"}, "dynamic_shapes='all': give 'auto', None, or"),
    "missing": (
        {"args": ()},
        "the example inputs do not fit Experts.forward: missing a required argument: 'x'",
    ),
    "surplus": ({"args": (x_TD, x_TD)}, "do not fit Experts.forward: too many positional arguments"),
    "unknown": ({"kwargs": {"y": x_TD}}, "got an unexpected keyword argument 'y'"),
    "width": ({"args": (torch.ones(5, 17),)}, "Experts itself fails on the example inputs"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_arguments_are_named_in_one_line(what: str) -> None:
    options, says = WRONG[what]
    with pytest.raises(dsmoe.InputError) as caught:
        dsmoe.compile(Experts(), **{"args": (x_TD,), **options})
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_program_is_not_compiled_again() -> None:
    program = dsmoe.compile(nn.Linear(16, 4), (x_TD,))
    for door in (dsmoe.compile, dsmoe.inspect):
        with pytest.raises(dsmoe.InputError, match="compiled already"):
            door(program, (x_TD,))


def test_an_example_that_does_not_fit_an_exported_program() -> None:
    exported = torch.export.export(nn.Linear(16, 4), (x_TD,))
    with pytest.raises(dsmoe.ShapeError, match="input: dimension 1 is 17"):
        dsmoe.compile(exported, (torch.ones(5, 17),))


def test_backends_agree() -> None:
    model, ids = tiny(), tokens(3, 9)
    programs = {name: dsmoe.compile(model, (ids,), backend=name) for name in BACKENDS if name != "triton"}
    assert {name: p.report.backend for name, p in programs.items()} == {
        "auto": "cpu",
        "cpu": "cpu",
        "reference": "reference",
    }
    with torch.no_grad():
        for size in ((1, 1), (5, 7), (0, 2)):
            out = {name: p(tokens(*size)) for name, p in programs.items()}
            assert out["auto"].equal(out["cpu"])
            assert relative(out["cpu"], out["reference"]) < 1e-5


def test_the_same_model_gives_the_same_text() -> None:
    first, second = (print_graph(ProgramGraph(dsmoe.compile(tiny(), (tokens(2, 3),)).exported)) for _ in "ab")
    assert first == second


def test_a_model_without_weights_is_inspected_not_compiled() -> None:
    model = build("deepseek-moe-tiny", device="meta")
    report = dsmoe.inspect(model, (tokens(1, 1),))
    assert [layer.fused for layer in report.layers] == [True, True] and report.backend is None
    assert [layer.spec for layer in report.layers] == [
        layer.spec for layer in dsmoe.inspect(tiny(), (tokens(1, 1),)).layers
    ]
    with pytest.raises(dsmoe.InputError, match="no weights: use inspect, or load its weights"):
        dsmoe.compile(model, (tokens(1, 1),))


def test_inspecting_runs_nothing() -> None:
    model = Experts()
    with torch.no_grad():
        model.down.fill_(float("nan"))
    report = dsmoe.inspect(model, (x_TD,))
    assert report.fused == 1
    assert {step.name for step in report.passes}.isdisjoint({"lower", "check"})
    assert {step.max_error for step in report.passes} == {None}


def test_inspecting_a_large_model_takes_little_memory() -> None:
    """8 GB of parameters that are not there; torch alone takes about 0.4 GB."""
    script = (
        "import resource, dsmoe_compiler as dsmoe\n"
        "from dsmoe_compiler.models.zoo import build, example_inputs\n"
        "name = 'deepseek-moe-2b'\n"
        "report = dsmoe.inspect(build(name, device='meta'), (), example_inputs(name))\n"
        "print(report.fused, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    fused, megabytes = map(int, done.stdout.split())
    assert fused == 9 and megabytes < 1500


def test_a_pipeline_that_is_none() -> None:
    with pytest.raises(dsmoe.InputError, match="pipeline=3: give passes, or their names in a text"):
        dsmoe.compile(Experts(), (x_TD,), pipeline=3)  # type: ignore[arg-type]
