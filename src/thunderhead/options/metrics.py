"""Further metrics of validation: functions that give the mean of a batch over the targets that count."""

import math

from torch import Tensor

from thunderhead.core.types import PositiveInt


def top_k_accuracy(logits: Tensor, targets: Tensor, *, k: PositiveInt = 1) -> Tensor:
    """The share of targets (B, T) among the k most probable tokens by logits (B, T, V). Negative targets do not count.

    NaN if a score is, as the most probable are then any.
    """
    counted_BT = targets >= 0
    best_BTK = logits.topk(min(k, logits.shape[-1]), dim=-1).indices
    hits_BT = (best_BTK == targets[..., None]).any(dim=-1)
    return hits_BT.float().masked_fill(logits.isnan().any(dim=-1), math.nan)[counted_BT].mean()
