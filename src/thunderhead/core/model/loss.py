"""The training loss: next-token cross-entropy in float32, without ever holding all float32 logits when these are big.

Shape letters: B sequences, T tokens a sequence, N = B · T, D model dimensions, V vocabulary (padded).
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from thunderhead.core.types import NonNegativeFloat, PositiveInt

IGNORED_TARGET = -100
"""Targets of this value count for nothing (the default of torch.nn.functional.cross_entropy)."""

AUTO_CHUNK_BYTES = 2**29
"""chunk_size="auto" keeps the float32 logits of a chunk within 512 MiB.

About 3 of these are alive at the peak (logits in the compute dtype, in float32, and the gradient), little beside the
rest of a training step; and yet a chunk is a matrix multiplication that fills a device. What fits stays in one piece,
which saves the head's second forward pass."""


class LossTerms(NamedTuple):
    """Scalars in float32, means over the valid targets; loss = cross_entropy + z_loss is the one to differentiate.

    `z_loss` is weighted already: weight · mean(log² Z).
    """

    loss: Tensor
    cross_entropy: Tensor
    z_loss: Tensor


class NextTokenLoss:
    """Mean over valid targets of cross-entropy + z_loss · log² Z, Z the sum of the exponentiated logits.

    - z_loss: weight of the penalty that keeps log Z near 0 (PaLM 2204.02311, section 5: 1e-4).
    - chunk_size: tokens whose logits are computed at a time; each chunk's are computed again in the backward pass
      instead of being kept. None = all at once; "auto" = all at once if B · T · V float32 logits fit in 512 MiB
      (`AUTO_CHUNK_BYTES`), else the fewest equal chunks that each do. Changes memory and speed, not the result.
    """

    def __init__(
        self, *, z_loss: NonNegativeFloat = 0.0, chunk_size: PositiveInt | Literal["auto"] | None = "auto"
    ) -> None:
        self.z_loss = z_loss
        self.chunk_size = chunk_size

    def __call__(self, hidden_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor, vocab_size: int) -> LossTerms:
        """The loss of predicting `targets_BT` from hidden states through the head's weights.

        Rows of the weights from `vocab_size` on are padding, without probability. Without valid targets the loss is 0.
        """
        hidden_ND, targets_N = hidden_BTD.flatten(0, 1), targets_BT.flatten()
        chunk = self.tokens_per_chunk(len(targets_N), len(weight_VD))
        if chunk >= len(targets_N):
            sums = self._sums(hidden_ND, weight_VD, targets_N, vocab_size)
        else:
            # torch's F.linear_cross_entropy would round a bf16 loss to bf16 and knows no z-loss (FACTS.md).
            parts = [
                checkpoint(self._sums, hidden, weight_VD, targets, vocab_size, use_reentrant=False)
                for hidden, targets in zip(torch.split(hidden_ND, chunk), torch.split(targets_N, chunk), strict=True)
            ]
            sums = torch.stack(parts).sum(dim=0)
        n_valid = (targets_N != IGNORED_TARGET).sum().clamp(min=1)
        cross_entropy, z_loss = sums[0] / n_valid, sums[1] / n_valid  # no views of one tensor: FSDP warns of them
        return LossTerms(cross_entropy + z_loss, cross_entropy, z_loss)

    def tokens_per_chunk(self, n_tokens: int, n_logits: int) -> int:
        """How many of n_tokens tokens are computed at a time, with n_logits logits each."""
        if self.chunk_size is None:
            return n_tokens
        if self.chunk_size == "auto":
            n_chunks = math.ceil(n_tokens * n_logits * 4 / AUTO_CHUNK_BYTES)
            return math.ceil(n_tokens / max(n_chunks, 1))
        return min(self.chunk_size, n_tokens)

    def _sums(self, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, vocab_size: int) -> Tensor:
        """Sums of cross-entropy and of weighted log² Z over the valid targets, a float32 vector of two."""
        logits_NV = F.linear(hidden_ND, weight_VD)[:, :vocab_size].float()
        cross_entropy = F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORED_TARGET, reduction="sum")
        if self.z_loss == 0:
            return torch.stack((cross_entropy, torch.zeros_like(cross_entropy)))
        squares_N = logits_NV.logsumexp(dim=-1).square() * (targets_N != IGNORED_TARGET)
        return torch.stack((cross_entropy, self.z_loss * squares_N.sum()))
