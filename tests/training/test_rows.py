"""The rows that a run writes: one a step."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from thunderhead.core.config import ConfigError
from thunderhead.core.model.decoder import Decoder
from thunderhead.options import precision
from thunderhead.training.record import read_rows, read_summary

# Dynamo's own look at activations, where it is the first in a process.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


def numbers(folder: Path, column: str) -> dict[int, float]:
    """Values of a column by step, without empty cells."""
    return {int(row["step"]): float(row[column]) for row in read_rows(folder / "metrics.csv")[1] if row[column]}


def test_rows_of_a_run(run: Callable[..., Path]) -> None:
    folder = run(
        "budget=steps", "budget.steps=7", "trainer=cpu", "trainer.log_every_n_steps=3", "validation.every=4",
        "scheduler=constant", "scheduler.warmup=2",
    )  # fmt: skip
    assert list(numbers(folder, "train/loss")) == [1, 3, 6, 7]
    assert list(numbers(folder, "val/loss")) == [4, 7]
    assert list(numbers(folder, "grad_norm")) == [1, 3, 6, 7]
    assert numbers(folder, "tokens") == {step: step * 128 for step in (1, 3, 4, 6, 7)}
    peak = 2.0e-3  # conf/optimizer/adamw.yaml
    assert numbers(folder, "lr") == pytest.approx({1: peak / 2, 3: peak, 6: peak, 7: peak})
    assert min(numbers(folder, "tokens_per_second").values()) > 0
    for step, perplexity in numbers(folder, "val/perplexity").items():
        assert perplexity == pytest.approx(math.exp(numbers(folder, "val/loss")[step]), rel=1e-5)
    flops = numbers(folder, "flops")
    assert flops[6] == 2 * flops[3]
    summary = read_summary(folder)
    assert summary is not None
    assert summary["val_loss"] == pytest.approx(numbers(folder, "val/loss")[7])
    steps = [row["step"] for row in read_rows(folder / "metrics.csv")[1]]
    assert steps == ["1", "3", "4", "6", "7"]


def test_the_logged_loss_is_of_one_step_not_of_those_since_the_last_row(run: Callable[..., Path]) -> None:
    every = run("budget=steps", "budget.steps=4", "trainer=cpu", "trainer.log_every_n_steps=1")
    second = run("budget=steps", "budget.steps=4", "trainer=cpu", "trainer.log_every_n_steps=4")
    losses = numbers(every, "train/loss")
    assert numbers(second, "train/loss") == {1: losses[1], 4: losses[4]}


def test_bytes_have_as_many_bits_as_their_loss(run: Callable[..., Path]) -> None:
    folder = run("tokenizer=byte")
    loss, bits = numbers(folder, "val/loss"), numbers(folder, "val/bits_per_byte")
    # each target is one byte but for the few EOS, which have none: slightly more bits than nats / ln 2
    assert (1 - 1e-12) * loss[2] / math.log(2) <= bits[2] <= 1.02 * loss[2] / math.log(2)


def test_fp16s_scale_and_the_steps_that_it_leaves_out_are_logged(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a scale at which gradients overflow, each step left out halves it."""
    make = precision.AgreeingGradScaler
    monkeypatch.setattr(precision, "AgreeingGradScaler", lambda device: make(device, init_scale=2.0**40))
    folder = run("precision=fp16-mixed", "budget.steps=30", "trainer=cpu", "trainer.log_every_n_steps=1")
    scale, skipped = numbers(folder, "grad_scale"), numbers(folder, "skipped_steps")
    assert skipped[1] == 1
    assert 5 < skipped[30] < 30
    assert scale[30] == 2.0 ** (40 - skipped[30])
    summary = read_summary(folder)
    assert summary is not None
    assert summary["skipped_steps"] == skipped[30]


def test_seconds_are_of_training_alone(run: Callable[..., Path]) -> None:
    saving = ("callbacks=default", "callbacks.checkpoint.every_n_train_steps=1")
    folder = run("compile=block", "compile.backend=eager", *saving, "budget.steps=3")
    summary = read_summary(folder)
    assert summary is not None
    assert summary["checkpoint_seconds"] > 0
    assert summary["compile_seconds"] > 0  # of the first step
    assert "tokens_per_second" in read_rows(folder / "metrics.csv")[0]
    assert 1 not in numbers(folder, "tokens_per_second")
    assert summary["tokens_per_second"] == pytest.approx(2 * 128 / summary["seconds"])


