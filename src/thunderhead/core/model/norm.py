"""Calling torch's norms on the output of a linear layer."""

from torch import Tensor, nn


def normalize(norm: nn.Module, x: Tensor) -> Tensor:
    """norm(x), computed in the dtype of the norm's weights.

    Under autocast a branch hands over bfloat16 while the weights are float32: torch.nn.RMSNorm then leaves its fused
    kernel, with a warning, and the mean of squares is better taken in float32 anyway.
    """
    weight = getattr(norm, "weight", None)
    y: Tensor = norm(x if weight is None else x.to(weight.dtype))
    return y
