"""A metric of validation: one function."""

from torch import Tensor


def confidence(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean probability of the most probable token, over the targets that count."""
    best_BT = logits.softmax(dim=-1).amax(dim=-1)
    return best_BT[targets >= 0].mean()
