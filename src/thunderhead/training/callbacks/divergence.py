"""Notice that training has diverged before anything of it is saved, and do what `on_divergence` says."""

import math
from typing import Any, Literal

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.distributed.tensor import DTensor

from thunderhead.core.config import Problem
from thunderhead.core.data.datamodule import TokenDataModule
from thunderhead.core.module import LanguageModel
from thunderhead.core.run import Run

Action = Literal["stop", "skip", "rollback"]
NEVER = 2**62  # later than any step
PATIENCE = 20  # steps in a row that are left out until that is called divergence, too


class DivergenceError(RuntimeError):
    """The loss or the norm of the gradients is not finite, from a step on; all ranks raise it alike."""

    def __init__(self, step: int, what: str):
        super().__init__(f"diverged at step {step:,}: {what}")
        self.step, self.what = step, what


def problems(run: Run) -> list[Problem]:
    """A rollback needs somewhere to go back to, and data that can be left out."""
    keeps = any(isinstance(callback, ModelCheckpoint) for callback in run.callbacks.values())
    if run.config["on_divergence"] != "rollback" or (keeps and isinstance(run.data, TokenDataModule)):
        return []
    message = "rollback needs checkpoints (callbacks=default) and data with an order of its samples: use stop"
    return [Problem("on_divergence", message)]


class WatchDivergence(Callback):
    """Watch the loss and the gradients' norm of every step, and raise `DivergenceError` where one is not finite.

    They are watched on the device, which nobody waits for; what was seen is looked at after logged steps, and before a
    checkpoint is written, so that none is of a model that has diverged. So is the loss of each validation. fp16 leaves
    out steps whose gradients overflow by itself: there the loss alone is watched. With `skip` a step whose gradients
    are not finite changes nothing but the count of steps, at the price of waiting for each step's norm.
    """

    def __init__(self, action: Action):
        self.action = action
        self.skipped: list[int] = []  # steps left out
        self.rollbacks: list[dict[str, int]] = []  # see `resume.roll_back`
        self._step, self._first = 0, torch.tensor(NEVER)

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": list(self.skipped), "rollbacks": list(self.rollbacks)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped, self.rollbacks = list(state_dict["skipped"]), list(state_dict["rollbacks"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, LanguageModel)
        self._first = torch.tensor(NEVER, device=pl_module.device)
        is_scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        pl_module.measure_norm = self.action == "skip"
        pl_module.on_grad_norm = None if is_scaled else self._watch_norm

    def _watch(self, value: Tensor) -> None:
        seen = torch.where(torch.isfinite(value.detach()), NEVER, self._step)
        self._first = torch.minimum(self._first, seen.to(self._first.device))

    def _watch_norm(self, module: LanguageModel, norm: Tensor) -> None:
        if self.action != "skip":
            self._watch(norm)
        elif not math.isfinite(norm.item()):
            for parameter in module.parameters():
                parameter.grad = None  # optimizers pass over what has no gradient
            self.skipped.append(self._step)
            if self.skipped[-PATIENCE:] == list(range(self._step - PATIENCE + 1, self._step + 1)):
                raise DivergenceError(self._step - PATIENCE + 1, f"no gradient of {PATIENCE} steps in a row is finite")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._step = trainer.global_step + 1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.action != "skip":
            self._watch(outputs["loss"])
        assert isinstance(pl_module, LanguageModel)
        if trainer.global_step == self._step and pl_module.measure_step:  # the step is over, and logged
            self._look()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        for parameter in pl_module.parameters():  # which no loss has shown yet
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            self._watch(torch.where(torch.isfinite(local.detach()).all(), 0.0, torch.nan))
        self._look()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loss = trainer.callback_metrics.get("val/loss")
        if not trainer.sanity_checking and loss is not None and not math.isfinite(loss):
            raise DivergenceError(trainer.global_step, f"the validation loss is {float(loss)}")

    def _look(self) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self._first, op=torch.distributed.ReduceOp.MIN)
        if (step := int(self._first)) < NEVER:
            raise DivergenceError(step, "the loss, the norm of the gradients or a weight is not finite")
