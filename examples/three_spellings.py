"""Three ways to write one layer, none of which torch.export captures twice alike, become the same program.

python examples/three_spellings.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dsmoe_compiler as dsmoe
from dsmoe_compiler.ir.graph import ProgramGraph
from dsmoe_compiler.ir.printer import print_graph

D, FFN, E, K = 32, 48, 8, 2


class Expert(nn.Module):
    """SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(D, FFN, bias=False), nn.Linear(D, FFN, bias=False)
        self.w2 = nn.Linear(FFN, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(n, D) to (n, D)."""
        y: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return y


class Layer(nn.Module):
    """A router over a list of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, E, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(E))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and ids (T, K)."""
        logits, ids = self.gate(x).topk(K, dim=-1)
        return logits.softmax(-1), ids


class Visited(Layer):
    """Every expert looks for its tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """(T, D) to (T, D)."""
        weights, ids = self.route(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out[token] += weights[token, slot, None] * expert(x[token])
        return out


class Masked(Layer):
    """Experts that no token chose are passed over."""

    def forward(self, x: Tensor) -> Tensor:
        """(T, D) to (T, D)."""
        weights, ids = self.route(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            chosen = ids == e
            if (mask := chosen.any(-1)).any():
                out[mask] += (weights * chosen).sum(-1)[mask].unsqueeze(-1) * expert(x[mask])
        return out


class Sorted(Layer):
    """Tokens sorted by expert, cut by counts that the host reads."""

    def forward(self, x: Tensor) -> Tensor:
        """(T, D) to (T, D)."""
        weights, ids = self.route(x)
        order = ids.view(-1).argsort()
        rows, parts, start = x[order // K], list[Tensor](), 0
        for e, n in enumerate(torch.bincount(ids.view(-1), minlength=E).cpu().numpy()):
            if n > 0:
                parts.append(self.experts[e](rows[start : start + n]))
                start += n
        y = torch.cat(parts)
        back = torch.empty_like(y)
        back[order] = y
        return (back.view(*ids.shape, -1) * weights.unsqueeze(-1)).sum(1)


def main() -> None:
    """Compile all three, check that they are one program, and print it."""
    texts = set[str]()
    for spelling in (Visited, Masked, Sorted):
        program = dsmoe.compile(spelling(), (torch.randn(10, D),), require_fused=True)
        texts.add(print_graph(ProgramGraph(program.exported)))
    print(f"# {len(texts)} program from 3 spellings")
    print("\n".join(sorted(texts)), end="")


if __name__ == "__main__":
    main()
