"""The progress bar: optimizer steps, loss, speed and time left."""

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from thunderhead.training.callbacks.metrics import LogMetrics


class StepProgress(ProgressBar):
    """A bar over optimizer steps; Lightning's own bars count micro-batches of an epoch that never ends.

    Off a terminal it prints a line every tenth of the run instead.

    Args:
        refresh_rate: optimizer steps between updates.
    """

    def __init__(self, *, refresh_rate: int = 1):
        super().__init__()
        self.refresh_rate = refresh_rate
        self._console = Console(stderr=True)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._enabled = True
        self._first_step = self._last = 0

    def disable(self) -> None:
        """No bar on ranks other than 0."""
        self._enabled = False

    def enable(self) -> None:
        """Show the bar."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the bar."""
        self._first_step = self._last = trainer.global_step
        if not self._enabled or not self._console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metrics]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._progress.add_task("Training", total=trainer.max_steps, completed=self._last, metrics="")
        self._progress.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance by optimizer steps."""
        step = trainer.global_step
        if step == self._last or not self._enabled:
            return
        if self._progress is not None and self._task is not None:
            if step % self.refresh_rate == 0 or step == trainer.max_steps:
                self._progress.update(self._task, completed=step, metrics=self._metrics(trainer))
        elif step == self._first_step + 1 or step * 10 // trainer.max_steps != self._last * 10 // trainer.max_steps:
            print(f"step {step}/{trainer.max_steps}  {self._metrics(trainer)}", flush=True)
        self._last = step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the finished bar on the screen."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the terminal back."""
        self._close()

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _metrics(self, trainer: Trainer) -> str:
        found = next((c for c in trainer.callbacks if isinstance(c, LogMetrics)), None)  # type: ignore[attr-defined]
        parts = []
        if found is not None and "loss" in found.last_terms:
            parts.append(f"loss {found.last_terms['loss']:.3f}")
        if "val/loss" in trainer.callback_metrics:
            parts.append(f"val {trainer.callback_metrics['val/loss'].item():.3f}")
        if found is not None and found.throughput is not None:
            parts.append(f"{found.throughput:,.0f} tokens/s")
        return "  ".join(parts)
