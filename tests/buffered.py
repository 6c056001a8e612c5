"""A norm with buffers, one that checkpoints keep and one that they do not."""

from typing import Any

import torch
from torch import Tensor, nn


class BufferedNorm(nn.LayerNorm):
    """A LayerNorm whose outputs are scaled and shifted by fixed numbers of each dimension."""

    def __init__(self, dim: int, **settings: Any) -> None:
        super().__init__(dim, **settings)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, dim))
        self.register_buffer("shift", torch.linspace(-0.1, 0.1, dim), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale + self.shift
