"""A picture of the planned learning rate, before the first step."""

from collections.abc import Callable
from typing import Any

from lightning import Callback, LightningModule, Trainer
from matplotlib.figure import Figure

from thunderhead.training.loggers import log_figure


class SchedulePicture(Callback):
    """Draw the planned learning rate over the run for the loggers (TensorBoard: Images, `schedule/lr`).

    Args:
        schedule: the factor of the peak learning rate at a step, `(step, total_steps) -> float`.
        peak_lr: the optimizer's learning rate.
        tokens_per_step: for the second axis.
    """

    def __init__(self, schedule: Callable[..., float], peak_lr: float, tokens_per_step: int):
        self.schedule, self.peak_lr, self.tokens_per_step = schedule, peak_lr, tokens_per_step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Send the picture to the loggers."""
        if trainer.is_global_zero and trainer.loggers:
            log_figure(trainer.loggers, "schedule/lr", self.draw(trainer.max_steps), trainer.global_step)

    def draw(self, total_steps: int) -> Figure:
        """The curve over all steps."""
        figure = Figure(figsize=(7, 3.5), layout="constrained")
        axes = figure.subplots()
        steps = range(total_steps)
        axes.plot(steps, [self.peak_lr * self.schedule(step, total_steps) for step in steps], color="#0072B2")
        axes.set(xlabel="step", ylabel="learning rate", title="Planned learning rate", ylim=(0, None))
        axes.grid(alpha=0.3)
        tokens = axes.secondary_xaxis("top", functions=(self._tokens, self._steps))
        tokens.set_xlabel("tokens")
        return figure

    def _tokens(self, step: Any) -> Any:
        return step * self.tokens_per_step

    def _steps(self, tokens: Any) -> Any:
        return tokens / self.tokens_per_step
