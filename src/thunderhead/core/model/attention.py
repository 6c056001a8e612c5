"""Causal self-attention: one base class that computes softmax(q k^T) v on the best backend, and its variants.

A variant subclasses `Attention`, projects to q, k, v and calls `self.attend`: see `GroupedQueryAttention`.

Shape letters: B sequences, T tokens a sequence, D model dimensions, H query heads, G key/value heads, E dimensions of a
query or key head, V of a value head, C of a compressed latent.
"""

from collections.abc import Hashable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thunderhead.core.model import kernels
from thunderhead.core.model.context import Cache, SequenceContext, dense_mask, extend, sparse_mask
from thunderhead.core.model.division import Division, divisors, refuse_uneven
from thunderhead.core.model.init import ResidualProjection
from thunderhead.core.model.mixer import SequenceMixer, matrix_flops
from thunderhead.core.model.norm import normalize
from thunderhead.core.model.position import rotate
from thunderhead.core.types import PositiveFloat, PositiveInt, Probability, Problem

Backend = Literal["auto", "sdpa", "flex"]


class Attention(SequenceMixer):
    """What variants share. A subclass defines `forward` and calls `attend` in it.

    One whose heads differ sets after `super().__init__`: `n_kv_heads`, `head_dim` and `v_head_dim` as `attend` gets
    them, `rotary_dim` (dimensions of a query head that positions may rotate; 0 = none).

    - head_dim: dimensions of a head; None = d_model / n_heads.
    - window: keys that a query may see, itself included; None = all before it.
    - dropout: of attention probabilities, in training.
    - logit_softcap: scores become cap · tanh(score / cap) before masking (Gemma 2, 2408.00118: 50). Needs flex.
    - document_mask: tokens attend within their document only; if all layers do, positions restart with each document.
    - backend: "sdpa" (scaled_dot_product_attention), "flex" (flex_attention: skips masked blocks; no backward pass on
      the CPU, no dropout) or "auto": flex where it is needed, and on CUDA with documents, a window or ALiBi; else sdpa,
      or `causal_in_blocks` for what that is slow at on CPUs.

    Raises ValueError if the heads do not fit d_model and for settings that no backend can do together.
    """

    def __init__(  # noqa: PLR0917 - of a base class: its subclasses' settings come by keyword
        self,
        d_model: int,
        n_heads: int,
        context_length: int,
        bias: bool,
        head_dim: int | None = None,
        window: int | None = None,
        dropout: float = 0.0,
        logit_softcap: float | None = None,
        document_mask: bool = False,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        if head_dim is None and d_model % n_heads:
            heads = f"use {divisors(d_model)} heads, or set attention.head_dim"
            raise ValueError(f"model.n_heads={n_heads} does not divide model.d_model={d_model}: {heads}")
        if logit_softcap is not None and backend == "sdpa":
            raise ValueError("attention.logit_softcap needs attention.backend=flex or auto: sdpa has no soft-cap")
        self.context_length, self.window, self.document_mask = context_length, window, document_mask
        self.dropout, self.logit_softcap, self.backend = dropout, logit_softcap, backend
        self.n_heads = self.n_kv_heads = n_heads
        self.head_dim: int = head_dim or d_model // n_heads
        self.rotary_dim = self.v_head_dim = self.head_dim
        self.score_scale: float | None = None  # of q k^T; None: 1 / sqrt(head_dim)
        if dropout and self.needs_flex:
            raise ValueError(f"attention.dropout={dropout:g} excludes {self._why_flex}: flex_attention has no dropout")

    @property
    def needs_flex(self) -> bool:
        """Whether only flex_attention will do, which cannot train on a CPU."""
        return self.logit_softcap is not None or self.backend == "flex"

    @property
    def _why_flex(self) -> str:
        return "attention.backend=flex" if self.logit_softcap is None else "attention.logit_softcap"

    def problems(self, run: Any) -> list[Problem]:
        """Where it would have to train by flex_attention on something other than CUDA."""
        if not self.needs_flex or run.accelerator == "cuda":
            return []
        message = f"needs flex_attention, which trains on CUDA only, and this run is on {run.accelerator}"
        return [Problem(self._why_flex, f"{message}: set it to null or auto")]

    def backend_on(self, device: torch.device, with_slopes: bool = False) -> Literal["sdpa", "flex"]:
        """The backend that `attend` uses on a device; `with_slopes` tells that positions are ALiBi."""
        skips_blocks = self.backend == "auto" and not self._is_plain(with_slopes) and not self.dropout
        return "flex" if self.needs_flex or (skips_blocks and device.type == "cuda") else "sdpa"

    def _is_plain(self, with_slopes: bool) -> bool:
        """Whether scores are changed by the causal mask only."""
        return not (self.document_mask or self.window is not None or with_slopes)

    def flops_per_token(self) -> int:
        """Those of the matrices, of q k^T and of the weighted sum of v: no discount for causality (PaLM 2204.02311)."""
        keys = min(self.window or self.context_length, self.context_length)
        return matrix_flops(self) + 2 * keys * self.n_heads * (self.head_dim + self.v_head_dim)

    def mask_key(self) -> Hashable:
        return (type(self), self.window, self.document_mask, self.backend, self.logit_softcap is None, self.dropout > 0)

    def masks(self, context: SequenceContext) -> dict[str, Any]:
        """The mask for the backend in use; after cached tokens always a dense one."""
        context = context if self.document_mask else context._replace(document_ids=None)
        backend = self.backend_on(context.position_ids.device, context.slopes is not None)
        if context.n_seen == 0 and backend == "flex":
            return {"block_mask": sparse_mask(context, self.window)}
        return {"mask": dense_mask(context, self.window)}

    def new_cache(self, n_sequences: int, n_tokens: int, device: torch.device, dtype: torch.dtype) -> Cache | None:
        """Keys and values, (B, G, S, E or V), for `attend`; with a window, S is at most that."""
        sizes = n_sequences, self.n_kv_heads, min(self.window or n_tokens, n_tokens)
        dims = {"keys": self.head_dim, "values": self.v_head_dim}
        return {name: torch.empty(*sizes, dim, device=device, dtype=dtype) for name, dim in dims.items()}

    def attend(self, q_BHTE: Tensor, k_BGTE: Tensor, v_BGTV: Tensor, context: SequenceContext) -> Tensor:
        """Causal softmax(q k^T · score_scale) v, (B, H, T, V), under all the options above. H is a multiple of G."""
        if context.cache is not None:
            k_BGTE = extend(context.cache, "keys", k_BGTE, context.n_seen, self.window)
            v_BGTV = extend(context.cache, "values", v_BGTV, context.n_seen, self.window)
        q_BHTE, k_BGTE = q_BHTE.to(v_BGTV.dtype), k_BGTE.to(v_BGTV.dtype)  # float32 after a norm under autocast
        mask, scale, dropout = context.mask, self.score_scale, self.dropout if self.training else 0.0
        if context.block_mask is not None:
            masks = context.block_mask, context.slopes
            return kernels.flex(q_BHTE, k_BGTE, v_BGTV, *masks, self.logit_softcap, scale)
        if mask is None and context.n_seen == 0 and self._in_blocks(q_BHTE, dropout):
            return kernels.causal_in_blocks(q_BHTE, k_BGTE, v_BGTV, scale)
        if mask is not None and mask.is_floating_point():
            mask = mask.to(q_BHTE.dtype)  # the kernels want one dtype; ALiBi's bias rounds like the scores do
        if self.logit_softcap is not None:
            return kernels.softcapped(q_BHTE, k_BGTE, v_BGTV, mask, self.logit_softcap, scale)
        is_causal = mask is None and q_BHTE.shape[2] == k_BGTE.shape[2]  # one token after others sees all
        shared_by = q_BHTE.shape[1] // k_BGTE.shape[1]
        if shared_by > 1 and _is_16_bit_on_cpu(q_BHTE) and context.cache is None:
            # there torch's kernel takes up to a fifth longer where it is left to share keys (docs/performance.md)
            k_BGTE, v_BGTV = (x.repeat_interleave(shared_by, dim=1) for x in (k_BGTE, v_BGTV))
            shared_by = 1
        return F.scaled_dot_product_attention(
            q_BHTE, k_BGTE, v_BGTV, mask, dropout, is_causal, scale=scale, enable_gqa=shared_by > 1
        )

    def _in_blocks(self, q_BHTE: Tensor, dropout: float) -> bool:
        """Whether `causal_in_blocks` is for plain causal attention of these queries."""
        is_short = q_BHTE.shape[2] <= kernels.BLOCKWISE_TOKENS
        return self.backend == "auto" and _is_16_bit_on_cpu(q_BHTE) and is_short and not dropout

    def kernel_on(self, device: torch.device, dtype: torch.dtype, with_slopes: bool = False) -> str:
        """What computes plain training steps there: "flex", "blocks", or the kernel that sdpa dispatches to."""
        if self.backend_on(device, with_slopes) == "flex":
            return "flex"
        heads = (self.n_heads, self.head_dim), (self.n_kv_heads, self.head_dim), (self.n_kv_heads, self.v_head_dim)
        q, k, v = (
            torch.empty(1, n, self.context_length, dim, device=device, dtype=dtype, requires_grad=True)
            for n, dim in heads
        )
        is_causal = self._is_plain(with_slopes)
        if is_causal and self._in_blocks(q, self.dropout):
            return "blocks"
        return kernels.fused(q, k, v, is_causal, self.dropout, self.score_scale)


def _is_16_bit_on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype in (torch.bfloat16, torch.float16)


class GroupedQueryAttention(Attention):
    """Multi-head (Vaswani et al. 2017), multi-query (Shazeer 1911.02150) and grouped-query (2305.13245) attention.

    - n_kv_heads: key/value heads, a number that divides n_heads or a ratio of it below 1 (0.25 = four query heads share
      a key/value head). None = n_heads (multi-head); 1 = multi-query.
    - window: the last tokens, itself included, that a token sees (Mistral 7B, 2310.06825): a number, or a ratio of
      context_length below 1. None = all.
    - qk_norm: RMSNorm on each query and key head, before rotation (2309.14322; Qwen 3).
    - qkv_bias: biases of the q, k and v projections; None = like model.bias (Qwen 2: true with model.bias false).
    - head_dim, dropout, logit_softcap, document_mask, backend: see `Attention`.

    Raises ValueError if n_kv_heads does not divide n_heads, for a window as long as the context, and as `Attention`.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        context_length: int,
        bias: bool,
        *,
        n_kv_heads: int | float | None = None,
        window: int | float | None = None,
        head_dim: PositiveInt | None = None,
        qk_norm: bool = False,
        qkv_bias: bool | None = None,
        dropout: Probability = 0.0,
        logit_softcap: PositiveFloat | None = None,
        document_mask: bool = False,
        backend: Backend = "auto",
    ) -> None:
        shared = _resolve_window(window, context_length), dropout, logit_softcap, document_mask, backend
        super().__init__(d_model, n_heads, context_length, bias, head_dim, *shared)
        self.n_kv_heads = _resolve_kv_heads(n_kv_heads, n_heads)
        qkv_bias = bias if qkv_bias is None else qkv_bias
        self.q_proj = nn.Linear(d_model, n_heads * self.head_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(d_model, self.n_kv_heads * self.head_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(d_model, self.n_kv_heads * self.head_dim, bias=qkv_bias)
        self.q_norm, self.k_norm = head_norms(self.head_dim, qk_norm)
        self.out_proj = ResidualProjection(n_heads * self.head_dim, d_model, bias=bias)

    def forward(self, x_BTD: Tensor, context: SequenceContext) -> Tensor:
        q_BHTE = normalize(self.q_norm, split_heads(self.q_proj(x_BTD), self.head_dim))
        k_BGTE = normalize(self.k_norm, split_heads(self.k_proj(x_BTD), self.head_dim))
        v_BGTE = split_heads(self.v_proj(x_BTD), self.head_dim)
        if context.rotation is not None:
            q_BHTE, k_BGTE = rotate(q_BHTE, context.rotation), rotate(k_BGTE, context.rotation)
        y_BTD: Tensor = self.out_proj(merge_heads(self.attend(q_BHTE, k_BGTE, v_BGTE, context)))
        return y_BTD

    def tensor_parallel_plan(self, n_ranks: int) -> dict[str, Division]:
        """Each rank has n_heads / n_ranks query heads with their key/value heads."""
        refuse_uneven("model.n_heads", self.n_heads, n_ranks)
        refuse_uneven("attention.n_kv_heads", self.n_kv_heads, n_ranks)
        columns: dict[str, Division] = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "columns")
        return {**columns, "q_norm": "replicated_on_shards", "k_norm": "replicated_on_shards", "out_proj": "rows"}


def _resolve_kv_heads(given: float | None, n_heads: int) -> int:
    if given is None:
        return n_heads
    count = round(given * n_heads, 6) if 0 < given < 1 else given
    if count < 1 or count != int(count) or n_heads % count:
        said = f"attention.n_kv_heads={given}" + (f" ({count:g} heads)" if count != given else "")
        raise ValueError(f"{said} does not divide model.n_heads={n_heads}: use {divisors(n_heads)}")
    return int(count)


def _resolve_window(given: float | None, context_length: int) -> int | None:
    if given is None:
        return None
    tokens = max(1, round(given * context_length)) if 0 < given < 1 else given
    if not isinstance(tokens, int) or tokens < 1:
        raise ValueError(f"attention.window={given} must be a positive number of tokens or a ratio in (0, 1)")
    if tokens >= context_length:
        reaches = f"attention.window={given} reaches all of model.context_length={context_length}"
        raise ValueError(f"{reaches} and changes nothing: make it shorter, or null")
    return tokens


def head_norms(head_dim: int, qk_norm: bool) -> tuple[nn.Module, nn.Module]:
    """Norms for query and key heads; eps as in Qwen 3."""
    return tuple(nn.RMSNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity() for _ in range(2))  # type: ignore[return-value]


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """(B, T, heads · head_dim) to (B, heads, T, head_dim)."""
    return x.view(*x.shape[:2], -1, head_dim).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, heads, T, head_dim) to (B, T, heads · head_dim)."""
    return x.transpose(1, 2).flatten(2)
