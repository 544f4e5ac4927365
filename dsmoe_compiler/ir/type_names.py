"""How the textual IR spells types and sizes: `f32[4*s0, 96]`, the same for the same program.

The symbols of a capture are numbered anew in order of appearance: `s0`, `s1`, … for sizes of the inputs, and
`u0`, `u1`, … for sizes that depend on the data. A given count of tokens and its multiples are spelled T.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor

from dsmoe_compiler.ir.graph import Size

_DTYPES = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u", "complex": "c"}
_END = 2**63 - 1  # what a slice without an end is given
_TOKENS = sympy.Symbol("T")


@dataclass
class TypeNames:
    """The spelling of one text; `tokens` is the size to be called T, if any."""

    tokens: Size | None = None
    symbols: dict[Any, Any] = field(default_factory=dict)

    def type(self, value: Any) -> str:
        """The type of a recorded value: a tensor, a size, a tuple of them, nothing."""
        if isinstance(value, Tensor):
            return f"{dtype_name(value.dtype)}[{', '.join(self.size(s) for s in value.shape)}]"
        if isinstance(value, (list, tuple)):
            return f"({', '.join(self.type(v) for v in value)})"
        if isinstance(value, (int, float, torch.SymInt)):
            return self.size(value)
        return "none" if value is None else type(value).__name__

    def size(self, size: Size | float | torch.SymBool | torch.SymFloat) -> str:
        """A size; a product has its number first, then its symbols in order."""
        if not isinstance(size, (torch.SymInt, torch.SymBool, torch.SymFloat)):
            return "end" if size == _END else str(size)
        named = self._renamed(size.node.expr)
        if self.tokens is not None:
            named = _in_tokens(named, self.definition)
        factors = [str(f) for f in sympy.Mul.make_args(named)]
        if all(f.isalnum() for f in factors):
            return "*".join(sorted(factors, key=lambda f: (not f.isdigit(), f)))
        return str(named)

    @property
    def definition(self) -> Any:
        """What T stands for, in the symbols of this text."""
        return self._renamed(self.tokens.node.expr if isinstance(self.tokens, torch.SymInt) else self.tokens)

    def _renamed(self, expression: Any) -> Any:
        found = sympy.sympify(expression)
        for symbol in sorted(found.free_symbols, key=_age):
            if symbol not in self.symbols:
                letter = "u" if str(symbol).startswith("u") else "s"
                taken = sum(str(name).startswith(letter) for name in self.symbols.values())
                self.symbols[symbol] = sympy.Symbol(f"{letter}{taken}", **symbol.assumptions0)
        return found.xreplace(self.symbols)


def dtype_name(dtype: torch.dtype) -> str:
    """ "f32", "bf16", "i64", "bool"."""
    name = str(dtype).removeprefix("torch.")
    word = name.rstrip("0123456789")
    return f"{_DTYPES.get(word, word)}{name[len(word) :]}"


def _age(symbol: Any) -> tuple[int, str]:
    """Older symbols of one capture first: u2 before u10."""
    digits = "".join(c for c in str(symbol) if c.isdigit())
    return int(digits or 0), str(symbol)


def _in_tokens(expression: Any, tokens: Any) -> Any:
    """The expression with the token count's factors, where it has all of them, called T."""
    factors, wanted = list(sympy.Mul.make_args(expression)), list(sympy.Mul.make_args(tokens))
    for factor in wanted:
        if factor.is_Integer or factor not in factors:
            return expression
        factors.remove(factor)
    return sympy.Mul(_TOKENS, *factors)
