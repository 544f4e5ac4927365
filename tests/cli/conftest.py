"""The API replaced by a fake, and a current folder of one's own."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import dsmoe_compiler
from tests.cli.fakes import FakeApi


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    """Stands where the API stands."""
    fake = FakeApi()
    module = ModuleType("dsmoe_compiler.api")
    vars(module).update(inspect=fake.inspect, compile=fake.compile)
    monkeypatch.setitem(sys.modules, "dsmoe_compiler.api", module)
    monkeypatch.setattr(dsmoe_compiler, "api", module, raising=False)
    return fake


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder, importable only while the test runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]
