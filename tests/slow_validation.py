"""A callback that makes validation slow, and says that it has begun: for signals that come within it."""

import time
from pathlib import Path
from typing import Any

from lightning import Callback


class SlowValidation(Callback):
    """Waits at each batch of the last validation, and writes a file `validating` into the run's folder."""

    def __init__(self, *, seconds: float):
        self.seconds = seconds

    def on_validation_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == trainer.max_steps:
            Path(trainer.default_root_dir, "validating").touch()
            time.sleep(self.seconds)
