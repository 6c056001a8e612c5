"""Lightning's Trainer for a run: what follows from other groups, and what its callbacks and data must not be."""

import contextlib
import logging
import threading
import warnings
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader

from thunderhead import disk
from thunderhead.core.components import of_kind
from thunderhead.core.config import Problem, first_line
from thunderhead.core.data.datamodule import RunData
from thunderhead.core.run import Run
from thunderhead.processes import is_rank
from thunderhead.training import hardware
from thunderhead.training.callbacks.state import AtomicCheckpointIO, BackgroundCheckpointIO
from thunderhead.training.plan import Plan

# Arguments of Lightning's Trainer that follow from other groups.
DERIVED = {
    **dict.fromkeys(("max_steps", "min_steps", "max_epochs", "min_epochs"), "budget"),
    **dict.fromkeys(("val_check_interval", "check_val_every_n_epoch"), "validation.every"),
    **dict.fromkeys(("callbacks", "enable_progress_bar", "enable_checkpointing"), "callbacks"),
    "accumulate_grad_batches": "batch",
    "precision": "precision",
    "strategy": "strategy",
    "plugins": "precision and strategy",
    "logger": "logger",
    "default_root_dir": "hydra.run.dir",
    "use_distributed_sampler": "data",
    # They would begin the data anew after so many batches, or validate on other tokens than the record says.
    **dict.fromkeys(("limit_train_batches", "overfit_batches"), "data.max_training_tokens"),
    "limit_val_batches": "data.max_validation_bytes",
    "fast_dev_run": "debug=fast",
}

# Callbacks of Lightning that would change what other groups decide.
DECIDED = {
    lightning_callbacks.GradientAccumulationScheduler: "accumulation follows from the group batch",
    lightning_callbacks.BatchSizeFinder: "the largest micro-batch that fits is found by batch.micro_size=auto",
    lightning_callbacks.LearningRateFinder: "learning rates are tried by tune=lr, in a sweep",
}


def decided_elsewhere(run: Run) -> list[Problem]:
    """Callbacks of Lightning that would change what other groups decide."""
    return [
        Problem(f"callbacks.{name}", f"{why}: take it out")
        for name, callback in run.callbacks.items()
        for kind, why in DECIDED.items()
        if isinstance(callback, kind)
    ]


class CheckBatches(Callback):
    """Check the batches of any LightningDataModule; raises ValueError, and MisconfigurationException in validation.

    At the end of an epoch Lightning takes a step with the micro-batches that are left, each still weighted as one of
    a whole step, and a DataLoader gives the sequences that are left.
    """

    def __init__(self, plan: Plan):
        self.plan = plan

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse epochs that end within a step, and a validation of nothing."""
        if not any(trainer.num_val_batches):
            raise ValueError("data: val_dataloader gives no batch, and its loss is the result of a run")
        if not isinstance(getattr(trainer, "datamodule", None), RunData):  # now rather than after some hours
            for each in CombinedLoader(trainer.val_dataloaders).flattened:
                self.on_validation_batch_start(trainer, pl_module, next(iter(each), None), 0)
        n_batches, accumulated = trainer.num_training_batches, self.plan.accumulation
        if n_batches > self.plan.steps * accumulated:  # the run ends before
            return
        loader: Any = trainer.train_dataloader
        size = loader.batch_size if isinstance(loader, DataLoader) and not loader.drop_last else None
        if size and hasattr(loader.sampler, "__len__") and len(loader.sampler) % size:
            raise ValueError(
                f"data: {len(loader.sampler):,} training sequences are no multiple of a batch of {size}, and the last"
                " batch of an epoch would be smaller: make the DataLoader with drop_last=True"
            )
        if n_batches % accumulated:
            raise ValueError(
                f"data: an epoch has {n_batches:,} batches and a step {accumulated}, so that the last step of an epoch"
                f" would be smaller: give a multiple of {accumulated}, or set batch.micro_size higher"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Compare a batch with the plan, and the first one with the vocabulary."""
        expected = (self.plan.micro_batch_size, self.plan.context_length + 1)
        if not isinstance(batch, Tensor) or batch.shape != expected:
            found = (
                f"the shape {tuple(batch.shape)}" if isinstance(batch, Tensor) else f"the type {type(batch).__name__}"
            )
            raise ValueError(
                f"data: a batch has {found}, and should have {expected}, token ids (B, T+1): make its loader with"
                " self.micro_batch_size, which the plan sets, and model.context_length + 1 tokens"
            )
        if batch_idx == 0 and (wrong := self._wrong_ids(batch)):
            raise ValueError(f"data: a batch has {wrong}")

    def _wrong_ids(self, batch: Tensor) -> str:
        """What is wrong with token ids; ~id, negative, is one that is not predicted."""
        if batch.dtype != torch.int64:
            return f"{batch.dtype} in it: must be token ids of torch.int64"
        ids = torch.where(batch < 0, ~batch, batch)
        if ids.numel() and int(ids.max()) >= self.plan.vocab_size:
            return (
                f"the token id {int(ids.max())}: the data says vocab_size={self.plan.vocab_size}, and ids are below it"
            )
        return ""

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Sequences of validation may be shorter."""
        most, wrong = self.plan.context_length + 1, ""
        if not isinstance(batch, Tensor) or batch.ndim != 2 or not 2 <= batch.shape[1] <= most:
            what = (
                f"the shape {tuple(batch.shape)}" if isinstance(batch, Tensor) else f"the type {type(batch).__name__}"
            )
            wrong = f"{what}: must be token ids (B, T+1), at most {most} of model.context_length + 1"
        elif batch_idx == 0:
            wrong = self._wrong_ids(batch)
        if wrong:
            raise MisconfigurationException(f"data: a batch of validation has {wrong}")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A loss of nothing is no number."""
        if trainer.sanity_checking:  # a few batches may have none
            return
        weights = torch.stack([mean.weight for mean in pl_module.val_loss])  # type: ignore[union-attr]
        if not trainer.strategy.reduce(weights, reduce_op="sum").all():  # of all ranks: one may have none
            raise MisconfigurationException("data: a source of validation has no target, and so no loss")


