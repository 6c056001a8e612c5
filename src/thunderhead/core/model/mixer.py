"""What mixes the tokens of a sequence, the first branch of a block: the interface of attention and of all else.

Shape letters: B sequences, T tokens a sequence, D model dimensions.
"""

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from thunderhead.core.model.context import Cache, SequenceContext
from thunderhead.core.model.loss import Auxiliary
from thunderhead.core.types import Problem


class SequenceMixer(nn.Module):
    """The interface, with the answers of a mixer that has neither heads nor masks, positions or a cache.

    A subclass takes what it needs of d_model, n_heads, context_length, bias, layer_index and n_layers, by these names
    and without defaults; after a * come its settings. It defines `forward`, and the rest where it has other answers.

    - rotary_dim: dimensions of a head that positions may rotate; 0 = the mixer does not use `context.rotation`.
    - document_mask: whether it keeps documents apart, and wants `context.document_ids` for it.
    """

    rotary_dim = 0
    document_mask = False

    def forward(self, x_BTD: Tensor, context: SequenceContext) -> Tensor | tuple[Tensor, Auxiliary]:
        """Mix tokens, each with those before it: (B, T, D) to (B, T, D), beside it terms of the loss if there are any.

        With `context.cache`, x follows the `context.n_seen` tokens that the cache is of, and enters the cache.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no forward(x_BTD, context)")

    def new_cache(self, n_sequences: int, n_tokens: int, device: torch.device, dtype: torch.dtype) -> Cache | None:
        """Tensors with room for n_tokens tokens, of which none was seen yet; None: it cannot go on from a cache.

        `forward` may write into them, or put others of the same shape in their place.
        """
        return None

    def flops_per_token(self) -> int:
        """Multiply-adds × 2 of the forward pass for one token at full context_length: here, those of its matrices."""
        return matrix_flops(self)

    def mask_key(self) -> Hashable:
        """What `masks` depends on beside the context: layers of equal keys share their masks."""
        return None

    def masks(self, context: SequenceContext) -> dict[str, Any]:
        """`mask` or `block_mask` for the context. Called once a forward pass for all layers of one `mask_key`."""
        return {}

    def kernel_on(self, device: torch.device, dtype: torch.dtype, with_slopes: bool = False) -> str:
        """What computes plain training steps there, for the record; `with_slopes` tells that positions are ALiBi."""
        return type(self).__name__

    def problems(self, run: Any) -> list[Problem]:
        """What does not go together with the rest of the run: `run.accelerator` is cpu, cuda or mps."""
        return []


def matrix_flops(module: nn.Module) -> int:
    """2 FLOPs for each weight of a matrix (two or more dimensions), but what modules below say of themselves.

    Embeddings are looked up, which costs none.
    """
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return 0
    own = sum(p.numel() for p in module.parameters(recurse=False) if p.ndim >= 2)
    return 2 * own + sum(flops_per_token(child) for child in module.children())


def flops_per_token(module: nn.Module) -> int:
    """Forward FLOPs of one token: what the module says by a method of this name, or `matrix_flops`."""
    own = getattr(module, "flops_per_token", None)
    return int(own()) if callable(own) else matrix_flops(module)
