"""The build itself, a process of its own: `python -m dsmoe_compiler.runtime.native.extension REQUEST`.

It is torch's and setuptools' way to build an extension, without Ninja, of sources that include neither Python
nor torch. What the compiler says goes to the standard output.
"""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

NAME = "dsmoe_native"


def build(sources: list[str], compile_options: list[str], link_options: list[str]) -> None:
    """Build `dsmoe_native.so` of these files in the current folder."""
    from setuptools import Distribution, Extension
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        """As many files at a time as there are cores: setuptools takes one after the other."""

        def build_extension(self, ext: Any) -> None:
            def compiled(source: str) -> list[str]:
                objects: list[str] = self.compiler.compile(
                    [source], output_dir=self.build_temp, extra_postargs=ext.extra_compile_args
                )
                return objects

            with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
                ext.extra_objects = [each for one in pool.map(compiled, ext.sources) for each in one]
            ext.sources = []
            super().build_extension(ext)

    extension = Extension(
        NAME, sources, language="c++", extra_compile_args=compile_options, extra_link_args=link_options
    )
    # Not `setup()`: that would read the user's configuration files too.
    distribution = Distribution({"name": NAME, "ext_modules": [extension]})
    command = Build(distribution)
    # Set here because setuptools 77.0 takes no options in the line above.
    command.use_ninja, command.no_python_abi_suffix = False, True
    command.build_lib, command.build_temp = ".", "objects"
    command.ensure_finalized()
    command.run()


if __name__ == "__main__":
    build(**json.loads(sys.argv[1]))
