"""Lightning's Trainer for a run: what follows from other groups, callbacks, loggers, plugins."""

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ProgressBar,
)
from lightning.pytorch.loggers import Logger

from thunderhead.core.config import build, build_all, factory
from thunderhead.core.processes import is_rank
from thunderhead.training import hardware
from thunderhead.training.callbacks.metrics import LogMetrics
from thunderhead.training.callbacks.profile import ProfileSteps
from thunderhead.training.callbacks.schedule_picture import SchedulePicture
from thunderhead.training.callbacks.state import AtomicCheckpointIO, BackgroundCheckpointIO
from thunderhead.training.planning import Planned

# Arguments of Lightning's Trainer that follow from other groups.
DERIVED = {
    "max_steps": "budget",
    "min_steps": "budget",
    "max_epochs": "budget",
    "min_epochs": "budget",
    "accumulate_grad_batches": "batch",
    "val_check_interval": "validation.every",
    "check_val_every_n_epoch": "validation.every",
    "precision": "precision",
    "strategy": "strategy",
    "plugins": "precision and strategy",
    "callbacks": "callbacks",
    "logger": "logger",
    "default_root_dir": "hydra.run.dir",
    "use_distributed_sampler": "data",
    "enable_progress_bar": "callbacks",
    "enable_checkpointing": "callbacks",
    # They would begin the data anew after so many batches, or validate on other tokens than the record says.
    "limit_train_batches": "data.max_training_tokens",
    "overfit_batches": "data.max_training_tokens",
    "limit_val_batches": "data.max_validation_tokens",
}

# Callbacks of Lightning that would change what other groups decide.
DECIDED = {
    GradientAccumulationScheduler: "accumulation follows from batch.global_tokens and batch.micro_size",
    BatchSizeFinder: "the largest micro-batch that fits is found by batch.micro_size=auto",
    LearningRateFinder: "learning rates are tried by tune=lr, in a sweep",
}
REFUSALS = (MisconfigurationException, ModuleNotFoundError)
"""What callbacks and loggers of other packages say no with, beside ValueError."""


def callbacks_of(config: dict[str, Any]) -> dict[str, Callback]:
    """Those of the group `callbacks`.

    Raises:
        ConfigError: some refuse their settings, or are no callbacks.
    """
    return build_all(config["callbacks"], "callbacks", Callback, REFUSALS)


def make_trainer(
    config: dict[str, Any],
    planned: Planned,
    run_dir: Path,
    log_metrics: LogMetrics,
    callbacks: Sequence[Callback] = (),
) -> Trainer:
    """Lightning's Trainer with everything that follows from the plan."""
    plan = planned.plan
    loggers = build_all(config["logger"], "logger", Logger, REFUSALS, save_dir=str(run_dir))  # type: ignore[type-abstract]
    schedule = factory(config["scheduler"])
    all_callbacks = [
        log_metrics,
        SchedulePicture(schedule, config["optimizer"]["lr"], plan.tokens_per_step),
        *callbacks_of(config).values(),
        *callbacks,
        *([ProfileSteps(run_dir / "profile")] if config["profile"] else []),
    ]
    precision = hardware.precision_plugin(planned.machine.precision, planned.machine.accelerator)
    checkpoint_io = BackgroundCheckpointIO() if config["background_checkpoints"] else AtomicCheckpointIO()
    plugins = [*precision.pop("plugins", []), checkpoint_io]
    if not is_rank():  # else Lightning looks for one: in a shell within a SLURM job it would wait for tasks
        plugins.append(LightningEnvironment())
    with quiet_lightning():
        trainer: Trainer = build(
            {"num_sanity_val_steps": 0, "enable_model_summary": False} | config["trainer"],
            **precision,
            plugins=plugins,
            strategy=planned.machine.parallelism.strategy(),
            callbacks=all_callbacks,
            logger=list(loggers.values()) or False,
            default_root_dir=str(run_dir),
            max_steps=plan.steps,
            max_epochs=-1,
            accumulate_grad_batches=plan.accumulation,
            val_check_interval=plan.validation_every * plan.accumulation,
            check_val_every_n_epoch=None,
            use_distributed_sampler=False,
            # without these, Lightning adds a bar and a checkpoint of its own
            enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in all_callbacks),
            enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in all_callbacks),
        )
    return trainer


@contextlib.contextmanager
def quiet_lightning() -> Iterator[None]:
    """Remarks of Lightning and litdata on what is decided here (devices, loader workers) are noise to a user."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "litdata")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        warnings.filterwarnings("ignore", ".*LeafSpec.*deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")  # a resumed run's
        warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`")  # other settings, see ExactResume
        warnings.filterwarnings("ignore", ".*sync_dist=True.*")  # torchmetrics has summed over the ranks
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
