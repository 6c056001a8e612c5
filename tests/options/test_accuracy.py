"""Shares of right answers."""

import math

import pytest
import torch

from thunderhead.options.metrics import top_k_accuracy
from thunderhead.options.task_data import is_most_probable


def test_the_k_most_probable_are_hits() -> None:
    logits = torch.tensor([[[1.0, 3.0, 2.0], [3.0, 1.0, 2.0], [0.0, 1.0, 2.0]]])
    targets = torch.tensor([[1, 2, -100]])
    assert [top_k_accuracy(logits, targets, k=k).item() for k in (1, 2, 9)] == [0.5, 1, 1]


@pytest.mark.parametrize("target", range(4))
def test_scores_that_are_nan_have_no_accuracy(target: int) -> None:
    """torch takes NaN for the highest, and of several the first or any."""
    logits, targets = torch.zeros(1, 2, 4), torch.tensor([[0, target]])
    logits[0, 0, 0], logits[0, 1] = 1, math.nan
    assert math.isnan(top_k_accuracy(logits, targets, k=2))
    assert is_most_probable(logits, targets).isnan().tolist() == [[False, True]]
    targets[0, 1] = -100
    assert top_k_accuracy(logits, targets, k=2).item() == 1
