"""The native library's own text: every C++ file of this folder, by name."""

from __future__ import annotations

from importlib.resources import files

_KINDS = (".cpp", ".h", ".def")


def sources() -> dict[str, bytes]:
    """The files' contents by their names, in the names' order; those that end in .cpp are compiled."""
    folder = files("dsmoe_compiler.codegen.native")
    found = {each.name: each.read_bytes() for each in folder.iterdir() if each.name.endswith(_KINDS)}
    return dict(sorted(found.items()))
