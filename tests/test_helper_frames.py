"""What a forward's helper functions do has their lines in the graph, and torch is left as it was."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.fx.proxy
from torch import Tensor, nn

from dsmoe_compiler.capture import capture
from dsmoe_compiler.ir.errors import InputError

REGISTER = torch.fx.proxy._STACK_TRACE_ANCHORS


def _innermost(x: Tensor) -> Tensor:
    return x.cumsum(0)


def _helper(x: Tensor) -> Tensor:
    return _innermost(x * 2)


class _Calling(nn.Module):
    """Calls something in its forward."""

    def __init__(self, called: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.called = called

    def forward(self, x: Tensor) -> Tensor:
        return self.called(x)


def _line(function: Callable[[Tensor], Tensor]) -> str:
    return f'File "{Path(__file__)}", line {inspect.getsourcelines(function)[1] + 1}, in {function.__name__}'


def test_every_function_between_forward_and_operator_is_kept() -> None:
    graph = capture(_Calling(_helper), (torch.ones(3),)).exported.graph
    (node,) = graph.find_nodes(op="call_function", target=torch.ops.aten.cumsum.default)
    frames = [line.strip() for line in node.meta["stack_trace"].splitlines() if line.strip()[:4] == "File"]
    assert frames[0].endswith("in forward")
    assert frames[1:] == [_line(_helper), _line(_innermost)]


def _fails(x: Tensor) -> Tensor:
    raise ValueError(x.sin().shape)


@pytest.mark.parametrize("called", [_helper, _fails])
def test_torch_knows_no_function_that_it_did_not_know(called: Callable[[Tensor], Tensor]) -> None:
    own = (__file__, "_innermost")
    REGISTER.add(own)
    known = set(REGISTER)
    try:
        if called is _fails:
            with pytest.raises(InputError):
                capture(_Calling(called), (torch.ones(3),))
        else:
            capture(_Calling(called), (torch.ones(3),))
        assert known == REGISTER
    finally:
        REGISTER.discard(own)
