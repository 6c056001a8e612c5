"""Sums of metrics against formulas; what is not finite stays so."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.text import Perplexity

from thunderhead.core.metrics import BitsPerByte, Mean, MeanOf, as_metric, names_of, refuse_unknown, try_out
from thunderhead.core.model.loss import with_terms


def test_bits_per_byte_is_the_formula() -> None:
    n_bytes = 20  # of a text of 8 tokens
    targets = torch.tensor([[0, 1, 2, 3], [4, 4, 3, 0]])
    logits = torch.randn(2, 4, 5, dtype=torch.float64)
    nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    metric = BitsPerByte(n_bytes / 8)
    for row in range(2):  # in two batches
        metric.update(F.cross_entropy(logits[row], targets[row], reduction="sum"), targets[row])
    assert metric.compute().item() == pytest.approx(nats.item() / math.log(2) / n_bytes, rel=1e-12)


def test_uniform_bytes_need_8_bits() -> None:
    metric = BitsPerByte(1.0)
    targets = torch.randint(0, 256, (4, 10))
    metric.update(torch.tensor(40 * math.log(256)), targets)
    assert metric.compute().item() == pytest.approx(8.0, rel=1e-6)


def test_reset_forgets() -> None:
    metric = BitsPerByte(1.0)
    metric.update(torch.tensor(100.0), torch.zeros(3, dtype=torch.int64))
    metric.reset()
    metric.update(torch.tensor(math.log(2)), torch.zeros(1, dtype=torch.int64))
    assert metric.compute().item() == pytest.approx(1.0)


def test_a_value_that_is_not_finite_is_not_left_out() -> None:
    """torchmetrics' MeanMetric removes NaN together with its weight."""
    for bad in (math.nan, math.inf):
        mean = Mean()
        for value in (4.0, bad, 5.0):
            mean.update(torch.tensor(value), torch.tensor(10))
        assert not math.isfinite(mean.compute().item())
        metric = BitsPerByte(1.0)
        metric.update(torch.tensor(bad), torch.zeros(3, dtype=torch.int64))
        metric.update(torch.tensor(1.0), torch.zeros(3, dtype=torch.int64))
        assert not math.isfinite(metric.compute().item())
    mean.reset()
    mean.update(torch.tensor(3.0), 2.0)
    mean.update(torch.tensor(6.0), 1.0)
    assert mean.compute().item() == 4.0


def test_sums_do_not_depend_on_how_they_are_cut() -> None:
    """In float64: 16,384 losses of about 4 nats in batches of any size agree to 13 digits; float32 to 6 or 7."""
    losses = (4 + torch.randn(16_384, dtype=torch.float64)).float()
    results = []
    for size in (1, 64, 4096):
        mean = Mean()
        for batch in losses.split(size):
            mean.update(batch.double().mean(), len(batch))
        results.append(mean.compute().item())
    assert results == pytest.approx([losses.double().mean().item()] * 3, rel=1e-13)


def test_ignored_targets_have_no_bytes() -> None:
    metric = BitsPerByte(2.5)
    metric.update(torch.tensor(8 * math.log(2)), torch.tensor([[0, -100, 1], [-100, -100, 1]]))
    assert metric.compute().item() == pytest.approx(8 / (3 * 2.5))


def test_a_function_is_averaged_over_targets() -> None:
    def share_of_zeros(targets: torch.Tensor) -> torch.Tensor:
        counted = targets[targets >= 0]
        return (counted == 0).float().mean()

    metric = MeanOf(share_of_zeros)
    assert set(names_of(metric)) == {"targets"}
    metric.update(targets=torch.tensor([[0, 0, 1, -100]]))
    metric.update(targets=torch.tensor([[1]]))
    assert metric.compute().item() == pytest.approx(2 / 4)


def test_a_batch_without_targets_changes_nothing() -> None:
    metric = MeanOf(lambda targets: (targets == 0).double())
    metric.update(targets=torch.tensor([[0, 1, -100]]))
    metric.update(targets=torch.full((1, 3), -100))
    assert metric.compute().item() == 1 / 2


class Two(MeanMetric):
    """A metric of losses that gives two numbers."""

    def update(self, losses: torch.Tensor) -> None:  # type: ignore[override]
        super().update(losses.mean())

    def compute(self) -> torch.Tensor:
        return torch.stack([super().compute()] * 2)


@pytest.mark.parametrize(
    ("name", "metric", "message"),
    [
        ("loss", as_metric(lambda losses: losses), "val/loss is the name of another result"),
        ("perplexity", as_metric(lambda losses: losses), "val/perplexity is the name of another result"),
        ("a/b", as_metric(lambda losses: losses), "val/a/b is the name of another result"),
        ("a", as_metric(lambda logit, targets: logit), "asks for logit; known: inputs, targets, logits"),
        ("a", MeanMetric(), "asks for value; known: "),
    ],
)
def test_what_could_not_be_measured_is_refused(name: str, metric: Metric, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        refuse_unknown(name, metric)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (MulticlassAccuracy(num_classes=9), "should be equal to number of classes"),
        (Perplexity(), "expected to have 3 dimensions"),
        (MulticlassAccuracy(num_classes=10, average="none"), "gives no single number"),
        (MeanOf(lambda losses: torch.zeros(7)), r"gives \[7\]: must be one number, or one a target"),
        (Two(), "Two gives no single number"),
    ],
    ids=["classes", "shape", "scalar", "function", "vector"],
)
def test_metrics_of_torchmetrics_are_tried_before_a_run(metric: Metric, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        try_out(metric, vocab_size=10)


def test_metrics_that_fit_are_accepted_and_forget_the_trial() -> None:
    fits = MulticlassAccuracy(num_classes=10, average="micro")
    refuse_unknown("accuracy", fits)
    try_out(fits, vocab_size=10)
    fits.update(torch.eye(10)[:4], torch.arange(4))
    assert fits.compute().item() == 1
    refuse_unknown("a", as_metric(lambda targets, k=3, **others: targets))


def test_a_function_gives_one_number_or_one_a_target() -> None:
    metric = MeanOf(lambda targets: torch.zeros(7))
    with pytest.raises(ValueError, match=r" gives \[7\]: .*one a target \[2, 3\]"):
        metric.update(targets=torch.zeros(2, 3, dtype=torch.long))


@pytest.mark.parametrize("term", [0.5, torch.zeros(3)])
def test_a_term_of_a_branch_is_a_scalar(term: Any) -> None:
    with pytest.raises(ValueError, match=r"^loss: the term balance of a branch is .*without dimensions"):
        with_terms((torch.zeros(2), {"balance": term}))
