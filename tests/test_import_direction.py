"""The import-direction rule of pyproject.toml bites, also in the rooms that are reached through a link."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("passes", "codegen", "models")


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """An empty house with the rooms, links and rules of this one."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    package = tmp_path / "dsmoe_compiler"
    for name in ("ir", "runtime", "export"):
        (package / name).mkdir(parents=True)
        (package / name / "__init__.py").touch()
    for name in ("__init__", "api", "cli", "pipeline", "validate"):
        (package / f"{name}.py").touch()
    for room in ROOMS:
        (tmp_path / room).mkdir()
        (tmp_path / room / "__init__.py").touch()
        (package / room).symlink_to(Path("..", room))
    return tmp_path


def lint(house: Path) -> subprocess.CompletedProcess[str]:
    command = "from importlinter.cli import lint_imports_command as lint; lint(['--no-cache', '--no-logo'])"
    return subprocess.run([sys.executable, "-c", command], cwd=house, capture_output=True, text=True)


def test_imports_downwards_are_kept(house: Path) -> None:
    (house / "passes" / "fuse.py").write_text("import dsmoe_compiler.ir\n")
    (house / "dsmoe_compiler" / "runtime" / "triton.py").write_text("import dsmoe_compiler.codegen\n")
    (house / "dsmoe_compiler" / "cli.py").write_text("import dsmoe_compiler.models\n")
    result = lint(house)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("file", "imported"),
    [
        ("dsmoe_compiler/ir/spec.py", "dsmoe_compiler.passes"),
        ("passes/fuse.py", "dsmoe_compiler.codegen"),
        ("passes/fuse.py", "dsmoe_compiler.runtime"),
        ("codegen/emit.py", "dsmoe_compiler.passes"),
        ("models/zoo.py", "dsmoe_compiler.ir"),
        ("dsmoe_compiler/validate.py", "dsmoe_compiler.codegen"),
        ("dsmoe_compiler/pipeline.py", "dsmoe_compiler.models"),
        ("dsmoe_compiler/runtime/cpu.py", "dsmoe_compiler.pipeline"),
    ],
)
def test_other_imports_are_refused(house: Path, file: str, imported: str) -> None:
    (house / file).write_text(f"def late() -> None:\n    import {imported}\n")
    result = lint(house)
    assert result.returncode == 1, result.stdout + result.stderr
    assert f"-> {imported} (l.2)" in result.stdout


def test_a_module_without_a_floor_is_refused(house: Path) -> None:
    (house / "dsmoe_compiler" / "attic.py").touch()
    result = lint(house)
    assert result.returncode == 1
    assert "- dsmoe_compiler.attic" in result.stdout


def test_codegen_never_sees_fx() -> None:
    """`torch.fx` cannot be told from `torch` in a contract, so the source is read."""
    for file in (ROOT / "codegen").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = (
                [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            )
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{name}" for name in names]
            is_fx = [name for name in names if f"{name}.".startswith(("torch.fx.", "torch.export."))]
            assert not is_fx, f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)} imports {is_fx}"
