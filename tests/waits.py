"""A callback that waits in a phase of a run, once, and says so by a file in its folder: for kills within it."""

import os
import time
from pathlib import Path
from typing import Any, Literal

from lightning import Callback

from thunderhead.processes import global_rank


class Waits(Callback):
    """Waits `seconds` in the step after `step`, in its validation, or when its checkpoint is half on the disk."""

    def __init__(self, *, phase: Literal["training", "validation", "saving"], step: int, seconds: float):
        self.phase, self.step, self.seconds = phase, step, seconds

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        sync = os.fsync

        def slow_sync(handle: int) -> None:
            if ".ckpt" in os.readlink(f"/proc/self/fd/{handle}"):
                self._wait("saving", trainer)
            sync(handle)

        if self.phase == "saving" and global_rank() == 0:
            os.fsync = slow_sync

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self._wait("training", trainer)

    def on_validation_batch_start(self, trainer: Any, *_: Any) -> None:
        self._wait("validation", trainer)

    def _wait(self, phase: str, trainer: Any) -> None:
        marker = Path(trainer.default_root_dir, f"waits-{self.step}")
        if phase == self.phase and trainer.global_step >= self.step and global_rank() == 0 and not marker.exists():
            marker.touch()
            time.sleep(self.seconds)
