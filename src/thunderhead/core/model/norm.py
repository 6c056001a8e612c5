"""The precision of norms and other sums."""

import torch
from torch import Tensor, nn


def normalize(norm: nn.Module, x: Tensor) -> Tensor:
    """norm(x) in the dtype of its weights, where autocast hands over bfloat16: the fused kernels want one dtype."""
    weight = getattr(norm, "weight", None)
    y: Tensor = norm(x if weight is None else x.to(weight.dtype))
    return y


def at_least_float32(x: Tensor) -> Tensor:
    """Return x in float32, or in float64 if it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
