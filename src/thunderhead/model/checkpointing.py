"""Activation checkpointing: spend computation to save memory."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from thunderhead.model.context import SequenceContext
from thunderhead.types import NonNegativeInt


class ActivationCheckpointing:
    """Keep only the input of some blocks and compute their insides again in the backward pass (Chen et al. 1604.06174).

    The gradients are the same; a checkpointed block costs one more forward pass of it.

    - every: 0 = no block, 1 = each block, n = the first of every n blocks.
    """

    def __init__(self, *, every: NonNegativeInt = 0) -> None:
        self.every = every

    def __call__(self, index: int, block: nn.Module, x_BTD: Tensor, context: SequenceContext) -> Tensor:
        """Run block number `index` on x (B, T, D), checkpointed or not."""
        if self.every and index % self.every == 0 and torch.is_grad_enabled():
            # A function and no wrapper module: wrappers change the names of parameters (FACTS: full resumes break).
            y_BTD: Tensor = checkpoint(block, x_BTD, context, use_reentrant=False)
        else:
            y_BTD = block(x_BTD, context)
        return y_BTD
