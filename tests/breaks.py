"""An activation that fails in the middle of training while the environment says BREAK: a failing arm for sweeps."""

import os

from torch import Tensor

from thunderhead.core.model.feedforward import FeedForward


class Breaks(FeedForward):
    """FeedForward that raises at its 20th call in training."""

    calls = 0

    def forward(self, x_BTD: Tensor) -> Tensor:
        if self.training:
            type(self).calls += 1
        if os.environ.get("BREAK") and type(self).calls > 20:
            raise RuntimeError("a wire broke")
        return super().forward(x_BTD)
