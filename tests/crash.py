"""A run that ends in the middle."""

from pathlib import Path

from lightning import Callback, LightningModule, Trainer


class Crash(Callback):
    """Raise after an optimizer step."""

    def __init__(self, *, after: int):
        self.after = after

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: object) -> None:
        if trainer.global_step == self.after:
            raise KeyError("pulled the plug")


class Edit(Callback):
    """Write something else into metrics.csv after an optimizer step, or remove it."""

    def __init__(self, *, after: int, content: str):
        self.after, self.content = after, content

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: object) -> None:
        if trainer.global_step == self.after:
            self.after, file = -1, Path(trainer.default_root_dir, "metrics.csv")
            file.write_text(self.content) if self.content else file.unlink()
