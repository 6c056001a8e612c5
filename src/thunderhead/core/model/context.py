"""What the layers are told in one forward pass: positions, documents, who may attend to whom, what was seen before.

Shape letters: B sequences, T tokens, S tokens that were seen before them (0 without a cache), K keys that they attend
to, H query heads, R rotated dimensions of a head.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

Cache = dict[str, Tensor]
"""What one layer keeps of the tokens it has seen, by names of its own: see `SequenceMixer.new_cache`."""


class SequenceContext(NamedTuple):
    """Built once a forward pass by the decoder; the last three fields are for the layer that it is handed to.

    - position_ids: (B or 1, S + T), int64; they restart at every document if all layers mask documents.
    - document_ids: (B, S + T), int64, ascending from 0; None unless a layer masks documents.
    - rotation: cos and sin, each (B or 1, S + T, R), for `rotate`; None unless positions are rotary.
    - slopes: ALiBi's, (H); None with other positions. They are contained in `mask` already.
    - n_seen: S.
    - mask: for scaled_dot_product_attention: (B or 1, 1, T, K) boolean, or (B or 1, H, T, K) of numbers when ALiBi's
      bias is in it; None when plain causal attention, or one token that sees all keys, needs none.
    - block_mask: the same for flex_attention; None on the other backend.
    - cache: this layer's, to read and to write, when text is generated; the S tokens are in it.
    """

    position_ids: Tensor
    document_ids: Tensor | None = None
    rotation: tuple[Tensor, Tensor] | None = None
    slopes: Tensor | None = None
    n_seen: int = 0
    mask: Tensor | None = None
    block_mask: BlockMask | None = None
    cache: Cache | None = None


def extend(cache: Cache, name: str, new: Tensor, n_seen: int, window: int | None = None) -> Tensor:
    """Append the rows (second to last dimension) of new tokens to those of the n_seen tokens before, in cache[name].

    Returns the rows that the new tokens may look at: `n_kept` of those before, and their own. With a window, as many
    rows as it is long are enough in cache[name].
    """
    buffer = cache[name]
    assert buffer.shape[:-2] == new.shape[:-2], f"new_cache made {name!r} as {buffer.shape}, and it gets {new.shape}"
    n_rows, n_old = buffer.shape[-2], min(n_seen, buffer.shape[-2])
    first, end = n_old - n_kept(n_old, window), n_old + new.shape[-2]
    if end <= n_rows:
        buffer[..., n_old:end, :] = new
        return buffer[..., first:end, :].to(new.dtype)
    rows = torch.cat((buffer[..., first:n_old, :].to(new.dtype), new), dim=-2)
    buffer.copy_(rows[..., -n_rows:, :])
    return rows


def n_kept(n_seen: int, window: int | None) -> int:
    """How many of the tokens before it a token may still look at."""
    return n_seen if window is None else min(n_seen, window - 1)


def document_layout(tokens_BT: Tensor, eos_id: int) -> tuple[Tensor, Tensor]:
    """Document number and position within the document of every token, both (B, T) int64.

    The token after an `eos_id` starts a new document; the EOS itself belongs to the document it ends.
    """
    starts_BT = F.pad(tokens_BT[:, :-1] == eos_id, (1, 0), value=False)
    index_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    last_start_BT = (starts_BT * index_T).cummax(dim=1).values
    return starts_BT.cumsum(dim=1), index_T - last_start_BT


def visible(window: int | None, document_ids: Tensor | None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Says of places (sequence, head, query, key) whether the query sees the key, as flex_attention asks it."""

    def allowed(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        result = query >= key
        if window is not None:
            result = result & (query - key < window)
        if document_ids is not None:
            result = result & (document_ids[b, query] == document_ids[b, key])
        return result

    return allowed


def dense_mask(context: SequenceContext, window: int | None) -> Tensor | None:
    """What tokens see of those before and of themselves: as in `SequenceContext.mask`."""
    end, device = context.position_ids.shape[1], context.position_ids.device
    n_tokens = end - context.n_seen
    n_keys = n_kept(context.n_seen, window) + n_tokens
    window = window if window is not None and window < n_keys else None
    documents, slopes_H = context.document_ids, context.slopes
    if window is None and documents is None and slopes_H is None and n_tokens in (1, n_keys):
        return None
    b_B11 = torch.arange(1 if documents is None else len(documents), device=device)[:, None, None]
    key_K = torch.arange(end - n_keys, end, device=device)
    query_T1 = key_K[-n_tokens:, None]
    allowed = visible(window, documents)(b_B11, b_B11, query_T1, key_K).view(-1, 1, n_tokens, n_keys)
    if slopes_H is None:
        return allowed
    return torch.where(allowed, -slopes_H[:, None, None] * (query_T1 - key_K), float("-inf"))


def sparse_mask(context: SequenceContext, window: int | None) -> BlockMask:
    """The mask for flex_attention, which skips blocks without anything allowed; it adds ALiBi to the scores itself."""
    documents, n_tokens = context.document_ids, context.position_ids.shape[1]
    n_sequences, device = None if documents is None else len(documents), context.position_ids.device
    return create_block_mask(visible(window, documents), n_sequences, None, n_tokens, n_tokens, device=device)
