"""The gated delta rule (Gated DeltaNet, 2412.06464): a memory of fixed size in place of attention. Pure torch.

Each head has a matrix S from keys to values. With the decay a and the rate b of a token, both in (0, 1),

    S_t = a_t · (S_t-1 − b_t · k_t (k_tᵀ S_t-1)) + b_t · k_t v_tᵀ,    o_t = q_tᵀ S_t

which is computed in chunks. B sequences, T tokens, D model dimensions, H heads, E dimensions of a head, C of a chunk.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thunderhead.core.model.context import Cache, SequenceContext
from thunderhead.core.model.init import ResidualProjection
from thunderhead.core.model.mixer import SequenceMixer
from thunderhead.core.types import PositiveInt


class GatedDeltaRule(SequenceMixer):
    """A recurrent mixer. It knows the order of tokens by itself: position=none.

    - chunk: tokens whose outputs are computed at a time; changes speed, not the result.
    """

    def __init__(self, d_model: int, n_heads: int, bias: bool, *, chunk: PositiveInt = 32) -> None:
        super().__init__()
        self.n_heads, self.head_dim, self.chunk = n_heads, d_model // n_heads, chunk
        self.qkv_proj = nn.Linear(d_model, 3 * d_model, bias=bias)
        self.decay_proj = nn.Linear(d_model, n_heads)
        self.rate_proj = nn.Linear(d_model, n_heads)
        self.norm = nn.RMSNorm(self.head_dim)
        self.out_proj = ResidualProjection(d_model, d_model, bias=bias)

    def forward(self, x_BTD: Tensor, context: SequenceContext) -> Tensor:
        qkv = self.qkv_proj(x_BTD).float().unflatten(-1, (3, self.n_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        q, k, v = F.normalize(qkv[0], dim=-1), F.normalize(qkv[1], dim=-1), qkv[2]  # (B, H, T, E)
        log_decay = -F.softplus(self.decay_proj(x_BTD).float()).mT  # (B, H, T)
        rate = self.rate_proj(x_BTD).float().sigmoid().mT
        cache = context.cache if context.cache is not None else self.new_cache(len(x_BTD), 1, x_BTD.device, x_BTD.dtype)
        state, outputs = cache["state"], []
        for piece in zip(*(each.split(self.chunk, dim=2) for each in (q, k, v, log_decay, rate)), strict=True):
            output, state = delta_rule_chunk(*piece, state)
            outputs.append(output)
        cache["state"] = state
        y_BTHE = torch.cat(outputs, dim=2).transpose(1, 2)
        return self.out_proj(self.norm(y_BTHE).flatten(2).to(x_BTD.dtype))

    def new_cache(self, n_sequences: int, n_tokens: int, device: torch.device, dtype: torch.dtype) -> Cache:
        return {"state": torch.zeros(n_sequences, self.n_heads, self.head_dim, self.head_dim, device=device)}

    def flops_per_token(self) -> int:
        # of the recurrence: two products with the state to read it, one to write it
        return super().flops_per_token() + 3 * 2 * self.n_heads * self.head_dim**2


def delta_rule_chunk(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, rate: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Outputs of a chunk (B, H, C, E), and the state after it.

    With g_i the product of decays up to i, the state is g_i S_0 + sum over j ≤ i of g_i / g_j · k_j u_jᵀ, where what is
    written, u_i = b_i (v_i − k_iᵀ (state before i, decayed)), solves a triangular system.
    """
    g = log_decay.cumsum(dim=-1)
    later = torch.ones(g.shape[-1], g.shape[-1], dtype=torch.bool, device=g.device).triu(1)
    ratio = (g[..., :, None] - g[..., None, :]).masked_fill(later, float("-inf")).exp()  # (B, H, C, C)
    decayed = g.exp()[..., None]
    system = rate[..., None] * (k @ k.mT * ratio).tril(-1)
    written = torch.linalg.solve_triangular(
        system, rate[..., None] * (v - decayed * (k @ state)), upper=False, unitriangular=True
    )
    output = decayed * (q @ state) + (q @ k.mT * ratio) @ written
    return output, decayed[..., -1:, :] * state + (ratio[..., -1, :, None] * k).mT @ written
