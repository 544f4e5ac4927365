"""Routed or shared experts as kernels see them: their body's form bound to its tensors and to names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dsmoe_compiler.codegen.ffn import Ffn
from dsmoe_compiler.codegen.layer import Layer
from dsmoe_compiler.codegen.operand import Operand
from dsmoe_compiler.codegen.pointwise import Function, device_function, vector_names
from dsmoe_compiler.codegen.term import Term


@dataclass(frozen=True)
class BoundFfn:
    """The form of routed or shared experts' body, their tensors, and what both are called.

    `tensors` is what the host function calls the tensors, `prefix` begins their vectors' names in kernels,
    `suffix` ends the generated functions' names.
    """

    ffn: Ffn
    params: tuple[Operand, ...]
    tensors: str
    prefix: str
    suffix: str

    @property
    def who(self) -> str:
        """One of them, in words."""
        return "a shared expert" if self.suffix else "an expert"

    @property
    def gated(self) -> bool:
        """Whether there are a gate and an up product."""
        return len(self.ffn.products) == 2

    @property
    def interleaved(self) -> bool:
        """Whether gate and up are alternate columns of one product."""
        return self.ffn.products[0].step == 2

    @property
    def up(self) -> Operand:
        """The matrices of the first products; where there are two tensors, they lie alike."""
        return self.params[self.ffn.products[0].param]

    @property
    def down(self) -> Operand:
        """The matrices of the last product."""
        return self.params[self.ffn.down.param]

    @property
    def out(self) -> int:
        """Outputs of the first matrices, D of the layer's output being those of the last."""
        return _outputs(self.up, self.ffn.products[0].transposed)

    @property
    def width_out(self) -> int:
        """Outputs of the last matrices."""
        return _outputs(self.down, self.ffn.down.transposed)

    def before_down(self) -> dict[str, Function]:
        """What is generated for the kernel of the first products."""
        made = {"activate": self.activate()}
        if self.ffn.factor:
            doc = "What a row is multiplied by before its expert's products."
            made["weigh"] = self._function("weigh", doc, self.ffn.factor, [])
        return made

    def activate(self) -> Function:
        """The function between the products."""
        names = ["gate", "up"] if self.gated else ["up"]
        doc = f"What {self.who} does between its products."
        return self._function("activate", doc, self.ffn.middle, names)

    def finish(self) -> Function:
        """The function after the last product."""
        doc = f"What {self.who} does after its last product."
        return self._function("finish", doc, self.ffn.last, ["down"])

    def _function(self, name: str, doc: str, term: Term, products: list[str]) -> Function:
        strides = {v.param: self.params[v.param].strides[0] for v in term.vectors}
        return device_function(f"{name}{self.suffix}", doc, term, products, strides, self.prefix)

    def vectors(self, term: Term) -> Mapping[str, str]:
        """The tensors of a term's vectors: names in the kernel, expressions in the host function."""
        names = vector_names(term, self.prefix)
        return {n: f"{self.tensors}[{n.removeprefix(self.prefix)}]" for n in names}


def routed_experts(layer: Layer) -> BoundFfn:
    """The experts that tokens choose."""
    return BoundFfn(layer.ffn, layer.params, "params", "p", "")


def shared_experts(layer: Layer) -> BoundFfn | None:
    """The experts of all tokens; None where there are none."""
    ffn = layer.shared_ffn
    return BoundFfn(ffn, layer.shared_params, "shared", "s", "_shared") if ffn else None


def _outputs(matrices: Operand, transposed: bool) -> int:
    return matrices.shape[2] if transposed else matrices.shape[1]
