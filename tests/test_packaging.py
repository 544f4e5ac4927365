"""What is installed is what stands in the checkout: packages, links, data, version, extras, dependencies."""

import re
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("passes", "codegen", "models")
EXTRAS = {"onnx", "mlir", "triton", "transformers", "dev", "all"}


@cache
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def setuptools_table(name: str) -> Any:
    return pyproject()["tool"]["setuptools"][name]


def packages_under(folder: Path, name: str) -> set[str]:
    """The packages in `folder`, which is itself imported as `name`; links are not followed."""
    found = set()
    for init in folder.rglob("__init__.py"):
        parts = init.parent.relative_to(folder).parts
        if not any((folder / Path(*parts[: n + 1])).is_symlink() for n in range(len(parts))):
            found.add(".".join((name, *parts)))
    return found


def packages_in_checkout() -> set[str]:
    found = packages_under(ROOT / "dsmoe_compiler", "dsmoe_compiler")
    for room in ROOMS:
        found |= packages_under(ROOT / room, f"dsmoe_compiler.{room}")
    return found


def requirement_name(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match, f"not a requirement: {requirement!r}"
    return re.sub(r"[-_.]+", "-", match[0]).lower()


def requirements() -> list[str]:
    project = pyproject()["project"]
    extras = project["optional-dependencies"].values()
    return [*project["dependencies"], *(each for extra in extras for each in extra)]


def third_party() -> list[str]:
    own = pyproject()["project"]["name"]
    return sorted({requirement_name(each) for each in requirements()} - {own})


def test_every_package_is_listed() -> None:
    listed = setuptools_table("packages")
    assert len(listed) == len(set(listed))
    assert set(listed) == packages_in_checkout()


def test_every_folder_with_python_files_is_a_package() -> None:
    folders = {"dsmoe_compiler": "dsmoe_compiler"} | {room: f"dsmoe_compiler.{room}" for room in ROOMS}
    for folder, name in folders.items():
        for file in (ROOT / folder).rglob("*.py"):
            assert (file.parent / "__init__.py").exists(), f"{name}: {file} is in no package"


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_mapped_and_linked(room: str) -> None:
    assert setuptools_table("package-dir")[f"dsmoe_compiler.{room}"] == room
    link = ROOT / "dsmoe_compiler" / room
    assert link.is_symlink()
    assert link.readlink() == Path("..", room)
    assert link.resolve() == ROOT / room


def test_only_the_rooms_are_mapped() -> None:
    assert set(setuptools_table("package-dir")) == {f"dsmoe_compiler.{room}" for room in ROOMS}


def test_types_are_shipped() -> None:
    assert "py.typed" in setuptools_table("package-data")["dsmoe_compiler"]
    assert (ROOT / "dsmoe_compiler" / "py.typed").is_file()


def test_every_data_file_is_shipped() -> None:
    listed = setuptools_table("package-data")
    for package in packages_in_checkout():
        room, *below = package.removeprefix("dsmoe_compiler").lstrip(".").split(".")
        folder = (ROOT if room in ROOMS else ROOT / "dsmoe_compiler").joinpath(room, *below)
        for file in folder.iterdir():
            if file.is_file() and file.suffix not in (".py", ".pyc"):
                patterns = listed.get(package, [])
                assert any(file.match(pattern) for pattern in patterns), (
                    f"{package}: {file.name} is not shipped"
                )


def test_version_is_the_installed_one() -> None:
    try:
        installed = metadata.version("dsmoe-compiler")
    except metadata.PackageNotFoundError:
        pytest.skip("the project is not installed here")
    assert installed == pyproject()["project"]["version"]


def test_extras_are_those_promised() -> None:
    extras = pyproject()["project"]["optional-dependencies"]
    assert set(extras) == EXTRAS
    (union,) = extras["all"]
    assert set(union.partition("[")[2].rstrip("]").split(",")) == EXTRAS - {"all"}


def test_the_command_is_there() -> None:
    module, _, function = pyproject()["project"]["scripts"]["dsmoe"].partition(":")
    assert function in vars(__import__(module, fromlist=[function]))


@pytest.mark.parametrize("name", third_party())
def test_dependencies_are_explained_and_pinned(name: str) -> None:
    words = set(re.findall(r"[a-z0-9]+(?:-[a-z0-9]+)*", (ROOT / "README.md").read_text().lower()))
    assert name in words, "the README names every dependency with its reason"
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    # torch's CUDA builds name their triton: a single version here would contradict them.
    pinned = f"{name}>=.+,<" if name == "triton" else f"{name}=="
    pins = [line for line in lines if re.match(pinned, line)]
    assert len(pins) == 1
    assert "+" not in pins[0], "a local build of a package is not a version others can install"
