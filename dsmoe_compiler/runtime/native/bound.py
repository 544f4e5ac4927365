"""A fused layer by the native kernels, bound to its tensors at the first call, and anew where they moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from dsmoe_compiler.codegen.ffn import Unsupported
from dsmoe_compiler.ir.spec import ExpertsSpec, SharedSpec
from dsmoe_compiler.runtime.native.experts import Layer, choose
from dsmoe_compiler.runtime.native.library import Library
from dsmoe_compiler.turns import turn


class Bound:
    """Routed experts, and shared ones if a spec of them is given, for whichever tensors a call brings.

    Threads may call it at once: what is bound is replaced as a whole.
    """

    def __init__(self, library: Library, spec: ExpertsSpec, shared: SharedSpec | None = None) -> None:
        self.library, self.spec, self.shared = library, spec, shared
        self._bound: tuple[object, Layer | Unsupported] | None = None

    def __call__(
        self,
        x_TD: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        params: Sequence[Tensor],
        shared: Sequence[Tensor] = (),
    ) -> Tensor | None:
        """out (T, out width); None where the kernels cannot run these tensors."""
        if not all(map(_is_plain, (x_TD, ids_TK, weights_TK))) or _is_traced():
            return None
        # Training and loading change tensors in place; `parameter.data = …` moves them.
        key = _key(x_TD, weights_TK, (*params, *shared))
        bound = self._bound
        if bound is None or bound[0] != key:
            bound = self._bound = (key, self._bind(x_TD, weights_TK, params, shared))
        layer = bound[1]
        return None if isinstance(layer, Unsupported) else layer(x_TD, ids_TK, weights_TK)

    def prepare(
        self, x: Tensor, weights: Tensor, params: Sequence[Tensor], shared: Sequence[Tensor] = ()
    ) -> None:
        """Bind now to these parameters, for an x and weights of these dtypes."""
        self._bound = (_key(x, weights, (*params, *shared)), self._bind(x, weights, params, shared))

    def __deepcopy__(self, memo: object) -> Bound:
        """Another one, for tensors that will be others."""
        return Bound(self.library, self.spec, self.shared)

    def _bind(
        self, x: Tensor, weights: Tensor, params: Sequence[Tensor], shared: Sequence[Tensor]
    ) -> Layer | Unsupported:
        # Shapes are found on the meta device, through what other threads' tracing changes meanwhile.
        with turn():
            return self._bind_alone(x, weights, params, shared)

    def _bind_alone(
        self, x: Tensor, weights: Tensor, params: Sequence[Tensor], shared: Sequence[Tensor]
    ) -> Layer | Unsupported:
        try:
            if not all(map(_is_plain, (*params, *shared))):
                raise Unsupported("its tensors are not all plain ones on the CPU")
            layer = choose(self.library, self.spec, x, weights, params, self.shared, shared)
            # A call brings its tensors; kept here, those that are computed for it would live twice.
            return replace(layer, params=(), shared=layer.shared if layer.gate else ())
        except Unsupported as e:
            return e


def _key(x: Tensor, weights: Tensor, tensors: Sequence[Tensor]) -> object:
    """What a binding depends on."""
    lying = [(p.data_ptr(), p.shape, p.stride(), p.dtype) for p in tensors]
    return (x.dtype, weights.dtype, lying)


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu" and not tensor.is_neg()


def _is_traced() -> bool:
    """Whether what this thread's operators do is written down, or differentiated forward: nobody would see
    the kernels. Asked of the thread alone: torch's own questions tell of tracing in others, too.
    """
    return (
        torch.compiler.is_dynamo_compiling()
        or torch._C._is_tracing()
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
        or torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.PreDispatch)
        or forward_ad._current_level >= 0
    )
