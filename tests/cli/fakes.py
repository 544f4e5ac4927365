"""A compiler that answers at once: the command line is tested for what it asks and what it prints."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from dsmoe_compiler.cli import main
from dsmoe_compiler.ir.body import parse_body
from dsmoe_compiler.ir.errors import Refusal
from dsmoe_compiler.ir.spec import ExpertsSpec, MoESpec, RouterSpec
from dsmoe_compiler.report.report import LayerReport, PassReport, Report

EXPERTS = ExpertsSpec(16, 96, parse_body("mul(linear(relu(linear(x,p0)),p1),w)"))
SPEC = MoESpec(4, EXPERTS, RouterSpec(4, "softmax"))
REFUSED = Refusal("R301", "an operator is not known", "cos_1", "mine.py:7")
PASSES = (PassReport("lift_experts", 0.02, 90, 60, True, 1e-7),)


def report(*layers: LayerReport) -> Report:
    return Report("Fake", "export", layers, PASSES, "cpu")


FUSED_LAYER = LayerReport("layers.0.mlp", "gather", True, SPEC, None, "mine.py:3")
REFUSED_LAYER = LayerReport("layers.1.mlp", "gather", False, None, REFUSED, "mine.py:7")


@dataclass
class FakeProgram:
    """Runs the model, and writes a few bytes."""

    model: Callable[..., Any]
    report: Report

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def save(self, path: Path) -> None:
        path.write_bytes(b"program")


@dataclass
class FakeApi:
    """What was asked, what is answered, and what happens first."""

    report: Report = field(default_factory=lambda: report(FUSED_LAYER))
    calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    meanwhile: Callable[[], object] = lambda: None

    def inspect(
        self, model: Any, args: Any = (), kwargs: Any = None, *, progress: Any, **options: Any
    ) -> Report:
        progress("capture")
        self.calls.append((model, args, kwargs))
        self.options = options
        self.meanwhile()
        progress("lift_experts")
        return self.report

    def compile(self, model: Any, args: Any = (), kwargs: Any = None, **options: Any) -> FakeProgram:
        return FakeProgram(model, self.inspect(model, args, kwargs, **options))


def run(*arguments: str) -> Result:
    """`dsmoe ARGUMENTS`."""
    return CliRunner().invoke(main, arguments)


def wrong(*arguments: str) -> str:
    """The line on stderr of a command whose input is wrong; it says nothing else, but what stages a slow
    machine has waited for.
    """
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = (line for line in result.stderr.splitlines() if not line.startswith("stage "))
    assert line.startswith("dsmoe: ")
    return line.removeprefix("dsmoe: ").rstrip()
