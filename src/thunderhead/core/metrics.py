"""Metrics that torchmetrics lacks."""

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class BitsPerByte(Metric):
    """Bits that the model needs for a byte of text: comparable between tokenizers (Gao et al. 2101.00027, section 3.1).

    Sums nats over targets and the bytes of text behind these targets; special tokens have no bytes.

    Args:
        token_bytes: bytes of each token id.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    nats: Tensor
    bytes_of_text: Tensor
    token_bytes: Tensor

    def __init__(self, token_bytes: list[int], **kwargs: Any):
        super().__init__(**kwargs)
        self.register_buffer("token_bytes", torch.tensor(token_bytes), persistent=False)
        self.add_state("nats", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("bytes_of_text", torch.tensor(0, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, nats: Tensor, targets: Tensor) -> None:
        """Add the summed cross-entropy (nats) of all targets (int64, any shape)."""
        self.nats += nats.detach()
        self.bytes_of_text += self.token_bytes[targets].sum()

    def compute(self) -> Tensor:
        """Bits per byte so far, float32."""
        return (self.nats / math.log(2) / self.bytes_of_text).float()
