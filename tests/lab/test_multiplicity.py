"""Levels against published constants, and scipy's tests for equal variances; moderated variances by hand."""

from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from thunderhead.lab import multiplicity
from thunderhead.lab.multiplicity import ALPHA, MOST, correction, covariances, moderated

ALL_OF_4 = list(combinations(range(4), 2))
TO_FIRST = [(0, arm) for arm in range(1, 4)]


def test_one_comparison_looked_at_once_is_student_s() -> None:
    level, adjust = correction([(0, 1)], [3])
    assert level == ALPHA
    assert adjust(0.012345) == 0.012345


@pytest.mark.parametrize(("n_looks", "nominal"), [(2, 0.0294), (3, 0.0221), (4, 0.0182)])
def test_repeated_looks_at_many_seeds_have_pocock_s_constants(n_looks: int, nominal: float) -> None:
    """The nominal levels of Pocock (1977), table 1, for α = 0.05."""
    simulated = multiplicity._smallest_p(((0, 1),), tuple(40 * look for look in range(1, n_looks + 1)))
    assert simulated[int(ALPHA * len(simulated))] == pytest.approx(nominal, abs=0.0015)


@pytest.mark.parametrize("pairs", [ALL_OF_4, TO_FIRST])
@pytest.mark.parametrize("looks", [[2], [3], [3, 5]])
def test_levels_lie_between_one_comparison_s_and_bonferroni_s(pairs: list[tuple[int, int]], looks: list[int]) -> None:
    level, adjust = correction(pairs, looks)
    assert ALPHA / len(pairs) / len(looks) <= level <= ALPHA
    assert adjust(level * 0.999) < ALPHA <= adjust(level * 1.001)
    assert adjust(1e-9) == pytest.approx(1e-9 * len(pairs) * len(looks))
    assert adjust(1.0) == 1


def test_many_seeds_of_equal_variance_need_a_little_more_than_tukey_and_dunnett() -> None:
    """Both hold where the variances are equal, so what holds for all must be at least as wide; it is not much wider."""
    seeds = 16
    df, others = 3 * (seeds - 1), 5 / 6 / (seeds - 1)
    ours = stats.t.isf(correction(ALL_OF_4, [seeds])[0] / 2, seeds - 1) * np.sqrt(1 + others)
    tukey = stats.studentized_range.isf(ALPHA, 4, df) / np.sqrt(2)
    assert tukey < ours < 1.15 * tukey
    ours = stats.t.isf(correction(TO_FIRST, [seeds])[0] / 2, seeds - 1) * np.sqrt(1 + others)
    arms = np.random.default_rng(0).normal(size=(4, seeds))
    low, high = stats.dunnett(*arms[1:], control=arms[0], rng=np.random.default_rng(0)).confidence_interval()
    dunnett = float((high - low)[0]) / 2 / np.sqrt(2 / seeds * arms.var(1, ddof=1).mean())
    assert dunnett == pytest.approx(2.42, abs=0.02)  # his tables: 2.44 for 40 degrees of freedom, 2.41 for 60
    assert dunnett < ours < 1.15 * dunnett


def test_variances_move_towards_those_of_the_other_pairs() -> None:
    two, three = np.array([4.0]), np.array([1.0, 2.0, 6.0])
    assert moderated(two, two, 3) == 4
    assert moderated(three, three, 2) == pytest.approx([1 + 8 / 3, 2 + 7 / 3, 6 + 3 / 3])
    assert moderated(three[:1], three, 5) == pytest.approx([1 + 8 / 3 / 4])
    assert moderated(np.array([1.0]), np.array([1.0, 1000, 1000]), 2) == pytest.approx([1 + 2 * MOST / 3])
    assert moderated(np.stack([three, 2 * three]), np.stack([three, 2 * three]), 2)[1] == pytest.approx(
        2 * moderated(three, three, 2)
    )


@pytest.mark.parametrize("n_arms", [2, 3, 4, 7, 20])
def test_no_simulated_covariance_is_singular_or_too_large(n_arms: int) -> None:
    for factor in covariances(n_arms):
        assert factor.shape == (n_arms, n_arms)
        assert np.linalg.matrix_rank(factor / np.abs(factor).max(1, keepdims=True)) == n_arms
        assert np.abs(factor).max() < 1e16


def test_the_worst_covariance_that_a_search_found_keeps_the_promise() -> None:
    """Of benchmarks/trust.py, for all pairs of 4 arms with 3 seeds."""
    random = np.random.default_rng(0)
    losses = random.standard_normal((20_000, 4, 3)) * np.sqrt([[0.2], [5.2], [203], [0.8]])
    first, second = np.array(ALL_OF_4).T
    differences = losses[:, first] - losses[:, second]
    own = differences.var(2, ddof=1)
    width = stats.t.isf(correction(ALL_OF_4, [3])[0] / 2, 2) * np.sqrt(moderated(own, own, 3) / 3)
    assert 0.04 < (np.abs(differences.mean(2)) > width).any(1).mean() < ALPHA
