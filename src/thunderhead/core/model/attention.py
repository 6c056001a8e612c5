"""Causal self-attention: one base class that computes softmax(q k^T) v on the best backend, and its variants.

Adding a variant: subclass `Attention`, take (d_model, n_heads, context_length, bias) and keyword settings, project to
q, k, v and call `self.attend`; see `GroupedQueryAttention`, and docs of `Attention` for what to override.

Shape letters: B sequences, T tokens a sequence, D model dimensions, H query heads, G key/value heads, E dimensions of a
query or key head, V of a value head, C of a compressed latent.
"""

import math
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.distributed.tensor.parallel.style import ParallelStyle
from torch.nn import functional as F
from torch.nn.attention import SDPBackend
from torch.nn.attention.flex_attention import flex_attention

from thunderhead.core.model.context import SequenceContext, dense_mask, next_mask, sparse_mask
from thunderhead.core.model.init import ResidualProjection
from thunderhead.core.model.norm import normalize
from thunderhead.core.model.position import rotate
from thunderhead.core.types import PositiveFloat, PositiveInt, Probability
from thunderhead.parallel.styles import IntoShards, Replicated, input_of_all, refuse_uneven

Backend = Literal["auto", "sdpa", "flex"]

BLOCKWISE_TOKENS = 1024
"""Up to so many tokens, plain causal attention on a CPU in 16 bits is computed by `causal_in_blocks`."""


