"""A run that ends in the middle."""

from lightning import Callback, LightningModule, Trainer


class Crash(Callback):
    """Raise after an optimizer step."""

    def __init__(self, *, after: int):
        self.after = after

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: object) -> None:
        if trainer.global_step == self.after:
            raise KeyError("pulled the plug")
