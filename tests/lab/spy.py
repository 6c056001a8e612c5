"""A callback that writes down what a run trains on, and with which weights it begins."""

from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor


class Spy(Callback):
    """Saves the tokens of each optimizer step and the initial weights into `file`."""

    def __init__(self, *, file: str):
        self._file, self._steps = file, {}  # type: ignore[var-annotated]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        decoder: Any = pl_module.decoder
        self._weights = {name: weight.detach().clone() for name, weight in decoder.named_parameters()}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Tensor, batch_idx: int) -> None:
        self._steps.setdefault(trainer.global_step, []).append(batch.clone())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        tokens = [torch.cat(batches) for _, batches in sorted(self._steps.items())]
        torch.save({"tokens": tokens, "weights": self._weights}, Path(self._file))
