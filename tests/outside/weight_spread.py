"""A callback that logs by Lightning's own means."""

from typing import Any

from lightning import Callback, LightningModule, Trainer


class WeightSpread(Callback):
    """Log the largest weight of the embedding after each step."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        pl_module.log("spread", pl_module.decoder.embedding.weight.detach().abs().max())
