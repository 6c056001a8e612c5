"""The training loss: next-token cross-entropy in float32, without ever holding all float32 logits when these are big.

Shape letters: B sequences, T tokens a sequence, N = B · T, D model dimensions, V vocabulary (padded).
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from thunderhead.core.model.norm import at_least_float32
from thunderhead.core.types import NonNegativeFloat, PositiveInt

IGNORED_TARGET = -100
"""Targets of this value count for nothing (the default of torch.nn.functional.cross_entropy)."""

AUTO_CHUNK_BYTES = 2**29
"""chunk_size="auto" keeps the float32 logits of a chunk within 512 MiB, of which about 3 are alive at the peak: little
beside the rest of a step, and yet enough to fill a device."""

Auxiliary = dict[str, Tensor]
"""Terms of the loss by name, scalars. A branch of a block may return (y_BTD, terms) in place of y_BTD."""


class LossTermError(ValueError):
    """A term that a branch or a loss gives cannot be added, or not be told from another."""


class LossTerms(NamedTuple):
    """Scalars in float32 (float64 of a float64 model): loss = cross_entropy + sum of auxiliary, to differentiate."""

    loss: Tensor
    cross_entropy: Tensor  # the mean over the valid targets
    auxiliary: Auxiliary  # weighted already
    each: Tensor | None = None  # (B, T), cross-entropy of each target, 0 of those that do not count; None in training

    def plus(self, more: Auxiliary) -> "LossTerms":
        """With further terms in the loss; LossTermError for one that is called as the cross-entropy is in the logs."""
        if "loss" in more:
            raise LossTermError("loss: a term of it is called `loss`, as the cross-entropy is in the logs: rename it")
        return self._replace(loss=sum(more.values(), self.loss), auxiliary=summed(self.auxiliary, more))


def with_terms(output: Tensor | tuple[Tensor, Auxiliary]) -> tuple[Tensor, Auxiliary]:
    """What a branch or a block returned, y or (y, terms), as the latter; LossTermError for a term that is no scalar."""
    y, terms = output if isinstance(output, tuple) else (output, {})
    for name, term in terms.items():
        if not isinstance(term, Tensor) or term.ndim != 0:
            what = f"a tensor {list(term.shape)}" if isinstance(term, Tensor) else repr(term)
            raise LossTermError(f"loss: the term {name} of a branch is {what}: must be a tensor without dimensions")
    return y, terms


def summed(terms: Auxiliary, more: Auxiliary) -> Auxiliary:
    """Terms of both, those of the same name added up."""
    return terms | {name: terms[name] + value if name in terms else value for name, value in more.items()}


@dataclass(frozen=True, kw_only=True)
class NextTokenLoss:
    """Mean over valid targets of cross-entropy + z_loss · log² Z, Z the sum of the exponentiated logits.

    - z_loss: weight of the penalty that keeps log Z near 0 (PaLM 2204.02311, section 5: 1e-4).
    - chunk_size: tokens whose logits are computed at a time; each chunk's are computed again in the backward pass
      instead of being kept. None = all at once; "auto" = the fewest equal chunks that fit in `AUTO_CHUNK_BYTES`.
      Changes memory and speed, not the result.
    """

    z_loss: NonNegativeFloat = 0.0
    chunk_size: PositiveInt | Literal["auto"] | None = "auto"

    def __call__(self, hidden_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor, vocab_size: int) -> LossTerms:
        """The loss of predicting `targets_BT` from hidden states through the head's weights.

        Rows of the weights from `vocab_size` on are padding, without probability. Without valid targets the loss is 0.
        """
        hidden_ND, targets_N = hidden_BTD.flatten(0, 1), targets_BT.flatten()
        chunk = self.tokens_per_chunk(len(targets_N), len(weight_VD))
        # torch's F.linear_cross_entropy would round a bf16 loss to bf16 and knows no z-loss.
        sums = self._sums if chunk >= len(targets_N) else partial(checkpoint, self._sums, use_reentrant=False)
        pieces = zip(torch.split(hidden_ND, chunk), torch.split(targets_N, chunk), strict=True)
        found = [sums(hidden, weight_VD, targets, vocab_size) for hidden, targets in pieces]
        total = torch.stack([vector for vector, _ in found]).sum(dim=0)
        each = [each_N for _, each_N in found if each_N is not None]
        n_valid = (targets_N != IGNORED_TARGET).sum().clamp(min=1)
        cross_entropy = total[0] / n_valid
        z_loss = {"z_loss": total[1] / n_valid} if self.z_loss else {}
        each_BT = torch.cat(each).view_as(targets_BT) if each else None
        return LossTerms(cross_entropy, cross_entropy, {}, each_BT).plus(z_loss)

    def tokens_per_chunk(self, n_tokens: int, n_logits: int) -> int:
        """How many of n_tokens tokens are computed at a time, with n_logits logits each."""
        if self.chunk_size == "auto":
            n_chunks = math.ceil(n_tokens * n_logits * 4 / AUTO_CHUNK_BYTES)
            return math.ceil(n_tokens / max(n_chunks, 1))
        return min(self.chunk_size or n_tokens, n_tokens)

    def _sums(
        self, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, vocab_size: int
    ) -> tuple[Tensor, Tensor | None]:
        """The sum of cross-entropy over the valid targets and, with a z-loss, that of weighted log² Z: a vector.

        Beside it the cross-entropy of each, where nothing is differentiated.
        """
        logits_NV = at_least_float32(F.linear(hidden_ND, weight_VD)[:, :vocab_size])
        each_N: Tensor | None = None
        if torch.is_grad_enabled() or logits_NV.device.type == "mps":  # which has no float64
            cross_entropy = F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORED_TARGET, reduction="sum")
        else:  # measured, in a sum that does not depend on how the tokens are cut into batches
            each_N = F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORED_TARGET, reduction="none")
            cross_entropy = each_N.sum(dtype=torch.float64)
        if self.z_loss == 0:
            return cross_entropy[None], each_N
        squares_N = logits_NV.logsumexp(dim=-1).square() * (targets_N != IGNORED_TARGET)
        return torch.stack((cross_entropy, self.z_loss * squares_N.sum().to(cross_entropy.dtype))), each_N
