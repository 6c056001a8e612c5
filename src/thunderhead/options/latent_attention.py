"""Multi-head latent attention: an option of the group `attention`.

Shape letters: B sequences, T tokens a sequence, S with those before them, D model dimensions, H heads, E dimensions of
a query or key head, V of a value head, C of the compressed latent, R of the rotary key.
"""

import torch
from torch import Tensor, nn

from thunderhead.core.model.attention import Attention, Backend, head_norms, merge_heads, split_heads
from thunderhead.core.model.context import Cache, SequenceContext, extend
from thunderhead.core.model.division import Division, refuse_uneven
from thunderhead.core.model.init import ResidualProjection
from thunderhead.core.model.norm import normalize
from thunderhead.core.model.position import rotate
from thunderhead.core.types import PositiveFloat, PositiveInt, Probability


class MultiHeadLatentAttention(Attention):
    """DeepSeek's multi-head latent attention (2405.04434, 2.1): one small latent holds all heads' keys and values.

    Rotation cannot pass through that compression, so each head has a part without position and a rotary part whose key
    all heads share; with other positions the latter is not rotated.

    None sizes it as DeepSeek-V2 is sized, relative to head_dim (None = d_model / n_heads):
    - kv_lora_rank: of the key/value latent; None = 4 · head_dim.
    - q_lora_rank: of the query latent; None = no compression of queries, as in DeepSeek-V2-Lite (V2: 12 · head_dim).
    - qk_nope_head_dim, v_head_dim: None = head_dim; qk_rope_head_dim: None = head_dim / 2, made even.
    - qk_norm: RMSNorm on each whole query and key head before rotation, beside the norms on the latents.
    - qkv_bias: biases of all projections but the last; None = like model.bias. The others: see `Attention`.

    Raises ValueError if head_dim is given and nothing is relative to it, and as `Attention` does.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        context_length: int,
        bias: bool,
        *,
        kv_lora_rank: PositiveInt | None = None,
        q_lora_rank: PositiveInt | None = None,
        qk_nope_head_dim: PositiveInt | None = None,
        qk_rope_head_dim: PositiveInt | None = None,
        v_head_dim: PositiveInt | None = None,
        head_dim: PositiveInt | None = None,
        qk_norm: bool = False,
        qkv_bias: bool | None = None,
        dropout: Probability = 0.0,
        logit_softcap: PositiveFloat | None = None,
        document_mask: bool = False,
        backend: Backend = "auto",
    ) -> None:
        if None not in (kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim):
            if head_dim is not None:
                raise ValueError(f"attention.head_dim={head_dim} changes nothing beside all four dimensions of mla")
            head_dim = qk_nope_head_dim  # d_model need not be divisible by n_heads then
        shared = dropout, logit_softcap, document_mask, backend
        super().__init__(d_model, n_heads, context_length, bias, head_dim, None, *shared)
        self.nope_dim = qk_nope_head_dim or self.head_dim
        self.rotary_dim = qk_rope_head_dim or 2 * max(1, self.head_dim // 4)
        self.v_head_dim = v_head_dim or self.head_dim
        self.q_lora_rank, self.kv_lora_rank = q_lora_rank, kv_lora_rank or 4 * self.head_dim
        self.head_dim = self.nope_dim + self.rotary_dim  # of queries and keys, from here on
        qkv_bias = bias if qkv_bias is None else qkv_bias

        self.q_down_proj = nn.Linear(d_model, q_lora_rank, bias=qkv_bias) if q_lora_rank else nn.Identity()
        self.q_latent_norm = nn.RMSNorm(q_lora_rank, eps=1e-6) if q_lora_rank else nn.Identity()
        self.q_proj = nn.Linear(q_lora_rank or d_model, n_heads * self.head_dim, bias=qkv_bias)
        self.kv_down_proj = nn.Linear(d_model, self.kv_lora_rank + self.rotary_dim, bias=qkv_bias)
        self.kv_latent_norm = nn.RMSNorm(self.kv_lora_rank, eps=1e-6)
        self.kv_proj = nn.Linear(self.kv_lora_rank, n_heads * (self.nope_dim + self.v_head_dim), bias=qkv_bias)
        self.shared_key = nn.Identity()  # where the rotary key, which all heads share, enters them
        self.q_norm, self.k_norm = head_norms(self.head_dim, qk_norm)
        self.out_proj = ResidualProjection(n_heads * self.v_head_dim, d_model, bias=bias)

    def forward(self, x_BTD: Tensor, context: SequenceContext) -> Tensor:
        """(B, T, D) to (B, T, D). Latents and rotary keys of cached tokens are expanded into heads at each call."""
        q_BHTE = split_heads(self.q_proj(normalize(self.q_latent_norm, self.q_down_proj(x_BTD))), self.head_dim)
        latent_BSC, k_shared_BSR = torch.split(self.kv_down_proj(x_BTD), [self.kv_lora_rank, self.rotary_dim], dim=-1)
        if context.cache is not None:
            latent_BSC = extend(context.cache, "latents", latent_BSC, context.n_seen)
            k_shared_BSR = extend(context.cache, "shared_keys", k_shared_BSR, context.n_seen)
        kv_BHSE = split_heads(self.kv_proj(normalize(self.kv_latent_norm, latent_BSC)), self.nope_dim + self.v_head_dim)
        k_nope_BHSE, v_BHSV = torch.split(kv_BHSE, [self.nope_dim, self.v_head_dim], dim=-1)
        k_shared_BHSR = self.shared_key(k_shared_BSR)[:, None].expand(-1, k_nope_BHSE.shape[1], -1, -1)
        k_BHSE = torch.cat((k_nope_BHSE, k_shared_BHSR), dim=-1)
        q_BHTE, k_BHSE = normalize(self.q_norm, q_BHTE), normalize(self.k_norm, k_BHSE)
        if context.rotation is not None:
            q_BHTE, k_BHSE = self._rotate_end(q_BHTE, context.rotation), self._rotate_end(k_BHSE, context.rotation)
        y_BTD: Tensor = self.out_proj(merge_heads(self.attend(q_BHTE, k_BHSE, v_BHSV, context._replace(cache=None))))
        return y_BTD

    def new_cache(self, n_sequences: int, n_tokens: int, device: torch.device, dtype: torch.dtype) -> Cache:
        """The latents, and the rotary keys that all heads share, before norms and rotation."""
        dims = {"latents": self.kv_lora_rank, "shared_keys": self.rotary_dim}
        return {name: torch.empty(n_sequences, n_tokens, n, device=device, dtype=dtype) for name, n in dims.items()}

    def tensor_parallel_plan(self, n_ranks: int) -> dict[str, Division]:
        """Each rank has n_heads / n_ranks heads; all compute the latents, which are small."""
        refuse_uneven("model.n_heads", self.n_heads, n_ranks)
        return {
            **dict.fromkeys(("q_down_proj", "q_latent_norm", "kv_down_proj", "kv_latent_norm"), "replicated"),
            **dict.fromkeys(("q_norm", "k_norm"), "replicated_on_shards"),
            "shared_key": "into_shards",
            "q_proj": "columns",
            "kv_proj": "columns",
            "out_proj": "rows",
        }

    def _rotate_end(self, x_BHTE: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        nope, rope = torch.split(x_BHTE, [self.nope_dim, self.rotary_dim], dim=-1)
        return torch.cat((nope, rotate(rope, rotation)), dim=-1)
