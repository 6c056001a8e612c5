"""Bits per byte against the formula, and the rows that a run writes."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from thunderhead.core.metrics import BitsPerByte
from thunderhead.training.record import read_rows, read_summary


def test_bits_per_byte_is_the_formula() -> None:
    token_bytes = [3, 1, 5, 0, 2]  # token 3 is EOS
    targets = torch.tensor([[0, 1, 2, 3], [4, 4, 3, 0]])
    logits = torch.randn(2, 4, 5, dtype=torch.float64)
    nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    metric = BitsPerByte(token_bytes)
    for row in range(2):  # in two batches
        metric.update(F.cross_entropy(logits[row], targets[row], reduction="sum"), targets[row])
    n_bytes = (3 + 1 + 5 + 0) + (2 + 2 + 0 + 3)
    # float32 result of float64 sums: 24 bits of mantissa
    assert metric.compute().item() == pytest.approx(nats.item() / math.log(2) / n_bytes, rel=1e-6)


def test_uniform_bytes_need_8_bits() -> None:
    metric = BitsPerByte([1] * 256)
    targets = torch.randint(0, 256, (4, 10))
    metric.update(torch.tensor(40 * math.log(256)), targets)
    assert metric.compute().item() == pytest.approx(8.0, rel=1e-6)


def test_reset_forgets() -> None:
    metric = BitsPerByte([1, 1])
    metric.update(torch.tensor(100.0), torch.zeros(3, dtype=torch.int64))
    metric.reset()
    metric.update(torch.tensor(math.log(2)), torch.zeros(1, dtype=torch.int64))
    assert metric.compute().item() == pytest.approx(1.0)


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


def test_the_logged_loss_is_of_one_step_not_of_those_since_the_last_row(run: Callable[..., Path]) -> None:
    every = run("budget=steps", "budget.steps=4", "trainer=cpu", "trainer.log_every_n_steps=1")
    second = run("budget=steps", "budget.steps=4", "trainer=cpu", "trainer.log_every_n_steps=4")
    losses = numbers(every, "train/loss")
    assert numbers(second, "train/loss") == {1: losses[1], 4: losses[4]}


def test_bytes_have_as_many_bits_as_their_loss(run: Callable[..., Path]) -> None:
    folder = run("tokenizer=byte")
    loss, bits = numbers(folder, "val/loss"), numbers(folder, "val/bits_per_byte")
    # each target is one byte but for the few EOS, which have none: slightly more bits than nats / ln 2
    assert loss[2] / math.log(2) <= bits[2] <= 1.02 * loss[2] / math.log(2)
