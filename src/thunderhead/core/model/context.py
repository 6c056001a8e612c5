"""What all blocks share in one forward pass: positions, documents and who may attend to whom.

Shape letters: B sequences, T tokens a sequence, H query heads, R rotated dimensions of a head.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask


class LayerCache:
    """Keys and values of one layer's tokens so far, so that the next token costs its own work only.

    Args:
        context_length: tokens that there is room for.
    """

    def __init__(self, context_length: int) -> None:
        self.n_tokens = 0
        self._context_length = context_length
        self._keys = self._values = torch.empty(0)

    def extend(self, k_BGTE: Tensor, v_BGTV: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
        """Take in the keys and values of more tokens; returns those of all, or of the last `window` for one token."""
        if self.n_tokens == 0:
            self._keys, self._values = (
                x.new_empty(*x.shape[:2], self._context_length, x.shape[3]) for x in (k_BGTE, v_BGTV)
            )
        end = self.n_tokens + k_BGTE.shape[2]
        self._keys[:, :, self.n_tokens : end] = k_BGTE
        self._values[:, :, self.n_tokens : end] = v_BGTV
        self.n_tokens = end
        first = max(0, end - window) if window is not None and k_BGTE.shape[2] == 1 else 0
        return self._keys[:, :, first:end], self._values[:, :, first:end]


class SequenceContext(NamedTuple):
    """Built once a forward pass by the decoder and handed to every block.

    - position_ids: (B or 1, T), int64; they restart at every document if documents are masked from each other.
    - document_ids: (B, T), int64, ascending from 0; None unless `attention.document_mask`.
    - rotation: cos and sin, each (B or 1, T, R) in float32; None unless positions are rotary.
    - slopes: ALiBi's, (H) in float32; None with other positions. They are contained in `mask` already.
    - mask: for scaled_dot_product_attention: (B or 1, 1, T, T) boolean, or (B or 1, H, T, T) float32 when ALiBi's bias
      is in it; None when plain causal attention (`is_causal`) says it all.
    - block_mask: the same for flex_attention; None on the other backend.
    - cache: this layer's, when text is generated token by token; T is that of the new tokens then.
    """

    position_ids: Tensor
    document_ids: Tensor | None = None
    rotation: tuple[Tensor, Tensor] | None = None
    slopes: Tensor | None = None
    mask: Tensor | None = None
    block_mask: BlockMask | None = None
    cache: LayerCache | None = None


def document_layout(tokens_BT: Tensor, eos_id: int) -> tuple[Tensor, Tensor]:
    """Document number and position within the document of every token, both (B, T) int64.

    The token after an `eos_id` starts a new document; the EOS itself belongs to the document it ends.
    """
    starts_BT = F.pad(tokens_BT[:, :-1] == eos_id, (1, 0), value=False)
    index_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    last_start_BT = (starts_BT * index_T).cummax(dim=1).values
    return starts_BT.cumsum(dim=1), index_T - last_start_BT


def dense_mask(
    n_tokens: int, device: torch.device, window: int | None, document_ids: Tensor | None, slopes_H: Tensor | None
) -> Tensor | None:
    """The mask for scaled_dot_product_attention; shapes and meaning as in `SequenceContext.mask`."""
    if window is None and document_ids is None and slopes_H is None:
        return None
    index_T = torch.arange(n_tokens, device=device)
    distance_TT = index_T[:, None] - index_T[None, :]  # of the query (row) from the key (column)
    allowed = (distance_TT >= 0)[None, None]
    if window is not None:
        allowed = allowed & (distance_TT < window)
    if document_ids is not None:
        allowed = allowed & (document_ids[:, None, :, None] == document_ids[:, None, None, :])
    if slopes_H is None:
        return allowed
    return torch.where(allowed, -slopes_H[:, None, None] * distance_TT, float("-inf"))


def next_mask(n_keys: int, device: torch.device, document_ids: Tensor | None, slopes_H: Tensor | None) -> Tensor | None:
    """The last row of `dense_mask`, (B or 1, 1 or H, 1, n_keys): what the newest token sees of the last n_keys."""
    if document_ids is None and slopes_H is None:
        return None
    allowed = torch.ones(1, 1, 1, n_keys, dtype=torch.bool, device=device)
    if document_ids is not None:
        allowed = (document_ids[:, -n_keys:] == document_ids[:, -1:])[:, None, None]
    if slopes_H is None:
        return allowed
    distance_S = torch.arange(n_keys - 1, -1, -1, device=device)
    return torch.where(allowed, -slopes_H[:, None, None] * distance_S, float("-inf"))


def sparse_mask(n_tokens: int, device: torch.device, window: int | None, document_ids: Tensor | None) -> BlockMask:
    """The mask for flex_attention, which skips blocks without anything allowed; it adds ALiBi to the scores itself."""

    def allowed(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        result = query >= key
        if window is not None:
            result = result & (query - key < window)
        if document_ids is not None:
            result = result & (document_ids[b, query] == document_ids[b, key])
        return result

    n_sequences = None if document_ids is None else document_ids.shape[0]
    return create_block_mask(allowed, n_sequences, None, n_tokens, n_tokens, device=device)