def test_a_step_that_compiles_has_no_speed(run: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    summary = read_summary(run("compile=block", "compile.backend=eager", "budget.steps=1"))
    assert summary is not None
    assert summary["tokens_per_second"] is None
    assert "128 tokens in 0 s" in (told := capsys.readouterr().out)
    assert "0 tokens/s" not in told


def test_what_is_known_before_the_first_step_joins_its_row(run: Callable[..., Path]) -> None:
    """Lightning's monitor logs as an epoch begins; a sanity check validates an untrained model, which is no result."""
    monitor = "+callbacks.rates={_target_: lightning.pytorch.callbacks.LearningRateMonitor, logging_interval: epoch}"
    folder = run(monitor, "+trainer.num_sanity_val_steps=1", "validation.every=2")
    assert [row["step"] for row in read_rows(folder / "metrics.csv")[1]] == ["1", "2"]
    assert numbers(folder, "lr-AdamW/matrices") == pytest.approx({1: numbers(folder, "lr")[1]})
    assert list(numbers(folder, "val/loss")) == [2]


class Taker(Callback):
    """Logs under a name of the run's own."""

    def __init__(self, *, name: str):
        self.name = name

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        pl_module.log(self.name, 7.0)


@pytest.mark.parametrize("name", ["train/loss", "tokens", "lr", "val/bits_per_byte", "tokens/text"])
def test_nobody_else_writes_the_columns_of_the_run(
    name: str, run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run("trainer.log_every_n_steps=1", f"+callbacks.taker={{_target_: {__name__}.Taker, name: {name}}}")
    assert ended.value.code == 1
    assert f"{name} is a column of the run's own" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["val_loss", "diverged", "loss_spikes"])
def test_values_of_others_do_not_take_the_place_of_results(name: str, run: Callable[..., Path]) -> None:
    folder = run(f"+callbacks.taker={{_target_: {__name__}.Taker, name: val/{name}}}")
    summary = read_summary(folder)
    assert summary is not None
    assert summary["metrics"][name] == 7.0
    assert summary.get(name) == (numbers(folder, "val/loss")[2] if name == "val_loss" else None)


def test_a_metric_of_the_datas_own_is_not_measured_twice(run: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"^metrics\.bits_per_byte: "):
        run(f"+metrics.bits_per_byte={{_target_: {__name__}.ones}}")


def ones(losses: Tensor) -> Tensor:
    return torch.ones_like(losses)


class Unreachable(CSVLogger):
    """Fails at one of its methods, as one whose server has gone may."""

    def __init__(self, save_dir: str, *, at: str):
        super().__init__(save_dir)
        setattr(self, at, self.fail)

    def fail(self, *_: Any, **__: Any) -> None:
        raise ConnectionError("the server has gone")


@pytest.mark.parametrize("at", ["log_metrics", "log_hyperparams", "log_text", "save", "finalize"])
def test_a_logger_that_fails_costs_no_result(
    at: str, run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(f"+logger.mine={{_target_: {__name__}.Unreachable, at: {at}}}")
    assert read_summary(folder) is not None
    assert list(numbers(folder, "train/loss")) == [1, 2]
    assert capsys.readouterr().err.count("the server has gone") == 1


def test_stopping_early_by_what_is_not_measured_is_refused_in_one_line(
    run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run("+callbacks.stop={_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: valloss}")
    assert ended.value.code == 1
    assert "`val/loss`" in capsys.readouterr().err


def test_a_cache_that_cannot_be_asked_costs_no_result(
    run: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> float:
        raise RuntimeError("sparse layout")

    monkeypatch.setattr(Decoder, "cache_bytes_per_token", fails)
    summary = read_summary(run())
    assert summary is not None
    assert summary["cache_bytes_per_token"] is None
    assert "sparse layout" in capsys.readouterr().err
