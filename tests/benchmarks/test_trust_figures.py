"""What benchmarks/trust.py simulates is what reports say, and its rivals are those of scipy."""

import runpy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from thunderhead.core.config import CONF_DIR
from thunderhead.lab.statistics import compare

trust = SimpleNamespace(**runpy.run_path(str(CONF_DIR.parent / "benchmarks" / "trust.py")))


@pytest.fixture
def losses() -> np.ndarray:
    return np.random.default_rng(0).normal(0, [[1], [2], [3], [10]], (5, 4, 3))


@pytest.mark.parametrize("design", [trust.Design(4), trust.Design(4, to_first=True)])
@pytest.mark.parametrize("looks", [(), (3, 4)])
def test_its_intervals_are_those_of_reports(losses: np.ndarray, design: Any, looks: tuple[int, ...]) -> None:
    found = trust.data(losses, design)
    widths = trust.thunderhead(found, looks)
    pairs = [(str(a), str(b)) for a, b in (design.every[index] for index in design.tested)]
    for index in range(len(losses)):
        by_arm = {str(arm): dict(enumerate(map(float, row))) for arm, row in enumerate(losses[index])}
        intervals = [comparison.interval for comparison in compare(by_arm, pairs, looks=looks)]
        means, half = found.means[index], widths[index]
        assert np.array(intervals) == pytest.approx(np.stack([means - half, means + half], 1))


def test_its_rivals_are_scipy_s(losses: np.ndarray) -> None:
    found = trust.data(losses, trust.Design(4))
    paired = stats.ttest_rel(losses[0, 0], losses[0, 1]).confidence_interval(1 - 0.05 / 6)
    assert trust.student(found)[0, 0] == pytest.approx((paired.high - paired.low) / 2)
    centred = losses[0] - losses[0].mean(0)
    error = np.sqrt(((centred - centred.mean(1, keepdims=True)) ** 2).sum() / 6)  # of an additive model, 6 degrees
    tukey = stats.studentized_range.isf(0.05, 4, 6) * error / np.sqrt(3)
    assert trust.pooled(found)[0, 0] == pytest.approx(tukey)
    dunnett = trust._equal_variances(trust.Design(4, to_first=True), 6)
    assert dunnett == pytest.approx(3.10, abs=0.02)  # Dunnett (1964), table II: 3 treatments, 6 degrees of freedom
