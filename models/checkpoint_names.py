"""The names that DeepSeek's checkpoints give to the parts of a model's parameters.

A checkpoint holds each expert's matrices by themselves, the zoo's models hold them stacked:

    model.layers.1.mlp.experts.5.gate_proj.weight   [F, D]   model.layers.1.mlp.experts.gate_up_proj[5, :F]
    model.layers.1.mlp.experts.5.up_proj.weight     [F, D]   model.layers.1.mlp.experts.gate_up_proj[5, F:]
    model.layers.1.mlp.experts.5.down_proj.weight   [D, F]   model.layers.1.mlp.experts.down_proj[5]

Every other parameter has one name in both.
"""

from collections.abc import Iterator

from torch import Tensor, nn

_GATE_UP, _DOWN = ".experts.gate_up_proj", ".experts.down_proj"


def checkpoint_tensors(model: nn.Module) -> dict[str, Tensor]:
    """By its name in a checkpoint, each tensor of it: contiguous views that together are all parameters and
    persistent buffers of the model, each element once.
    """
    return {name: view for own, tensor in model.state_dict().items() for name, view in _parts(own, tensor)}


def _parts(own: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if own.endswith(_GATE_UP):
        prefix = own.removesuffix("gate_up_proj")
        for expert, gate_up_2FD in enumerate(tensor):
            gate_FD, up_FD = gate_up_2FD.chunk(2)
            yield f"{prefix}{expert}.gate_proj.weight", gate_FD
            yield f"{prefix}{expert}.up_proj.weight", up_FD
    elif own.endswith(_DOWN):
        prefix = own.removesuffix("down_proj")
        for expert, down_DF in enumerate(tensor):
            yield f"{prefix}{expert}.down_proj.weight", down_DF
    else:
        yield own, tensor
