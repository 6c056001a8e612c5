"""Metrics of training and validation, written every few steps against steps and against tokens."""

import time
from collections.abc import Callable
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from thunderhead.core.data.datamodule import Entry
from thunderhead.core.module import LanguageModel
from thunderhead.training.record import MetricsCsv


class LogMetrics(Callback):
    """Write one row of metrics every `trainer.log_every_n_steps` optimizer steps, and one after each validation.

    Each value goes to the loggers under its own name against the step; TensorBoard gets it a second time under
    `by_tokens/…` against the tokens seen, so that runs with different batch sizes can be laid over each other.

    Args (all from the plan):
        tokens_per_step: tokens of an optimizer step over all ranks.
        flops_per_token: training FLOPs a token, without recomputation.
        peak_flops: FLOP/s of all devices together for `mfu`; None leaves it out.
        sequences_per_step: samples of an optimizer step over all ranks.
        ledger: what each source gave to the first n samples.
    """

    def __init__(
        self,
        tokens_per_step: int,
        flops_per_token: int,
        peak_flops: float | None,
        sequences_per_step: int,
        ledger: Callable[[int], dict[str, Entry]],
    ):
        self.tokens_per_step = tokens_per_step
        self.flops_per_token = flops_per_token
        self.peak_flops = peak_flops
        self.sequences_per_step = sequences_per_step
        self.ledger = ledger
        self.throughput: float | None = None  # tokens/s between the last two log points
        self.last_loss: float | None = None
        self.validated_at: int | None = None  # the step of the last validation
        self.training_seconds = 0.0  # without validation
        self.tokens_timed = 0  # tokens trained on in these seconds
        self.started = False
        self._lr = 0.0
        self._since: float | None = None
        self._steps_timed = self._step_before = 0
        self._seconds = 0.0

    def tokens(self, trainer: Trainer) -> int:
        """Tokens that the optimizer steps so far were made from."""
        return trainer.global_step * self.tokens_per_step

    def state_dict(self) -> dict[str, Any]:
        """The time until a checkpoint, so that a resumed run knows how long it took in all."""
        running = time.perf_counter() - self._since if self._since is not None else 0.0
        return {"training_seconds": self.training_seconds + running, "tokens_timed": self.tokens_timed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.training_seconds, self.tokens_timed = state_dict["training_seconds"], state_dict["tokens_timed"]

    # --- the clock runs while training does ---------------------------------------------------------------------------

    def _start(self) -> None:
        self._since = time.perf_counter()

    def _stop(self) -> None:
        if self._since is not None:
            elapsed = time.perf_counter() - self._since
            self._seconds += elapsed
            self.training_seconds += elapsed
            self._since = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._step_before = trainer.global_step
        self._start()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock: validation is no training time. What comes before the first step is made once more."""
        self._stop()
        if not self.started:
            for logger in trainer.loggers:
                if isinstance(logger, MetricsCsv):
                    logger.forget_validation(trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._stop()

    # --- rows ---------------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Tell the module whether the step under way will be logged."""
        self.started = True
        assert isinstance(pl_module, LanguageModel)
        pl_module.measure_step = self._is_logged(trainer, trainer.global_step + 1)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimizer step that is logged, write its row."""
        assert isinstance(pl_module, LanguageModel)
        step = trainer.global_step
        if step == self._step_before:  # in the middle of an accumulation
            return
        self._step_before = step
        self._steps_timed += 1
        self.tokens_timed += self.tokens_per_step
        if not self._is_logged(trainer, step):
            return
        loss = pl_module.step_loss.compute().item()  # waits for the device
        pl_module.step_loss.reset()
        self._stop()
        self.last_loss = loss
        row = {"train/loss": loss}
        if pl_module.grad_norm is not None:
            row["grad_norm"] = pl_module.grad_norm.item()
        row["lr"] = self._lr
        row["tokens_per_second"] = self.throughput = self._steps_timed * self.tokens_per_step / self._seconds
        if self.peak_flops:
            row["mfu"] = self.throughput * self.flops_per_token / self.peak_flops
        self._seconds, self._steps_timed = 0.0, 0
        self._write(trainer, row)
        self._start()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Keep the learning rate of the step about to be taken (of the first group; all follow one schedule).

        It is the configured one times the schedule, without the group's multiplier from a parametrization.
        """
        group = optimizer.param_groups[0]
        self._lr = float(group["lr"]) / group.get("lr_multiplier", 1.0)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the row of a validation, and let the clock run again."""
        row = {k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        self._write(trainer, row)
        self.validated_at = trainer.global_step
        if trainer.state.fn == "fit":
            self._start()

    def _is_logged(self, trainer: Trainer, step: int) -> bool:
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        return step == 1 or step % every == 0 or step == trainer.max_steps

    def _write(self, trainer: Trainer, row: dict[str, float]) -> None:
        tokens = self.tokens(trainer)
        counters = {"tokens": tokens, "flops": float(tokens * self.flops_per_token)}
        for source, share in self.ledger(trainer.global_step * self.sequences_per_step).items():
            counters |= {f"{column}/{source}": value for column, value in share._asdict().items()}
        for logger in trainer.loggers:
            logger.log_metrics(counters | row, step=trainer.global_step)
            if isinstance(logger, TensorBoardLogger):
                logger.log_metrics({f"by_tokens/{name}": value for name, value in row.items()}, step=tokens)
