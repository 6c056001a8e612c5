"""A mixture of experts with a balancing loss (Switch Transformers, 2101.03961; top-k as in Mixtral, 2401.04088).

B sequences, T tokens, D model dimensions, N experts.
"""

import torch
from torch import Tensor, nn

from thunderhead.core.model.feedforward import GatedFeedForward
from thunderhead.core.model.mixer import flops_per_token
from thunderhead.core.types import NonNegativeFloat, PositiveInt


class MixtureOfExperts(nn.Module):
    """Each token goes through the `top_k` of `n_experts` SwiGLUs that a router finds most probable.

    Here all experts compute all tokens and most are multiplied by 0, which needs neither kernels nor communication.

    - balance: weight of n_experts · sum of (share of tokens) · (mean probability), which is 1 if all are used alike.
    """

    def __init__(
        self, d_model: int, d_ff: int | None, bias: bool,
        *, n_experts: PositiveInt = 4, top_k: PositiveInt = 2, balance: NonNegativeFloat = 0.01,
    ) -> None:  # fmt: skip
        super().__init__()
        if top_k > n_experts:
            raise ValueError(f"activation.top_k={top_k} is more than activation.n_experts={n_experts}")
        self.n_experts, self.top_k, self.balance = n_experts, top_k, balance
        self.router = nn.Linear(d_model, n_experts, bias=False)
        self.experts = nn.ModuleList(GatedFeedForward(d_model, d_ff, bias, gate="silu") for _ in range(n_experts))

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        probability_BTN = self.router(x_BTD).float().softmax(dim=-1)
        highest = probability_BTN.topk(self.top_k, dim=-1)
        weight = highest.values / highest.values.sum(dim=-1, keepdim=True)
        weight_BTN = torch.zeros_like(probability_BTN).scatter(-1, highest.indices, weight)
        y_BTD = sum(weight_BTN[..., i, None].to(x_BTD.dtype) * expert(x_BTD) for i, expert in enumerate(self.experts))
        share_N = (weight_BTN > 0).float().mean(dim=(0, 1)) / self.top_k
        balance = self.n_experts * (share_N * probability_BTN.mean(dim=(0, 1))).sum()
        return y_BTD, {"balance": self.balance * balance}

    def flops_per_token(self) -> int:
        return flops_per_token(self.router) + self.top_k * flops_per_token(self.experts[0])
