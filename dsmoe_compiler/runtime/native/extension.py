"""The build itself, a process of its own: `python -m dsmoe_compiler.runtime.native.extension REQUEST`.

It is torch's and setuptools' way to build an extension, without Ninja, of sources that include neither Python
nor torch. What the compiler says goes to the standard output.
"""

from __future__ import annotations

import json
import sys

NAME = "dsmoe_native"


def build(sources: list[str], compile_options: list[str], link_options: list[str]) -> None:
    """Build `dsmoe_native.so` of these files in the current folder."""
    from setuptools import Distribution, Extension
    from torch.utils.cpp_extension import BuildExtension

    extension = Extension(
        NAME, sources, language="c++", extra_compile_args=compile_options, extra_link_args=link_options
    )
    # Not `setup()`: that would read the user's configuration files too.
    distribution = Distribution({"name": NAME, "ext_modules": [extension]})
    options = {"use_ninja": False, "no_python_abi_suffix": True}
    command = BuildExtension.with_options(**options)(distribution)  # type: ignore[no-untyped-call]
    command.build_lib, command.build_temp = ".", "objects"
    command.ensure_finalized()
    command.run()


if __name__ == "__main__":
    build(**json.loads(sys.argv[1]))
