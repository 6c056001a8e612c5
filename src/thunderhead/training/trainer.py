"""Lightning's Trainer for a run: what follows from other groups, callbacks, loggers, plugins."""

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence

from lightning import Callback, Trainer
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ProgressBar,
)

from thunderhead.core.config import Problem, first_line
from thunderhead.core.processes import is_rank
from thunderhead.core.run import Run
from thunderhead.training.callbacks.batches import CheckBatches
from thunderhead.training.callbacks.metrics import LogMetrics
from thunderhead.training.callbacks.profile import ProfileSteps
from thunderhead.training.callbacks.schedule_picture import SchedulePicture
from thunderhead.training.callbacks.state import AtomicCheckpointIO, BackgroundCheckpointIO
from thunderhead.training.plan import Plan

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


def decided_elsewhere(run: Run) -> list[Problem]:
    """Callbacks of Lightning that would change what other groups decide."""
    return [
        Problem(f"callbacks.{name}", f"{why}: take it out")
        for name, callback in run.callbacks.items()
        for kind, why in DECIDED.items()
        if isinstance(callback, kind)
    ]


def make_trainer(run: Run, plan: Plan, log_metrics: LogMetrics, callbacks: Sequence[Callback] = ()) -> Trainer:
    """Lightning's Trainer with everything that follows from the plan."""
    loggers = list(run.loggers.values())
    all_callbacks = [
        CheckBatches(plan),
        log_metrics,
        SchedulePicture(run.model.schedule, run.config["optimizer"]["lr"], plan.tokens_per_step),
        *run.callbacks.values(),
        *callbacks,
        *([ProfileSteps(run.folder / "profile")] if run.config["profile"] else []),
    ]
    precision = run.precision.of_kind(plan.precision).lightning_arguments(run.accelerator)
    checkpoint_io = BackgroundCheckpointIO() if run.config["background_checkpoints"] else AtomicCheckpointIO()
    plugins = [*precision.pop("plugins", []), checkpoint_io]
    if not is_rank():  # else Lightning looks for one: in a shell within a SLURM job it would wait for tasks
        plugins.append(LightningEnvironment())
    given = {"num_sanity_val_steps": 0, "enable_model_summary": False} | run.trainer.keywords  # type: ignore[attr-defined]
    with quiet_lightning():
        trainer: Trainer = run.trainer.func(  # type: ignore[attr-defined]
            **given,
            **precision,
            plugins=plugins,
            strategy=run.strategy.strategy(),
            callbacks=all_callbacks,
            logger=loggers or False,
            default_root_dir=str(run.folder),
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
    log_metrics.attach(loggers)
    return trainer


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
