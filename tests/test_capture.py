"""What can be captured: modules, functions of every kind, exported programs; and what a refusal says."""

import functools
import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.export import Dim

import dsmoe_compiler as dsmoe
from tests.tiny_models import Experts, relative, tiny, tokens

x_TD = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))


class _Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Experts()

    def encode(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.layer(x) * scale  # type: ignore[no-any-return]


class _Callable:
    def __init__(self) -> None:
        self.parts = {"experts": Experts()}

    def __call__(self, x: Tensor) -> Tensor:
        return self.parts["experts"](x) + 1  # type: ignore[no-any-return]


def _closure() -> Callable[[Tensor], Tensor]:
    layer, bias = Experts(), torch.full((16,), 0.5)
    return lambda x: layer(x) + bias


def _decorated() -> Callable[[Tensor], Tensor]:
    layer = Experts()

    @torch.no_grad()
    def run(x: Tensor) -> Tensor:
        return layer(x)  # type: ignore[no-any-return]

    return run


def _two_deep() -> Callable[[Tensor], Tensor]:
    layer = Experts()

    def inner(x: Tensor) -> Tensor:
        return layer(x)  # type: ignore[no-any-return]

    return lambda x: inner(x) * 2


CALLABLES: dict[str, Callable[[], Callable[..., Tensor]]] = {
    "module": Experts,
    "lambda over a module and a tensor": _closure,
    "function of a function": _two_deep,
    "decorated function": _decorated,
    "bound forward": lambda: Experts().forward,
    "bound method": lambda: _Encoder().encode,
    "partial": lambda: functools.partial(_Encoder().encode, scale=2.0),
    "callable object": _Callable,
}


@pytest.mark.parametrize("kind", CALLABLES)
def test_any_function_over_tensors(kind: str) -> None:
    model = CALLABLES[kind]()
    program = dsmoe.compile(model, (x_TD,), require_fused=True)
    assert len(program.report.layers) == 1
    with torch.no_grad():
        other = torch.randn(9, 16)
        assert relative(program(other), model(other)) < 1e-5


def test_builtin_functions_have_no_signature_and_compile() -> None:
    assert dsmoe.compile(torch.relu, (x_TD,))(-x_TD).equal(torch.relu(-x_TD))


def test_a_closed_over_parameter_is_a_parameter() -> None:
    weight = nn.Parameter(torch.randn(16, 4))
    program = dsmoe.compile(lambda x: x @ weight, (x_TD,))
    assert list(program.exported.state_dict) == ["weight"]
    program(x_TD).sum().backward()
    assert weight.grad is not None
    with torch.no_grad():
        weight.zero_()
    assert not program(x_TD).any()


def test_only_what_a_function_reads_is_captured_with_it() -> None:
    layer, unread = Experts(), nn.Linear(64, 64)
    program = dsmoe.compile(lambda x: layer(x), (x_TD,))
    assert unread is not None
    assert {name.split(".")[0] for name in program.exported.state_dict} == {"layer"}


def test_a_compiled_module_is_captured_through_its_wrapper() -> None:
    layer = Experts()
    assert relative(dsmoe.compile(torch.compile(layer), (x_TD,))(x_TD), layer(x_TD)) < 1e-5


def test_module_hooks_run_as_they_do_eagerly() -> None:
    layer = Experts()
    layer.register_forward_hook(lambda _module, _args, output: output + 3)
    assert relative(dsmoe.compile(layer, (x_TD,))(x_TD), layer(x_TD)) < 1e-5


def test_an_exported_program_is_not_touched() -> None:
    model = tiny()
    sizes = ({0: Dim.AUTO, 1: Dim.AUTO},)
    exported = torch.export.export(model, (tokens(2, 7),), dynamic_shapes=sizes, strict=False)
    text, nodes, specs = str(exported.graph), list(exported.graph.nodes), str(exported.graph_signature)
    program = dsmoe.compile(exported, require_fused=True)
    assert str(exported.graph) == text and str(exported.graph_signature) == specs
    assert all(a is b for a, b in zip(exported.graph.nodes, nodes, strict=True))
    with torch.no_grad():
        for size in ((1, 1), (3, 9), (0, 5)):
            ids = tokens(*size)
            assert relative(program(input_ids=ids), model(ids)) < 1e-4


@pytest.mark.parametrize("level", ["core", "training"])
def test_a_decomposed_program_does_not_crash(level: str) -> None:
    model, ids = tiny(), tokens(2, 7)
    table: dict[OpOverload, Callable[..., object]] | None = None if level == "core" else {}
    exported = torch.export.export(model, (ids,), strict=False).run_decompositions(table)
    program = dsmoe.compile(exported)
    assert len(program.report.layers) == 2
    assert all(layer.fused or layer.refusal for layer in program.report.layers)
    with torch.no_grad():
        assert relative(program(ids), model(ids)) < 1e-4


def test_an_exported_program_with_branches_of_its_own() -> None:
    def branch(x: Tensor) -> Tensor:
        cond: Callable[..., Tensor] = torch.cond
        return cond(x.sum() > 0, torch.sin, torch.cos, (x,))

    module = nn.Module()
    module.forward = branch
    exported = torch.export.export(module, (x_TD,), strict=False)
    program = dsmoe.compile(exported)
    for sign in (-1, 1):
        assert program(sign * x_TD.abs()).equal(branch(sign * x_TD.abs()))


class _Loop(nn.Module):
    """The loop over the experts that were hit, as transformers wrote it for years."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 4)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(2)
        hit = nn.functional.one_hot(ids, 4).permute(2, 1, 0)
        out = torch.zeros_like(x)
        for e in hit.sum((-1, -2)).nonzero():
            slot, token = torch.where(hit[e[0]])
            out.index_add_(0, token, self.experts[int(e[0])](x[token]) * weights[token, slot, None])
        return out


class _Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return -x


def test_a_data_dependent_loop_is_captured_and_fused(capfd: pytest.CaptureFixture[str]) -> None:
    model = _Loop()
    program = dsmoe.compile(model, (x_TD,))
    assert program.report.fused == 1
    assert relative(program(x_TD), model(x_TD)) < 1e-6
    assert capfd.readouterr() == ("", "")


def test_a_data_dependent_branch_ends_in_one_quiet_line(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(dsmoe.CaptureError) as caught:
        dsmoe.compile(_Branch(), (x_TD,))
    message = str(caught.value)
    assert "\n" not in message
    assert "_Branch at test_capture.py:" in message and "if x.sum() > 0:" in message
    assert message.endswith("remove the branch or the loop over data")
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_torchs_loggers_are_put_back() -> None:
    names = ("torch.fx.experimental.symbolic_shapes", "torch._subclasses.fake_tensor", "torch.export")
    before = [logging.getLogger(name).level for name in names]
    with pytest.raises(dsmoe.CaptureError):
        dsmoe.compile(_Branch(), (x_TD,))
    assert [logging.getLogger(name).level for name in names] == before


def test_an_example_the_model_itself_fails_on_is_wrong_input(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        dsmoe.InputError, match=r"Linear itself fails on the example inputs.*3x5 and 4x4"
    ) as caught:
        dsmoe.compile(nn.Linear(4, 4), (torch.randn(3, 5),))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (None, "cannot compile a NoneType"),
        (nn.Linear, "cannot compile the class Linear: give an instance"),
        (torch.jit.script(nn.Linear(4, 4)), "cannot compile TorchScript"),
    ],
)
def test_what_is_no_model(model: object, says: str) -> None:
    with pytest.raises(dsmoe.InputError, match=says):
        dsmoe.compile(model, (torch.ones(2, 4),))  # type: ignore[arg-type]


def test_as_written_never_switches() -> None:
    switchable = _Switchable()
    _SEEN.clear()
    assert dsmoe.compile(switchable, (x_TD,), capture="as_written").report.capture == "plain export"
    assert set(_SEEN) == {"eager"}


def test_auto_switches_and_restores() -> None:
    switchable = _Switchable()
    report = dsmoe.compile(switchable, (x_TD,)).report
    assert report.capture == "experts_implementation=grouped_mm"
    assert "grouped_mm" in _SEEN
    assert switchable.config._experts_implementation == "eager"


_SEEN: list[str] = []


class _Config:
    _experts_implementation: str | None = "eager"


class _Switchable(nn.Module):
    """Like a transformers model: how the experts run is up to the configuration."""

    def __init__(self) -> None:
        super().__init__()
        self.config, self.layer = _Config(), Experts()

    def forward(self, x: Tensor) -> Tensor:
        _SEEN.append(str(self.config._experts_implementation))
        return self.layer(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("size", [0, 1])
def test_sizes_of_0_and_1_are_not_baked_in(size: int) -> None:
    layer = Experts()
    program = dsmoe.compile(layer, (x_TD[:size],), require_fused=True)
    with torch.no_grad():
        for rows in (0, 1, 2, 33):
            other = torch.randn(rows, 16)
            assert relative(program(other), layer(other)) < 1e-5


def test_a_keyword_that_only_kwargs_takes() -> None:
    def add(**terms: Tensor) -> Tensor:
        return terms["a"] + terms["b"]

    program = dsmoe.compile(add, (), {"a": x_TD, "b": x_TD})
    assert program(b=torch.ones(2, 16), a=torch.zeros(2, 16)).equal(torch.ones(2, 16))
