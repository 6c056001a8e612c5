"""A callback that fills the disk of a run's folder, or makes that of its checkpoints read-only, after a step."""

import os
import subprocess
from pathlib import Path
from typing import Any

from lightning import Callback


def fill(folder: Path) -> None:
    """Leave no byte free on the disk of a folder, by a file `filler` in it."""
    with (folder / "filler").open("ab", buffering=0) as file:
        free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
        file.write(bytes(free))


class Fills(Callback):
    """Does so once, as the file `filled` in the run's folder tells."""

    def __init__(self, *, after: int, read_only: str | None = None):
        self.after, self.read_only = after, read_only

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        filled = Path(trainer.default_root_dir, "filled")
        if trainer.global_step == self.after and trainer.is_global_zero and not filled.exists():
            filled.touch()
            if self.read_only:
                subprocess.run(["mount", "-o", "remount,ro", self.read_only], check=True)
            else:
                fill(Path(trainer.default_root_dir))
