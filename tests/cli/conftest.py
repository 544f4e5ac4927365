"""The API replaced by a fake, and a current folder of one's own."""

import sys
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
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, importable only while the test runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    return tmp_path
