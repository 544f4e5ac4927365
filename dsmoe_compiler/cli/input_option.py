"""`--input name=2x16:int64`: an example input by its shape."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = ("float32", "float64", "bfloat16", "float16", "int64", "int32", "bool")
_FORM = re.compile(r"(?P<name>[A-Za-z_]\w*)=(?P<sizes>\d+(?:x\d+)*)(?::(?P<dtype>\w+))?")
Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass(frozen=True)
class ExampleInput:
    """A tensor argument to make up: its name, sizes and dtype (one of `DTYPES`; None: not said)."""

    name: str
    sizes: tuple[int, ...]
    dtype: str | None

    def tensor(self, device: str, instead_of: object = None) -> Tensor:
        """Floats are normal; integers 0 or 1, which are valid ids and masks of any model; bools true.

        Where no dtype was said it is that of the tensor it stands for, or else float32.
        """
        import torch

        generator = torch.Generator().manual_seed(0)
        like = instead_of.dtype if isinstance(instead_of, torch.Tensor) else torch.float32
        dtype = getattr(torch, self.dtype) if self.dtype else like
        if dtype.is_floating_point:
            return torch.randn(self.sizes, generator=generator).to(device, dtype)
        if dtype == torch.bool:
            return torch.ones(self.sizes, dtype=dtype, device=device)
        return torch.randint(2, self.sizes, generator=generator).to(device, dtype)


def input_option(command: Command) -> Command:
    """Give a command the option `--input`, any number of times, as `inputs`."""
    return click.option(
        "--input",
        "inputs",
        metavar="NAME=SIZES[:DTYPE]",
        multiple=True,
        callback=lambda ctx, option, values: tuple(_parse(value) for value in values),
        help="An argument of the model, by its shape: input_ids=2x16:int64. Repeatable. Stands instead of "
        "the example of the same name, and has its dtype when none is given; else float32.",
    )(command)


def _parse(text: str) -> ExampleInput:
    form = _FORM.fullmatch(text)
    if not form:
        raise click.BadParameter(f"{text!r} is not of the form name=2x16:int64.")
    dtype = form["dtype"]
    if dtype not in (None, *DTYPES):
        raise click.BadParameter(f"{dtype!r} is not one of {', '.join(DTYPES)}.")
    return ExampleInput(form["name"], tuple(int(size) for size in form["sizes"].split("x")), dtype)