class Attention(nn.Module):
    """What variants share. A subclass defines `forward(x_BTD, context) -> (B, T, D)` and calls `attend` in it.

    A subclass may set after `super().__init__`: `rotary_dim` (dimensions of a query head that positions may rotate;
    0 = none), `v_head_dim`, `kv_cache_elements_per_token` (a layer, for the memory plan of generation).

    - head_dim: dimensions of a head; None = d_model / n_heads.
    - window: keys that a query may see, itself included; None = all before it.
    - dropout: of attention probabilities, in training.
    - logit_softcap: scores become cap · tanh(score / cap) before masking (Gemma 2, 2408.00118: 50). Needs flex.
    - document_mask: tokens attend within their document only, and positions restart with each document.
    - backend: "sdpa" (scaled_dot_product_attention), "flex" (flex_attention: skips masked blocks; no backward pass on
      the CPU, no dropout) or "auto": flex on CUDA when a soft-cap, documents, a window or ALiBi ask for it, else sdpa;
      on a CPU in 16 bits, short and plainly causal, `causal_in_blocks` stands in for sdpa.

    Raises ValueError if the heads do not fit d_model and for settings that no backend can do together.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        context_length: int,
        bias: bool,
        *,
        head_dim: int | None = None,
        window: int | None = None,
        dropout: float = 0.0,
        logit_softcap: float | None = None,
        document_mask: bool = False,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        if head_dim is None and d_model % n_heads:
            raise ValueError(
                f"model.n_heads={n_heads} does not divide model.d_model={d_model}: "
                f"use {_one_of(_divisors(d_model))} heads, or set attention.head_dim"
            )
        if logit_softcap is not None and backend == "sdpa":
            raise ValueError(
                f"attention.logit_softcap={logit_softcap:g} needs attention.backend=flex or auto: "
                "scaled_dot_product_attention has no soft-cap"
            )
        if dropout and (logit_softcap is not None or backend == "flex"):
            reason = "attention.backend=flex" if backend == "flex" else f"attention.logit_softcap={logit_softcap:g}"
            raise ValueError(
                f"attention.dropout={dropout:g} and {reason} exclude each other: flex_attention has no dropout"
            )
        self.d_model = d_model
        self.n_heads = n_heads
        self.context_length = context_length
        self.bias = bias
        self.head_dim: int = head_dim or d_model // n_heads
        self.window = window
        self.dropout = dropout
        self.logit_softcap = logit_softcap
        self.document_mask = document_mask
        self.backend = backend
        self.rotary_dim = self.head_dim
        self.v_head_dim = self.head_dim
        self.kv_cache_elements_per_token = 2 * n_heads * self.head_dim
        self.score_scale: float | None = None  # None: 1 / sqrt(head_dim)

    def follow_base(self, base: "Attention") -> None:
        """Maximal update parametrization: scores fall with 1 / head_dim, from those of the base (2203.03466, 4).

        The reason: queries and keys that training has aligned have a product that grows like head_dim, not its root.
        """
        if self.head_dim != base.head_dim:
            self.score_scale = math.sqrt(base.head_dim) / self.head_dim

    def forward(self, x_BTD: Tensor, context: SequenceContext) -> Tensor:
        """Mix tokens: (B, T, D) to (B, T, D)."""
        raise NotImplementedError(f"{type(self).__name__} defines no forward(x_BTD, context)")

    @property
    def needs_flex(self) -> bool:
        """Whether only flex_attention will do, which cannot train on a CPU: `plan` asks before anything is built."""
        return self.logit_softcap is not None or self.backend == "flex"

    def backend_on(self, device: torch.device, with_slopes: bool = False) -> Literal["sdpa", "flex"]:
        """The backend that `attend` uses on a device; `with_slopes` tells that positions are ALiBi."""
        if self.needs_flex:
            return "flex"
        more_than_causal = self.document_mask or self.window is not None or with_slopes
        if self.backend == "auto" and device.type == "cuda" and more_than_causal and not self.dropout:
            return "flex"
        return "sdpa"

    def score_flops_per_token(self) -> int:
        """Forward FLOPs of q k^T and of the weighted sum of v, at full context_length, for one token.

        PaLM's convention (2204.02311, appendix B): no discount for causality; with a window, min(window, T) keys.
        """
        keys = min(self.window or self.context_length, self.context_length)
        return 2 * keys * self.n_heads * (self.head_dim + self.v_head_dim)

    def masks(
        self, n_tokens: int, device: torch.device, document_ids: Tensor | None, slopes_H: Tensor | None
    ) -> dict[str, Any]:
        """The mask fields of a SequenceContext, for the backend in use. The decoder calls it once a forward pass."""
        if self.backend_on(device, slopes_H is not None) == "flex":
            return {"block_mask": sparse_mask(n_tokens, device, self.window, document_ids)}
        return {"mask": dense_mask(n_tokens, device, self.window, document_ids, slopes_H)}

    def next_masks(
        self, n_tokens: int, device: torch.device, document_ids: Tensor | None, slopes_H: Tensor | None
    ) -> dict[str, Any]:
        """The same for one token, the last of `n_tokens`, where the others are cached.

        Raises ValueError for a soft-cap, which needs flex_attention.
        """
        if self.logit_softcap is not None:
            raise ValueError(f"attention.logit_softcap={self.logit_softcap:g} does not go with a key/value cache")
        return {"mask": next_mask(min(self.window or n_tokens, n_tokens), device, document_ids, slopes_H)}

    def attend(self, q_BHTE: Tensor, k_BGTE: Tensor, v_BGTV: Tensor, context: SequenceContext) -> Tensor:
        """Causal softmax(q k^T / sqrt(E)) v, (B, H, T, V), under all the options above. H is a multiple of G.

        `score_scale`, where set, stands in for 1 / sqrt(E).

        Raises ValueError where flex_attention would have to train without a CUDA device.
        """
        grouped = q_BHTE.shape[1] != k_BGTE.shape[1]
        if context.cache is not None:
            k_BGTE, v_BGTV = context.cache.extend(k_BGTE, v_BGTV, self.window)
        q_BHTE, k_BGTE = q_BHTE.to(v_BGTV.dtype), k_BGTE.to(v_BGTV.dtype)  # float32 after a norm under autocast
        if context.block_mask is not None:
            return self._flex(q_BHTE, k_BGTE, v_BGTV, context, grouped)
        mask = context.mask
        if self._in_blocks(q_BHTE, context):
            return causal_in_blocks(q_BHTE, k_BGTE, v_BGTV, self.score_scale)
        if mask is not None and mask.is_floating_point():
            mask = mask.to(
                q_BHTE.dtype
            )  # the kernels want one dtype; ALiBi's bias rounds like the scores themselves do
        return F.scaled_dot_product_attention(
            q_BHTE,
            k_BGTE,
            v_BGTV,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None and q_BHTE.shape[2] == k_BGTE.shape[2],  # one token after a cache sees all of it
            scale=self.score_scale,
            enable_gqa=grouped,
        )

    def kernel_on(self, device: torch.device, dtype: torch.dtype, with_slopes: bool = False) -> str:
        """What computes plain training steps there: "flex", "blocks", or the kernel that sdpa dispatches to.

        Of that, the dispatcher itself is asked: FLASH_ATTENTION, CUDNN_ATTENTION, EFFICIENT_ATTENTION or MATH.
        """
        if self.backend_on(device, with_slopes) == "flex":
            return "flex"
        n_groups = getattr(self, "n_kv_heads", self.n_heads)
        options: dict[str, Any] = {"device": device, "dtype": dtype, "requires_grad": True}
        q, k = (torch.empty(1, n, self.context_length, self.head_dim, **options) for n in (self.n_heads, n_groups))
        v = torch.empty(1, n_groups, self.context_length, self.v_head_dim, **options)
        mask = None
        if self.document_mask or self.window is not None or with_slopes:
            mask = torch.ones(1, 1, self.context_length, self.context_length, dtype=torch.bool, device=device)
        elif not self.dropout and self._in_blocks(q, SequenceContext(torch.empty(0))):
            return "blocks"
        choice = torch._fused_sdp_choice(
            q, k, v, mask, self.dropout, mask is None, scale=self.score_scale, enable_gqa=n_groups != self.n_heads
        )
        return SDPBackend(choice).name

    def _in_blocks(self, q_BHTE: Tensor, context: SequenceContext) -> bool:
        return (
            self.backend == "auto"
            and q_BHTE.device.type == "cpu"
            and q_BHTE.dtype != torch.float32
            and q_BHTE.shape[2] <= BLOCKWISE_TOKENS
            and context.mask is None
            and context.cache is None
            and not (self.dropout and self.training)
        )

    def _flex(self, q: Tensor, k: Tensor, v: Tensor, context: SequenceContext, grouped: bool) -> Tensor:
        if q.device.type != "cuda" and torch.is_grad_enabled() and q.requires_grad:
            name = "backend=flex" if self.logit_softcap is None else f"logit_softcap={self.logit_softcap:g}"
            raise ValueError(
                f"attention.{name} needs flex_attention, which has no backward pass on {q.device.type}: "
                "train on CUDA or choose attention.backend=auto and attention.logit_softcap=null"
            )
        softcap, slopes_H = self.logit_softcap, context.slopes

        def modify(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            if softcap is not None:
                score = softcap * torch.tanh(score / softcap)
            if slopes_H is not None:
                score = score - slopes_H[h] * (query - key)
            return score

        # Uncompiled, flex_attention materialises all scores; an enclosing torch.compile takes it in by itself.
        attend = _compiled_flex_attention() if q.is_cuda and not torch.compiler.is_compiling() else flex_attention
        plain = softcap is None and slopes_H is None
        y = attend(q, k, v, None if plain else modify, context.block_mask, scale=self.score_scale, enable_gqa=grouped)
        assert isinstance(y, Tensor)
        return y


def causal_in_blocks(q_BHTE: Tensor, k_BGTE: Tensor, v_BGTV: Tensor, scale: float | None = None) -> Tensor:
    """Causal softmax(q k^T · scale) v, (B, H, T, V), from a few matrix products for each block of queries.

    For CPUs: torch's flash kernel there takes 2-3 times as long at these lengths in bfloat16 (docs/performance.md).
    Scores are rounded to the dtype of q before the softmax, which is taken in float32; the probabilities of the lower
    triangle, about B · H · T² / 2 of them, are kept for the backward pass.

    - scale: None = 1 / sqrt(E).
    """
    (n_sequences, n_heads, n_tokens, _), n_groups = q_BHTE.shape, k_BGTE.shape[1]
    size = max(64, n_tokens // 8)  # at most 8 blocks, or compiling takes long
    q_BHTE = q_BHTE * (1 / math.sqrt(q_BHTE.shape[-1]) if scale is None else scale)
    mask_SS = torch.full((size, size), -math.inf, device=q_BHTE.device).triu(1)
    outputs = []
    for start in range(0, n_tokens, size):
        end = min(start + size, n_tokens)
        # the queries of all heads that share keys in one matrix, (B, G, H/G · S, E)
        rows = (n_sequences, n_groups, n_heads // n_groups * (end - start), -1)
        heads = (n_sequences, n_heads, end - start, -1)
        q = q_BHTE[:, :, start:end].reshape(rows)
        mask = F.pad(mask_SS[: end - start, : end - start], (start, 0))
        p = ((q @ k_BGTE[:, :, :end].mT).view(heads).float() + mask).softmax(dim=-1).to(v_BGTV.dtype)
        outputs.append((p.view(rows) @ v_BGTV[:, :, :end]).view(heads))
    return torch.cat(outputs, dim=2)


class GroupedQueryAttention(Attention):
    """Multi-head (Vaswani et al. 2017), multi-query (Shazeer 1911.02150) and grouped-query (2305.13245) attention.

    - n_kv_heads: key/value heads. None = n_heads (multi-head); 1 = multi-query; a whole number that divides n_heads; or
      a ratio of n_heads, above 0 and below 1 (0.25 = four query heads share a key/value head).
    - qk_norm: RMSNorm on each query and key head, before rotation (2309.14322; Qwen 3).
    - qkv_bias: biases of the q, k and v projections; None = like model.bias (Qwen 2: true with model.bias false).
    - head_dim, dropout, logit_softcap, document_mask, backend: see `Attention`.

    Raises ValueError if n_kv_heads does not divide n_heads, and as `Attention` does.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        context_length: int,
        bias: bool,
        *,
        n_kv_heads: int | float | None = None,
        head_dim: PositiveInt | None = None,
        qk_norm: bool = False,
        qkv_bias: bool | None = None,
        dropout: Probability = 0.0,
        logit_softcap: PositiveFloat | None = None,
        document_mask: bool = False,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(
            d_model,
            n_heads,
            context_length,
            bias,
            head_dim=head_dim,
            dropout=dropout,
            logit_softcap=logit_softcap,
            document_mask=document_mask,
            backend=backend,
        )
        self.n_kv_heads = _resolve_kv_heads(n_kv_heads, n_heads)
        self.kv_cache_elements_per_token = 2 * self.n_kv_heads * self.head_dim
        qkv_bias = bias if qkv_bias is None else qkv_bias
        self.q_proj = nn.Linear(d_model, n_heads * self.head_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(d_model, self.n_kv_heads * self.head_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(d_model, self.n_kv_heads * self.head_dim, bias=qkv_bias)
        self.q_norm, self.k_norm = _head_norms(self.head_dim, qk_norm)
        self.out_proj = ResidualProjection(n_heads * self.head_dim, d_model, bias=bias)

    def forward(self, x_BTD: Tensor, context: SequenceContext) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        q_BHTE = normalize(self.q_norm, _split_heads(self.q_proj(x_BTD), self.head_dim))
        k_BGTE = normalize(self.k_norm, _split_heads(self.k_proj(x_BTD), self.head_dim))
        v_BGTE = _split_heads(self.v_proj(x_BTD), self.head_dim)
        if context.rotation is not None:
            q_BHTE, k_BGTE = rotate(q_BHTE, context.rotation), rotate(k_BGTE, context.rotation)
        y_BTD: Tensor = self.out_proj(_merge_heads(self.attend(q_BHTE, k_BGTE, v_BGTE, context)))
        return y_BTD

    def tensor_parallel_plan(self, n_ranks: int) -> dict[str, ParallelStyle]:
        """Each rank has n_heads / n_ranks query heads with their key/value heads.

        Raises ValueError if the heads cannot be divided so.
        """
        refuse_uneven("model.n_heads", self.n_heads, n_ranks)
        kv_heads = [n for n in _divisors(self.n_heads) if n % n_ranks == 0]
        nearest = f"attention.n_kv_heads={_one_of(kv_heads)}"
        refuse_uneven("attention.n_kv_heads", self.n_kv_heads, n_ranks, nearest)
        styles: dict[str, ParallelStyle] = {
            "": input_of_all(None),
            **{name: ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")},
            "out_proj": RowwiseParallel(),
        }
        for name, norm in (("q_norm", self.q_norm), ("k_norm", self.k_norm)):
            if not isinstance(norm, nn.Identity):
                styles[name] = Replicated(on_shards=True)
        return styles


class SlidingWindowAttention(GroupedQueryAttention):
    """Grouped-query attention in which a token sees the last `window` tokens, itself included (Mistral, 2310.06825).

    - window: in tokens, or a ratio of context_length, above 0 and below 1.
    - all else: see `GroupedQueryAttention`.

    Raises ValueError if the window is not shorter than context_length (it would change nothing), and as above.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        context_length: int,
        bias: bool,
        *,
        window: int | float,
        n_kv_heads: int | float | None = None,
        head_dim: PositiveInt | None = None,
        qk_norm: bool = False,
        qkv_bias: bool | None = None,
        dropout: Probability = 0.0,
        logit_softcap: PositiveFloat | None = None,
        document_mask: bool = False,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(
            d_model,
            n_heads,
            context_length,
            bias,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            qk_norm=qk_norm,
            qkv_bias=qkv_bias,
            dropout=dropout,
            logit_softcap=logit_softcap,
            document_mask=document_mask,
            backend=backend,
        )
        if window <= 0 or (isinstance(window, float) and window >= 1):
            raise ValueError(f"attention.window={window} must be a positive number of tokens or a ratio in (0, 1)")
        tokens = max(1, round(window * context_length)) if isinstance(window, float) else window
        if tokens >= context_length:
            raise ValueError(
                f"attention.window={window} reaches all of model.context_length={context_length} and changes nothing: "
                "make it shorter or choose attention=gqa"
            )
        self.window = tokens


class MultiHeadLatentAttention(Attention):
    """DeepSeek's multi-head latent attention (2405.04434, 2.1): one small latent holds all heads' keys and values.

    Rotation cannot pass through that compression, so each head has a part without position and a rotary part whose key
    all heads share; with positions that are not rotary the latter is simply not rotated.

    None sizes it as DeepSeek-V2 is sized, relative to head_dim (None = d_model / n_heads):
    - kv_lora_rank: of the key/value latent; None = 4 · head_dim.
    - q_lora_rank: of the query latent; None = no compression of queries, as in DeepSeek-V2-Lite (V2: 12 · head_dim).
    - qk_nope_head_dim, v_head_dim: None = head_dim.
    - qk_rope_head_dim: None = head_dim / 2, made even.
    - qk_norm: RMSNorm on each whole query and key head before rotation, beside the norms on the latents.
    - qkv_bias: biases of all projections but the last; None = like model.bias.
    - dropout, logit_softcap, document_mask, backend: see `Attention`.

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
        relative = kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim
        if head_dim is not None and None not in relative:
            raise ValueError(f"attention.head_dim={head_dim} changes nothing when all four dimensions of mla are given")
        if head_dim is None and None not in relative:
            head_dim = qk_nope_head_dim  # d_model need not be divisible by n_heads then
        super().__init__(
            d_model,
            n_heads,
            context_length,
            bias,
            head_dim=head_dim,
            dropout=dropout,
            logit_softcap=logit_softcap,
            document_mask=document_mask,
            backend=backend,
        )
        self.nope_dim = qk_nope_head_dim or self.head_dim
        self.rotary_dim = qk_rope_head_dim or 2 * max(1, self.head_dim // 4)
        self.v_head_dim = v_head_dim or self.head_dim
        self.kv_lora_rank = kv_lora_rank or 4 * self.head_dim
        self.head_dim = self.nope_dim + self.rotary_dim  # of queries and keys, from here on
        self.kv_cache_elements_per_token = self.kv_lora_rank + self.rotary_dim
        qkv_bias = bias if qkv_bias is None else qkv_bias

        self.q_down_proj: nn.Module = nn.Identity()
        self.q_latent_norm: nn.Module = nn.Identity()
        if q_lora_rank is not None:
            self.q_down_proj = nn.Linear(d_model, q_lora_rank, bias=qkv_bias)
            self.q_latent_norm = nn.RMSNorm(q_lora_rank, eps=1e-6)
        self.q_proj = nn.Linear(q_lora_rank or d_model, n_heads * self.head_dim, bias=qkv_bias)
        self.kv_down_proj = nn.Linear(d_model, self.kv_lora_rank + self.rotary_dim, bias=qkv_bias)
        self.kv_latent_norm = nn.RMSNorm(self.kv_lora_rank, eps=1e-6)
        self.kv_proj = nn.Linear(self.kv_lora_rank, n_heads * (self.nope_dim + self.v_head_dim), bias=qkv_bias)
        self.shared_key = nn.Identity()  # where the rotary key, which all heads share, enters them
        self.q_norm, self.k_norm = _head_norms(self.head_dim, qk_norm)
        self.out_proj = ResidualProjection(n_heads * self.v_head_dim, d_model, bias=bias)

    def forward(self, x_BTD: Tensor, context: SequenceContext) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        q_BHTE = _split_heads(self.q_proj(normalize(self.q_latent_norm, self.q_down_proj(x_BTD))), self.head_dim)
        latent_BTC, k_shared_BTR = torch.split(self.kv_down_proj(x_BTD), [self.kv_lora_rank, self.rotary_dim], dim=-1)
        kv_BHTE = _split_heads(
            self.kv_proj(normalize(self.kv_latent_norm, latent_BTC)), self.nope_dim + self.v_head_dim
        )
        k_nope_BHTE, v_BHTV = torch.split(kv_BHTE, [self.nope_dim, self.v_head_dim], dim=-1)
        k_shared_BHTR = self.shared_key(k_shared_BTR)[:, None].expand(-1, k_nope_BHTE.shape[1], -1, -1)
        k_BHTE = torch.cat((k_nope_BHTE, k_shared_BHTR), dim=-1)
        q_BHTE, k_BHTE = normalize(self.q_norm, q_BHTE), normalize(self.k_norm, k_BHTE)
        if context.rotation is not None:
            q_BHTE, k_BHTE = self._rotate_end(q_BHTE, context.rotation), self._rotate_end(k_BHTE, context.rotation)
        y_BTD: Tensor = self.out_proj(_merge_heads(self.attend(q_BHTE, k_BHTE, v_BHTV, context)))
        return y_BTD

    def tensor_parallel_plan(self, n_ranks: int) -> dict[str, ParallelStyle]:
        """Each rank has n_heads / n_ranks heads; all compute the latents, which are small.

        Raises ValueError if the heads cannot be divided so.
        """
        refuse_uneven("model.n_heads", self.n_heads, n_ranks)
        styles: dict[str, ParallelStyle] = {
            "kv_down_proj": Replicated(),
            "kv_latent_norm": Replicated(),
            "shared_key": IntoShards(),
            "q_proj": ColwiseParallel(),
            "kv_proj": ColwiseParallel(),
            "out_proj": RowwiseParallel(),
        }
        if not isinstance(self.q_down_proj, nn.Identity):
            styles |= {"q_down_proj": Replicated(), "q_latent_norm": Replicated()}
        if not isinstance(self.q_norm, nn.Identity):
            styles |= {"q_norm": Replicated(on_shards=True), "k_norm": Replicated(on_shards=True)}
        return styles

    def _rotate_end(self, x_BHTE: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        nope, rope = torch.split(x_BHTE, [self.nope_dim, self.rotary_dim], dim=-1)
        return torch.cat((nope, rotate(rope, rotation)), dim=-1)


def _resolve_kv_heads(n_kv_heads: float | None, n_heads: int) -> int:
    if n_kv_heads is None:
        return n_heads
    count = n_kv_heads
    if isinstance(n_kv_heads, float) and 0 < n_kv_heads < 1:
        count = round(n_kv_heads * n_heads, 6)
    if count < 1 or count != int(count) or n_heads % count:
        ratio = f" ({count:g} heads)" if count != n_kv_heads else ""
        raise ValueError(
            f"attention.n_kv_heads={n_kv_heads}{ratio} does not divide model.n_heads={n_heads}: "
            f"use {_one_of(_divisors(n_heads))}"
        )
    return int(count)


def _divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]


def _one_of(numbers: list[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last


def _head_norms(head_dim: int, qk_norm: bool) -> tuple[nn.Module, nn.Module]:
    """Norms for query and key heads; eps as in Qwen 3."""
    return (
        (nn.RMSNorm(head_dim, eps=1e-6), nn.RMSNorm(head_dim, eps=1e-6)) if qk_norm else (nn.Identity(), nn.Identity())
    )


def _split_heads(x: Tensor, head_dim: int) -> Tensor:
    """(B, T, heads · head_dim) to (B, heads, T, head_dim)."""
    n_sequences, n_tokens, _ = x.shape
    return x.view(n_sequences, n_tokens, -1, head_dim).transpose(1, 2)


def _merge_heads(x: Tensor) -> Tensor:
    """(B, heads, T, head_dim) to (B, T, heads · head_dim)."""
    return x.transpose(1, 2).flatten(2)


@cache
def _compiled_flex_attention() -> Any:
    return torch.compile(flex_attention)
