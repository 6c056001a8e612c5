"""One row of metrics a step, handed to every logger: what other callbacks log joins the row of its step."""

import time
from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import Logger
from torch.optim import Optimizer

from thunderhead import disk
from thunderhead.core.config import first_line
from thunderhead.core.data.datamodule import asked
from thunderhead.core.module import LanguageModel
from thunderhead.core.run import Run
from thunderhead.terminal import complain
from thunderhead.training import about, record
from thunderhead.training.loggers import draw_schedule, finish, forget_from, log_figure
from thunderhead.training.plan import Plan
from thunderhead.training.resume import set_aside

OWN = {
    *("step", "tokens", "flops", "lr", "tokens_per_second", "mfu", "grad_norm", "grad_scale", "skipped_steps"),
    *("train/loss", "val/loss", "val/perplexity"),
}
"""Columns that nobody else writes."""
FORGIVEN = ("log_metrics", "log_hyperparams", "log_text", "log_figure", "log_image", "save", "finalize", "close")
"""Methods of loggers that may fail."""


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError, RuntimeError):
        return False
    return not isinstance(value, str)


def _forgiving(method: Callable[..., Any]) -> Callable[..., None]:
    """What a logger fails at costs no results, and is told once; of what the disk refuses others tell."""
    told = list[Exception]()

    @wraps(method)
    def call(*given: Any, **named: Any) -> None:
        try:
            method(*given, **named)
        except Exception as error:
            if disk.problem(error) is not None:
                raise
            owner = type(getattr(method, "__self__", method)).__name__
            if not told:  # what it says next time may differ by a number only
                complain(f"{owner} failed at {method.__name__}: {type(error).__name__}: {first_line(error)}")
            told.append(error)

    call.forgiven = method  # type: ignore[attr-defined]
    return call


