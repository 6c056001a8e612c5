"""A callback that makes a number non-finite at a step: of a gradient, or of a weight after the step."""

from typing import Any, Literal

import torch
from lightning import Callback


class Poison(Callback):
    """At the given steps, put `value` into the first number of a gradient, or of a weight."""

    def __init__(
        self,
        *,
        steps: list[int],
        into: Literal["gradient", "weight"] = "gradient",
        value: Any = torch.nan,  # a float would not be accepted: settings are finite
        once: bool = False,
    ):
        self.steps, self.into, self.value, self.once = steps, into, value, once

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if self.into == "gradient" and trainer.global_step + 1 in self.steps:
            next(pl_module.parameters()).grad.view(-1)[0] = self.value
            self.steps = [] if self.once else self.steps

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if self.into == "weight" and trainer.global_step in self.steps:
            with torch.no_grad():
                next(pl_module.parameters()).fill_(self.value)