def try_settings(run: Run) -> None:
    """Make a Trainer of the settings of its group, on a CPU and of nothing else, for Lightning to refuse them."""
    elsewhere = {"accelerator", "devices", "num_nodes", "deterministic", "benchmark"}  # or they act on the process
    given = {name: value for name, value in run.trainer.keywords.items() if name not in elsewhere}  # type: ignore[attr-defined]
    without = dict.fromkeys(("logger", "enable_progress_bar", "enable_checkpointing", "enable_model_summary"), False)
    with quiet_lightning():
        made = run.trainer.func(  # type: ignore[attr-defined]
            **(without | given),
            accelerator="cpu",
            devices=1,
            max_steps=1,
            plugins=[LightningEnvironment()],
            default_root_dir=str(run.folder),
        )
    of_kind(made, Trainer)


def make_trainer(run: Run, plan: Plan, callbacks: list[Callback]) -> Trainer:
    """Lightning's Trainer with everything that follows from the plan."""
    precision = run.precision.of_kind(plan.precision).lightning_arguments(run.accelerator)
    checkpoint_io = BackgroundCheckpointIO() if run.config["background_checkpoints"] else AtomicCheckpointIO()
    plugins = [*precision.pop("plugins", []), checkpoint_io]
    if not is_rank():  # else Lightning looks for one: in a shell within a SLURM job it would wait for tasks
        plugins.append(LightningEnvironment())
    given = {"num_sanity_val_steps": 0, "enable_model_summary": False} | run.trainer.keywords  # type: ignore[attr-defined]
    if given.get("devices") in hardware.ALL:
        given["devices"] = run.n_processes
    with quiet_lightning():
        made = run.trainer.func(  # type: ignore[attr-defined]
            **given,
            **precision,
            plugins=plugins,
            strategy=run.strategy.strategy(),
            callbacks=callbacks,
            logger=[*run.loggers.values()] or False,
            default_root_dir=str(run.folder),
            max_steps=plan.steps,
            max_epochs=-1,
            accumulate_grad_batches=plan.accumulation,
            val_check_interval=plan.validation_every * plan.accumulation,
            check_val_every_n_epoch=None,
            use_distributed_sampler=False,
            # without these, Lightning adds a bar and a checkpoint of its own
            enable_progress_bar=any(isinstance(callback, lightning_callbacks.ProgressBar) for callback in callbacks),
            enable_checkpointing=any(
                isinstance(callback, lightning_callbacks.ModelCheckpoint) for callback in callbacks
            ),
        )
    checked: Trainer = of_kind(made, Trainer)
    return checked


def reason(error: BaseException) -> str:
    """The first line of an error's message; of one that a loader's worker raised, the line that says what it was."""
    line = first_line(error)
    if line.startswith("Caught ") and " in DataLoader worker process" in line:
        last = str(error).strip().splitlines()[-1]
        return last.partition(": ")[2] or last
    return line


@contextlib.contextmanager
def quiet_lightning() -> Iterator[None]:
    """Remarks of Lightning and litdata on what is decided here (devices, loader workers) are noise to a user."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "litdata")]
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        warnings.filterwarnings("ignore", ".*LeafSpec.*deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")  # a resumed run's
        warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`")  # other settings, see ExactResume
        warnings.filterwarnings("ignore", ".*sync_dist=True.*")  # torchmetrics has summed over the ranks
        # TensorBoard writes in one, and raises it again with the next row
        hook = threading.excepthook
        quiet = patch.object(threading, "excepthook", lambda said: disk.problem(said.exc_value) or hook(said))
        stack.enter_context(quiet)
        for logger in loggers:
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.WARNING)
        yield
