"""Whether a program draws random numbers when it runs."""

from __future__ import annotations

import torch
from torch.export import ExportedProgram
from torch.fx import Node


def is_random(exported: ExportedProgram) -> bool:
    """Whether two runs differ by design (dropout in training mode, jitter), so that comparing them says
    nothing.
    """
    seeded = torch.Tag.nondeterministic_seeded
    return any(seeded in getattr(n.target, "tags", ()) and _draws(n) for n in exported.graph.nodes)


def _draws(node: Node) -> bool:
    """Whether a random operator draws numbers here: dropout by 0, or outside training, does not."""
    assert isinstance(node.target, torch._ops.OpOverload)
    given = dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=False)) | node.kwargs
    if "dropout_p" in given or "attention" in node.target._schema.name:
        return bool(given.get("dropout_p", 0.0) != 0.0)
    return bool(given.get("train", True) is not False and given.get("p", 1.0) != 0.0)
