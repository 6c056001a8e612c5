"""softmax(q k^T · scale) v in other ways than scaled_dot_product_attention. A scale of None is 1 / sqrt(E).

Shape letters: B sequences, T tokens, S with those before, H query heads, G key/value heads, E dimensions of a query or
key head, V of a value head.
"""

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from thunderhead.core.model.norm import at_least_float32

BLOCKWISE_TOKENS = 1024
"""Up to so many tokens, plain causal attention on a CPU in 16 bits is computed by `causal_in_blocks`."""


def causal_in_blocks(q_BHTE: Tensor, k_BGTE: Tensor, v_BGTV: Tensor, scale: float | None = None) -> Tensor:
    """Causal softmax(q k^T · scale) v, (B, H, T, V), from a few matrix products for each block of queries.

    For CPUs: torch's flash kernel there takes 2-3 times as long at these lengths in bfloat16 (docs/performance.md).
    Scores are rounded to the dtype of q before the softmax, which is taken in float32; the probabilities of the lower
    triangle, about B · H · T² / 2 of them, are kept for the backward pass.
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
        p = (at_least_float32((q @ k_BGTE[:, :, :end].mT).view(heads)) + mask).softmax(dim=-1).to(v_BGTV.dtype)
        outputs.append((p.view(rows) @ v_BGTV[:, :, :end]).view(heads))
    return torch.cat(outputs, dim=2)


def softcapped(  # noqa: PLR0917
    q_BHTE: Tensor, k_BGSE: Tensor, v_BGSV: Tensor, mask: Tensor | None, softcap: float, scale: float | None
) -> Tensor:
    """Softmax(cap · tanh(q k^T · scale / cap) + mask) v, (B, H, T, V): of the few queries that follow cached tokens."""
    shared_by = q_BHTE.shape[1] // k_BGSE.shape[1]
    k_BHSE, v_BHSV = (x.repeat_interleave(shared_by, dim=1) for x in (k_BGSE, v_BGSV))
    scale = 1 / math.sqrt(q_BHTE.shape[-1]) if scale is None else scale
    scores = softcap * torch.tanh(at_least_float32(q_BHTE) @ at_least_float32(k_BHSE).mT * (scale / softcap))
    if mask is not None:
        scores = scores + mask if mask.is_floating_point() else scores.masked_fill(~mask, -math.inf)
    return scores.softmax(dim=-1).to(v_BHSV.dtype) @ v_BHSV


def flex(  # noqa: PLR0917
    q_BHTE: Tensor,
    k_BGTE: Tensor,
    v_BGTV: Tensor,
    block_mask: BlockMask,
    slopes_H: Tensor | None,
    softcap: float | None,
    scale: float | None,
) -> Tensor:
    """flex_attention with a soft-cap and ALiBi's slopes."""

    def modify(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if slopes_H is not None:
            score = score - slopes_H[h] * (query - key)
        return score

    # Uncompiled, flex_attention materialises all scores; an enclosing torch.compile takes it in by itself.
    attend = _compiled(flex_attention) if q_BHTE.is_cuda and not torch.compiler.is_compiling() else flex_attention
    score_mod = None if softcap is None and slopes_H is None else modify
    grouped = q_BHTE.shape[1] != k_BGTE.shape[1]
    y_BHTV: Tensor = attend(q_BHTE, k_BGTE, v_BGTV, score_mod, block_mask, scale=scale, enable_gqa=grouped)
    return y_BHTV


_compiled: Any = cache(torch.compile)


def fused(  # noqa: PLR0917
    q_BHTE: Tensor, k_BGTE: Tensor, v_BGTV: Tensor, is_causal: bool, dropout: float, scale: float | None
) -> str:
    """What sdpa's dispatcher chooses: FLASH_ATTENTION, CUDNN_ATTENTION, EFFICIENT_ATTENTION or MATH."""
    n_tokens, grouped = q_BHTE.shape[2], q_BHTE.shape[1] != k_BGTE.shape[1]
    mask = None if is_causal else torch.ones(1, 1, n_tokens, n_tokens, dtype=torch.bool, device=q_BHTE.device)
    choice = torch._fused_sdp_choice(q_BHTE, k_BGTE, v_BGTV, mask, dropout, is_causal, scale=scale, enable_gqa=grouped)
    return SDPBackend(choice).name
