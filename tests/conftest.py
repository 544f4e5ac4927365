"""What all tests share: golden texts, captured layers, and what is skipped where."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

# The same examples every time; HYPOTHESIS_PROFILE=exploring looks for others. A layer that fails is printed
# as it was found: making it smaller compiles hundreds of others first, and its parts have names as they are.
settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
)
settings.register_profile("exploring", settings.get_profile("repeatable"), derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

GOLDEN = Path(__file__).parent / "golden"
# Drawings are all that the layout library is needed for.
collect_ignore = [] if find_spec("graphlay") else ["report/test_drawing_picture.py", "cli/test_one_layer.py"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="rewrite tests/golden from what the tests see"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Triton's interpreter stands in for the device when the tests for it are themselves tested.
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none"))


@dataclass(frozen=True)
class Golden:
    """Texts that are read before they change."""

    update: bool

    def __call__(self, name: str, text: str) -> None:
        """Compare `text` with tests/golden/<name>.txt, or write it there under --update-golden."""
        path = GOLDEN / f"{name}.txt"
        if self.update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            return
        assert path.exists(), f"{path} is missing: pytest --update-golden writes it"
        assert text == path.read_text(), f"differs from {path}: read it, then pytest --update-golden"


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(bool(request.config.getoption("--update-golden")))


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> Iterator[None]:
    """The global generator seeded for each test and given back as it was."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    yield
    torch.set_rng_state(state)
