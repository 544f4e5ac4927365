"""Routed experts: out[t] = Σ_k w[t,k] · FFN_{ids[t,k]}(x[t]), the experts' weights stacked.

Shapes: T tokens, D model width, F expert hidden width, E experts, K experts per token, P = T·K pairs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dsmoe_compiler.models.stacked_experts import StackedExperts


class RoutedExperts(StackedExperts):
    """Stacked experts, each token through K of them, however many tokens choose the same."""

    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Combine the chosen experts' answers.

        x_TD: any float dtype, also the result's. ids_TK: int64 in [0, E). weights_TK: float32.
        Products with the weights are summed in the wider of the two dtypes, then rounded once.
        """
        # A loop over the experts that tokens hit depends on the data, which a graph cannot hold.
        if torch.compiler.is_exporting():
            return self.gather(x_TD, ids_TK, weights_TK)
        return self.loop(x_TD, ids_TK, weights_TK)

    def loop(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """One expert after another, each on the tokens that chose it; experts nobody chose are skipped."""
        sum_dtype = torch.promote_types(x_TD.dtype, weights_TK.dtype)
        out_TD = torch.zeros_like(x_TD, dtype=sum_dtype)
        chosen_EKT = F.one_hot(ids_TK, self.num_experts).permute(2, 1, 0)
        hit = chosen_EKT.sum(dim=(1, 2)).nonzero().squeeze(1)
        for expert in hit:
            slot, token = torch.where(chosen_EKT[expert])
            gate, up = F.linear(x_TD[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            y = F.linear(F.silu(gate) * up, self.down_proj[expert])
            out_TD.index_add_(0, token, y * weights_TK[token, slot].unsqueeze(1))
        return out_TD.to(x_TD.dtype)

    def gather(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The same sum with no loop: each pair fetches its own copy of its expert, 3·P·D·F numbers in all."""
        tokens, k = ids_TK.shape
        ids_P = ids_TK.reshape(tokens * k)
        x_PD = x_TD.repeat_interleave(k, dim=0)
        gate_up_P = torch.bmm(self.gate_up_proj[ids_P], x_PD.unsqueeze(2)).squeeze(2)
        gate_PF, up_PF = gate_up_P.chunk(2, dim=-1)
        y_PD = torch.bmm(self.down_proj[ids_P], (F.silu(gate_PF) * up_PF).unsqueeze(2)).squeeze(2)
        weighted_PD = y_PD * weights_TK.reshape(tokens * k, 1)
        out_TD = weighted_PD.view(tokens, k, x_TD.shape[1]).sum(dim=1)
        return out_TD.to(x_TD.dtype)
