"""A fused layer by the native kernels, bound to its tensors at the first call, and anew where they moved."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from dsmoe_compiler.codegen.ffn import Unsupported
from dsmoe_compiler.ir.spec import ExpertsSpec, SharedSpec
from dsmoe_compiler.runtime.native.experts import Layer, choose
from dsmoe_compiler.runtime.native.library import Library


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
        lying = [(p.data_ptr(), p.shape, p.stride(), p.dtype) for p in (*params, *shared)]
        key = (x_TD.dtype, weights_TK.dtype, lying)
        bound = self._bound
        if bound is None or bound[0] != key:
            bound = self._bound = (key, self._bind(x_TD, weights_TK, params, shared))
        layer = bound[1]
        return None if isinstance(layer, Unsupported) else layer(x_TD, ids_TK, weights_TK)

    def __deepcopy__(self, memo: object) -> Bound:
        """Another one, for tensors that will be others."""
        return Bound(self.library, self.spec, self.shared)

    def _bind(
        self, x: Tensor, weights: Tensor, params: Sequence[Tensor], shared: Sequence[Tensor]
    ) -> Layer | Unsupported:
        try:
            if not all(map(_is_plain, (*params, *shared))):
                raise Unsupported("its tensors are not all plain ones on the CPU")
            return choose(self.library, self.spec, x, weights, params, self.shared, shared)
        except Unsupported as e:
            return e


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu" and not tensor.is_neg()


def _is_traced() -> bool:
    """Whether what this thread's operators do is written down, or differentiated forward: nobody would see
    the kernels.
    """
    return (
        torch.compiler.is_dynamo_compiling()
        or torch._C._is_tracing()
        or get_proxy_mode() is not None
        or forward_ad._current_level >= 0
    )
