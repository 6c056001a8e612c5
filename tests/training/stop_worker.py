"""Rank 1 of a run gets SIGTERM after its third step, and rank 0 writes slowly: `python stop_worker.py FOLDER`."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lightning import Callback, Trainer

from thunderhead.training.callbacks.state import AtomicCheckpointIO
from tiny import train_here

RANK = int(os.environ["RANK"])
SECONDS = 1.0  # that a write takes
TOLD_AFTER = 3  # steps
write, fit = AtomicCheckpointIO.save_checkpoint, Trainer.fit


class Told(Callback):
    def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        if RANK == 1 and trainer.global_step == TOLD_AFTER:
            os.kill(os.getpid(), signal.SIGTERM)


def slowly(*arguments: Any) -> None:
    time.sleep(SECONDS)
    write(*arguments)


def told(trainer: Trainer, *arguments: Any, **settings: Any) -> None:
    trainer.callbacks.append(Told())
    fit(trainer, *arguments, **settings)


def main(work: Path) -> None:
    torch.set_num_threads(1)
    ((folder, overrides),) = json.loads((work / "cases.json").read_text())
    said: dict[str, Any] = {"status": 0}
    Path(folder).mkdir(parents=True, exist_ok=True)
    with patch.object(Trainer, "fit", told), patch.object(AtomicCheckpointIO, "save_checkpoint", slowly):
        try:
            train_here(overrides, Path(folder))
        except SystemExit as stopped:
            said = {"status": stopped.code, "kept": (Path(folder) / "checkpoints" / "last.ckpt").exists()}
    every: list[Any] = [None] * 2
    torch.distributed.all_gather_object(every, said)
    if RANK == 0:
        (work / "results.json").write_text(json.dumps(every))
    torch.distributed.destroy_process_group()


main(Path(sys.argv[1]))
