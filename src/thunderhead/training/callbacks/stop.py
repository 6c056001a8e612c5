"""Ctrl-C, SIGTERM and other signals that end a process: finish the step, save, stop."""

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from thunderhead.processes import SIGNALS, listen

PATIENCE = 5.0  # seconds until several ranks ask one another again, if no logged step comes before
FAILED = 255  # above all signals, so that it is what ranks agree on


class StoppedError(RuntimeError):
    """A validation, or a step that had not begun, was ended: the run was saved, and makes it up when it goes on."""


class StopOnSignal(Callback):
    """End the run after the step, or the batch of a validation, under way; save a checkpoint, if the run keeps any.

    Lightning's own handling ends a run on SIGTERM with exit status 0 and nothing saved, and waits for ever if one rank
    of several got the signal. Here ranks agree at the end of a step. Several ranks, which asking costs a wait, ask at
    logged steps, and where steps are slow about every PATIENCE seconds. A signal that comes later than GRACE after the
    first one ends the process at once. If what this rank must do beside training has `failed`, that ends the run alike,
    with FAILED as its signal.
    """

    def __init__(self, checkpoint: Path, failed: Callable[[], bool] = lambda: False):
        self.checkpoint, self.failed = checkpoint, failed
        self.received: int | None = None  # the signal that ended the run
        self._listen = listen(self._receive)
        self._before: dict[int, Any] = {}
        self._asked: tuple[int, float] = (0, 0.0)  # (step, this rank's time then)
        self._next = 0  # the step after which ranks ask again at the latest; the same on all

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._asked, self._next = (trainer.global_step, time.monotonic()), trainer.global_step + 1
        try:
            self._before = {number: signal.signal(number, self._listen) for number in SIGNALS}
        except ValueError:  # not in the main thread, where signals never arrive
            self._before = {}

    def _receive(self, number: int) -> None:
        self.received = number

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Alone, stop before the step, so that the row that could not be written is kept by the checkpoint."""
        if trainer.world_size == 1 and self.failed():
            self.received = FAILED
            self._save(trainer)
            raise StoppedError

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimizer step, stop if a signal came to any rank."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0 and self._agreed(trainer):
            self._save(trainer)
            trainer.should_stop = True

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Do not wait for the end of a validation, which may take longer than who sent the signal waits."""
        if self._before and self._agreed(trainer, at_once=True):
            self._save(trainer)
            raise StoppedError

    def _save(self, trainer: Trainer) -> None:
        if trainer.checkpoint_callbacks:
            trainer.save_checkpoint(self.checkpoint)

    def _agreed(self, trainer: Trainer, at_once: bool = False) -> bool:
        if self.failed():
            self.received = FAILED
        if trainer.world_size == 1:
            return self.received is not None
        step, now = trainer.global_step, time.monotonic()
        if not at_once and step < self._next and step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return False
        asked, then = self._asked
        highest = torch.tensor([self.received or 0, now - then], device=trainer.strategy.root_device)
        torch.distributed.all_reduce(highest, op=torch.distributed.ReduceOp.MAX)
        number, seconds = highest.tolist()
        self._asked, self._next = (step, now), step + max(1, int(PATIENCE * (step - asked) / max(seconds, 1e-3)))
        self.received = int(number) or self.received  # which may have come while this rank waited for the others
        return int(number) > 0

    def close(self) -> None:
        """Listen no longer; the last validation and checkpoint come after training, and are part of the run.

        Once one has come, others are still passed over, of which Lightning has put back the handler of before: the
        process has yet to end in order.
        """
        for number, handler in self._before.items():
            signal.signal(number, handler if self.received is None else self._listen)
        self._before = {}
