"""The progress bar: optimizer steps, loss, speed and time left."""

import contextlib
import math
import time
from typing import Any

from lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from thunderhead.terminal import TELL_SECONDS, duration
from thunderhead.training import hardware
from thunderhead.training.callbacks.metrics import LogMetrics


class StepProgress(Callback):
    """A bar over optimizer steps; Lightning's own bars count micro-batches of an epoch that never ends.

    Off a terminal it prints a line every half minute instead, and each validation. Rank 0 speaks for all.
    """

    def __init__(self, *, refresh_rate: int = 1):
        self.refresh_rate = refresh_rate  # optimizer steps between updates
        self._progress: Progress | None = None
        self._first_step = self._last = 0
        self._began = self._told = 0.0  # when training did, and the last line was printed

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._first_step = self._last = trainer.global_step
        self._began, self._told = time.monotonic(), -math.inf
        console = Console(stderr=True)
        if trainer.is_global_zero and console.is_terminal:
            done, times = (BarColumn(), MofNCompleteColumn()), (TimeElapsedColumn(), "left", TimeRemainingColumn())
            metrics = TextColumn("{task.fields[metrics]}")
            self._progress = Progress("[bold]Training", *done, metrics, *times, console=console)
            self._progress.add_task("", total=trainer.max_steps, completed=self._last, metrics="")
            self._progress.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, steps = trainer.global_step, trainer.max_steps
        if step == self._last or not trainer.is_global_zero:
            return
        if self._progress is not None:
            if step % self.refresh_rate == 0 or step == steps:
                self._progress.update(self._progress.task_ids[0], completed=step, metrics=self._metrics(trainer))
        elif step == steps or time.monotonic() - self._told >= TELL_SECONDS:
            self._told = time.monotonic()
            left = (self._told - self._began) / (step - self._first_step) * (steps - step)
            self._tell(f"{step}/{steps}", self._metrics(trainer, step), f"{duration(left)} left" if left else "")
        self._last = step

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loss = trainer.callback_metrics.get("val/loss")
        if self._progress is None and loss is not None and trainer.is_global_zero and not trainer.sanity_checking:
            self._tell(f"{trainer.global_step}/{trainer.max_steps}", f"validation loss {loss.item():.4f}")

    def _tell(self, at: str, *parts: str) -> None:
        with contextlib.suppress(OSError):  # where this goes may be full, or its reader gone
            print("  ".join(filter(None, [f"step {at}", *parts])), flush=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the terminal back."""
        self._close()

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _metrics(self, trainer: Trainer, at: int | None = None) -> str:
        """What was measured last; `at` a step, no loss of another passes for its own, and validation has its line."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        measured = next(callback for callback in callbacks if isinstance(callback, LogMetrics))
        parts = []
        if "loss" in measured.last_terms:
            of = f" (step {measured.measured_at})" if at not in (None, measured.measured_at) else ""
            parts.append(f"loss {measured.last_terms['loss']:.3f}{of}")
        if at is None and "val/loss" in trainer.callback_metrics:
            parts.append(f"val {trainer.callback_metrics['val/loss'].item():.3f}")
        if measured.throughput is not None:
            parts.append(f"{measured.throughput:,.0f} tokens/s")
        if at is None:
            parts.append(f"{hardware.peak_memory(measured.run.accelerator) / 2**30:.1f} GiB")
        return "  ".join(parts)