class LogMetrics(Callback):
    """Write a row every `trainer.log_every_n_steps` optimizer steps and at each validation, and time the training.

    A row holds the tokens and FLOPs so far, what each source gave, and by name the loss terms, every learning rate,
    validation's results, and whatever else was logged during the step by `pl_module.log`, Lightning's
    LearningRateMonitor or the user's own callbacks. It is written when the next step begins; a checkpoint keeps the row
    that is still open.

    The record changes when a run is sure to go on, with its first batch: until then a resume may be refused. `mfu` is
    told against `peak_flops`, FLOP/s of all devices together; None leaves it out.
    """

    def __init__(self, run: Run, plan: Plan, peak_flops: float | None):
        self.run, self.plan, self.peak_flops = run, plan, peak_flops
        self.ledger = asked(run.data, "ledger")(plan.steps)  # what each source gave to the first n sequences
        self._own = OWN  # and, from the first step on, those of sources and of validation
        self.throughput: float | None = None  # tokens/s between the last two log points
        self.validated_at: int | None = None  # the step of the last validation
        self.training_seconds = 0.0  # without validation, writing checkpoints and compiling
        self.compile_seconds = 0.0  # of the first step, where something is compiled
        self.tokens_timed = 0  # tokens trained on in training_seconds
        self.steps_taken = 0  # by the optimizer: fp16 leaves out steps whose gradients overflow
        self.last_terms: dict[str, float] = {}  # of the loss, at the last step that was logged
        self.measured_at = 0  # that step
        self.started = False
        self.failed: Exception | None = None  # of the disk that a logger writes to
        self._step, self._row, self._begun = 0, dict[str, float](), False
        self._compiles = plan.compile != "none"  # in the first step of this process
        # It stands between Lightning and the loggers: what others log comes here, and whole rows go there.
        self._sinks: list[tuple[Logger, Callable[..., None]]] = []
        for logger in run.loggers.values():
            for name in FORGIVEN:
                if (method := getattr(logger, name, None)) is not None:
                    setattr(logger, name, _forgiving(getattr(method, "forgiven", method)))  # once, after a rollback
            self._sinks.append((logger, logger.log_metrics))
            receive: Any = partial(self._receive, logger.log_metrics)
            receive.forgiven = logger.log_metrics.forgiven  # type: ignore[attr-defined]
            logger.log_metrics = receive  # type: ignore[method-assign]
        self._checkpoint_io: Any = None
        self._saved_before = 0.0  # seconds of writing checkpoints in processes before this one
        self._since: float | None = None  # what the clock said when it was started
        self._seconds, self._steps_timed, self._step_before = 0.0, 0, 0

    def state_dict(self) -> dict[str, Any]:
        """The time until a checkpoint and the open row, so that a resumed run goes on with both."""
        return {
            "training_seconds": self.training_seconds + (self._elapsed() if self._since is not None else 0.0),
            "compile_seconds": self.compile_seconds,
            "checkpoint_seconds": self.checkpoint_seconds,
            "tokens_timed": self.tokens_timed,
            "steps_taken": self.steps_taken,
            "row": dict(self._row),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.training_seconds, self.tokens_timed = state_dict["training_seconds"], state_dict["tokens_timed"]
        self.compile_seconds, self.steps_taken = state_dict["compile_seconds"], state_dict["steps_taken"]
        self._saved_before = state_dict["checkpoint_seconds"]
        self._row = dict(state_dict["row"])

    # --- rows ---------------------------------------------------------------------------------------------------------

    def _receive(self, log: Callable[..., None], metrics: Mapping[str, Any], step: int | None = None) -> None:
        """What others log: numbers join the open row, a table or an image of W&B's goes on to it."""
        if taken := [name for name in metrics if name in self._own or name.removeprefix("train/") in self.last_terms]:
            raise MisconfigurationException(f"{taken[0]} is a column of the run's own: log it under another name")
        pictures = {name: value for name, value in metrics.items() if not _is_number(value)}
        self._join({name: value for name, value in metrics.items() if name not in pictures})
        if pictures:
            log(pictures, step=step)

    def _join(self, metrics: Mapping[str, Any]) -> None:
        """Put values into the open row; Lightning's own count of steps is one behind, and its epoch never ends."""
        self._row |= {name: float(value) for name, value in metrics.items() if name != "epoch"}

    def write(self, trainer: Trainer) -> None:
        """Hand the open row to the loggers."""
        if self._step == 0:  # what is logged before the first step joins its row
            return
        row, self._row = self._row, {}
        if not row or not trainer.is_global_zero or self.failed is not None:
            return
        tokens = self._step * self.plan.tokens_per_step
        counters = {"tokens": tokens, "flops": float(tokens * self.plan.flops_per_token)}
        for source, share in self.ledger(self._step * self.plan.sequences_per_step).items():
            counters |= {f"{column}/{source}": value for column, value in share._asdict().items()}
        for logger, log in self._sinks:
            try:
                with disk.naming(logger.save_dir or ""):
                    log(counters | row | counters, step=self._step)  # they come first, and nobody else sets them
            except Exception as error:  # Lightning's TensorBoardLogger makes a ValueError of it
                if disk.problem(error) is None:
                    raise
                # StopOnSignal ends the run, with a checkpoint that keeps the row
                self.failed, self._row = error, row
                finish(trainer.loggers, "failed")
                trainer.loggers = []
                return

    def _begin(self, trainer: Trainer) -> None:
        """When a run is sure to go on: its record is taken over; what is of another branch, or comes again, goes."""
        if self._begun:
            return
        self._begun, self._step = True, trainer.global_step
        measured = getattr(trainer.lightning_module, "val_metrics", [{}])[0]
        shares = self.ledger(self.plan.sequences_per_step).items() if trainer.num_training_batches else ()
        self._own = OWN | {f"{column}/{source}" for source, share in shares for column in share._asdict()}
        self._own |= {f"val/{name}" for name in measured}
        if not trainer.is_global_zero:
            return
        record.take_over(self.run.folder)
        set_aside(self.run.folder, trainer.global_step)
        (self.run.folder / "summary.json").unlink(missing_ok=True)  # of fewer steps, or of another branch
        if not self._sinks:
            return
        parameters, step, tokens = about.parameters(self.run, self.plan), trainer.global_step, self.plan.tokens_per_step
        for logger, _ in self._sinks:
            self._row = forget_from(logger, step, step * tokens) | self._row
            logger.log_hyperparams(parameters)
        peak_lr = self.run.config["optimizer"]["lr"]
        figure = draw_schedule(self.run.model.schedule, peak_lr, self.plan.steps, tokens)
        log_figure(self.run.loggers.values(), "schedule", figure, step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock: validation is no training time. One that is made up for comes before the first batch."""
        self._begin(trainer)
        self._stop()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the results into the step's row, and let the clock run again."""
        if trainer.sanity_checking:  # a few batches of the untrained model, and of no step
            return
        self._join({k: v for k, v in trainer.callback_metrics.items() if k.startswith("val/")})
        self.validated_at = trainer.global_step
        if trainer.state.fn == "fit":
            self._start()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Write the row of the step before; tell the module whether the step under way will be logged."""
        assert isinstance(pl_module, LanguageModel)
        self._begin(trainer)
        self.started = True
        if trainer.global_step >= self._step:  # not in the middle of an accumulation
            self.write(trainer)
            self._step = trainer.global_step + 1
        pl_module.measure_step = self._is_logged(trainer, self._step)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Keep the learning rates of the step about to be taken: of groups with one of their own, under their names.

        `lr` is the first group's, without the multiplier that a parametrization gave it.
        """
        if not self._is_logged(trainer, self._step):
            return
        rates: dict[str, float] = {}
        for number, group in enumerate(optimizer.param_groups):
            rate = float(group["lr"]) / group.get("lr_multiplier", 1.0)
            rates.setdefault("lr", rate)
            if rate != rates["lr"]:
                rates[f"lr/{group.get('name', number)}"] = rate
        self._join(rates)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimizer step, count it, and measure it if it is logged."""
        assert isinstance(pl_module, LanguageModel)
        step = trainer.global_step
        if step == self._step_before:  # in the middle of an accumulation
            return
        self._step_before = step
        if self._compiles:
            self._compiles = False
            self.compile_seconds += self._elapsed()
            self._start()
        else:
            self._steps_timed += 1
            self.tokens_timed += self.plan.tokens_per_step
        if not self._is_logged(trainer, step):
            return
        self.measured_at = step
        self.last_terms = {name: mean.compute().item() for name, mean in pl_module.step_terms.items()}
        for mean in pl_module.step_terms.values():
            mean.reset()
        self._stop()  # after `item` has waited for the device
        row = {f"train/{name}": value for name, value in self.last_terms.items()}
        if pl_module.grad_norm is not None:
            row["grad_norm"] = pl_module.grad_norm.item()
        if self._steps_timed:
            row["tokens_per_second"] = self.throughput = self._steps_timed * self.plan.tokens_per_step / self._seconds
            if self.peak_flops:
                row["mfu"] = self.throughput * self.plan.flops_per_token / self.peak_flops
        if (scaler := getattr(trainer.precision_plugin, "scaler", None)) is not None:
            row |= {"grad_scale": scaler.get_scale(), "skipped_steps": step - self.steps_taken}
        self._seconds, self._steps_timed = 0.0, 0
        self._join(row)
        self._start()

    def _is_logged(self, trainer: Trainer, step: int) -> bool:
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        return step == 1 or step % every == 0 or step == trainer.max_steps

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """All steps may have been made before a resume: then this is the first that is heard of it."""
        self._begin(trainer)

    # --- the clock runs while training does, and stands still while training waits for a checkpoint -------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, and count the optimizer's steps."""

        def count(optimizer: Optimizer, *_: Any) -> None:
            self.steps_taken += 1

        trainer.optimizers[0].register_step_post_hook(count)
        self._checkpoint_io, self._step_before = trainer.strategy.checkpoint_io, trainer.global_step
        self._start()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def _saving(self) -> float:
        """Seconds that this process has waited for checkpoints."""
        return float(getattr(self._checkpoint_io, "seconds", 0.0))

    @property
    def checkpoint_seconds(self) -> float:
        """Seconds that training has waited for checkpoints, also before it was resumed."""
        return self._saved_before + self._saving()

    def _start(self) -> None:
        self._since = time.perf_counter() - self._saving()

    def _elapsed(self) -> float:
        assert self._since is not None
        return time.perf_counter() - self._saving() - self._since

    def _stop(self) -> None:
        if self._since is not None:
            elapsed = self._elapsed()
            self._seconds += elapsed
            self.training_seconds += elapsed
            self._since = None
