"""Ctrl-C and SIGTERM: finish the step, save, stop."""

import signal
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer


class StopOnSignal(Callback):
    """End the run after the step under way and save a checkpoint to resume from, if the run keeps any.

    Lightning's own handling ends a run on SIGTERM with exit status 0 and nothing saved, and waits for ever if one rank
    of several got the signal. Here ranks agree at the end of a step (of several ranks: of each logged step, as asking
    costs them a wait). A second signal ends the process at once.

    Args:
        checkpoint: where to save.
    """

    def __init__(self, checkpoint: Path):
        self.checkpoint = checkpoint
        self.received: int | None = None
        """The signal that ended the run."""
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen."""
        try:
            self._before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread, where signals never arrive
            self._before = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._stop_listening()  # so that the next one does what it always does

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimizer step, stop if a signal came to any rank."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0 and self._agreed(trainer):
            if trainer.checkpoint_callbacks:
                trainer.save_checkpoint(self.checkpoint)
            trainer.should_stop = True

    def _agreed(self, trainer: Trainer) -> bool:
        if trainer.world_size == 1:
            return self.received is not None
        if trainer.global_step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return False
        number = torch.tensor(self.received or 0, device=trainer.strategy.root_device)
        torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
        self.received = int(number) or None
        return self.received is not None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen no more."""
        self._stop_listening()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Listen no more."""
        self._stop_listening()

    def _stop_listening(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
