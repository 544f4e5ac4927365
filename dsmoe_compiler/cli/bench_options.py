"""What the user asked `dsmoe bench` for."""

from __future__ import annotations

from dataclasses import dataclass

from dsmoe_compiler.cli.input_option import ExampleInput

TOKENS = (1, 16, 128, 1024)


@dataclass(frozen=True)
class Options:
    """The command's options. `tokens` is empty, and others None, where the user said nothing of them."""

    inputs: tuple[ExampleInput, ...] = ()
    tokens: tuple[int, ...] = ()
    batch: int | None = None
    dtype: str | None = None
    experts: str | None = None
    torch_compile: bool = True
    compile_limit: float = 300.0
    rounds: int | None = None
    seconds: float = 10.0
    threads: int | None = None
