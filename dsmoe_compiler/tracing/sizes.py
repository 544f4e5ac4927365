"""Questions about sizes that were read from data, answered as for experts that have tokens."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import sympy
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.symbol import SymT, symbol_is_type

from dsmoe_compiler.tracing.assumption import SIZES, TOKENS
from dsmoe_compiler.tracing.frames import callers_of_number, is_branch_of_user
from dsmoe_compiler.tracing.unrolling import Unrolling

# What sizes are where an operator's check compares them: those read from data differ, an input's are larger.
_OF_DATA, _OF_AN_INPUT = 64, 2**20


@contextlib.contextmanager
def sizes_assumed(environment: ShapeEnv, mode: Unrolling) -> Iterator[None]:
    """While open, questions about sizes that depend on data are answered as for experts that have tokens."""
    evaluate = environment.evaluate_expr

    @functools.wraps(evaluate)
    def answer(expression: sympy.Basic, *args: Any, **kwargs: Any) -> sympy.Basic:
        try:
            found = evaluate(expression, *args, **kwargs)
        except Exception as e:
            if not isinstance(expression, sympy.logic.boolalg.Boolean):
                mode.baked.update(callers_of_number())
            if mode.asks_value or "data-dependent" not in str(e).lower():
                raise
            assumed = _about_tokens(expression, mode)
            if assumed is None:
                raise
            text, truth = assumed
            mode.assume(text)
            return sympy.true if truth else sympy.false
        if not isinstance(expression, sympy.logic.boolalg.Boolean):
            mode.baked.update(callers_of_number())
        return found

    environment.evaluate_expr = answer  # type: ignore
    try:
        yield
    finally:
        del environment.evaluate_expr


def _about_tokens(expression: sympy.Basic, mode: Unrolling) -> tuple[str, bool] | None:
    """(what is assumed, the answer) for a comparison of sizes; None where the code asks for a value."""
    if not isinstance(expression, sympy.core.relational.Relational):
        return None
    unknown = [s for s in expression.free_symbols if symbol_is_type(s, SymT.UNBACKED_INT)]
    if not unknown:
        return None
    by_user = is_branch_of_user()
    if by_user and not mode.routed.issuperset(unknown):
        return None
    if (with_tokens := _asks_for_tokens(expression)) is not None:
        return TOKENS, with_tokens
    if by_user:
        between = _compares_ends(expression)
        return None if between is None else (TOKENS, between)
    if isinstance(expression, (sympy.Eq, sympy.Ne)):
        return SIZES, isinstance(expression, sympy.Eq) != (1 in expression.args)
    sizes = {s: _OF_AN_INPUT for s in expression.free_symbols}
    sizes |= {s: _OF_DATA + 7 * i for i, s in enumerate(sorted(unknown, key=str))}
    truth = expression.subs(sizes)
    return (SIZES, bool(truth)) if truth in (sympy.true, sympy.false) else None


def _asks_for_tokens(expression: sympy.Basic) -> bool | None:
    """Whether "n == 0", "n > 0" and the like hold for a positive n; None for another question."""
    left, right = expression.args
    if right not in (0, 1) or left.is_Number:
        return None
    none = {"Eq": 0, "LessThan": 0, "StrictLessThan": 1}
    some = {"Ne": 0, "StrictGreaterThan": 0, "GreaterThan": 1}
    kind = {"Equality": "Eq", "Unequality": "Ne"}.get(type(expression).__name__, type(expression).__name__)
    if none.get(kind) == right:
        return False
    return True if some.get(kind) == right else None


def _compares_ends(expression: sympy.core.relational.Relational) -> bool | None:
    """Whether "start == end", "end > start" and the like hold, where the end is the start and some counts
    more; None for another question.
    """
    difference = (expression.lhs - expression.rhs).expand().as_coefficients_dict()
    counts = all(isinstance(s, sympy.Symbol) and symbol_is_type(s, SymT.UNBACKED_INT) for s in difference)
    signs = {c > 0 for c in difference.values()}
    if not counts or len(signs) != 1:
        return None
    return bool(expression.func(1 if signs.pop() else -1, 0))
