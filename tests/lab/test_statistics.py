"""Intervals cover, tests keep their level, and the stated power is the real one: on simulated arms of known effects."""

import gc
import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.power import TTestPower

from thunderhead.lab import statistics
from thunderhead.lab.statistics import ALPHA, POWER, Interval, bootstrap_interval, compare, sentence


@pytest.fixture(autouse=True)
def _no_garbage_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """statsmodels' multipletests collects garbage each time: that is minutes in all these."""
    monkeypatch.setattr(gc, "collect", lambda *_: 0)


SPREAD = 0.01  # of the paired differences, in nats


def by_seed(values: object) -> dict[int, float]:
    return {seed: float(value) for seed, value in enumerate(np.asarray(values), 1)}


def arms(effects: list[float], n_seeds: int, draw: np.random.Generator) -> dict[str, dict[int, float]]:
    """Losses of a baseline and of arms that lie above it by the effects, with a spread that the seeds share."""
    shared = draw.normal(3.0, 0.2, n_seeds)
    own = draw.normal(0, SPREAD / math.sqrt(2), (len(effects), n_seeds))
    return {f"arm{index}": by_seed(shared + effect + own[index]) for index, effect in enumerate(effects)}


@pytest.mark.parametrize("n_seeds", [3, 10])
def test_the_interval_covers_the_true_difference(n_seeds: int) -> None:
    draw = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        (found,) = compare(arms([0.0, 0.03], n_seeds, draw), [("arm1", "arm0")])
        assert found.t is not None
        covered += found.t.low <= 0.03 <= found.t.high
    # 95 % of 400 has a standard error of 1.1 %; three of them
    assert covered / 400 == pytest.approx(0.95, abs=0.033)


def test_the_bootstrap_covers_with_many_seeds_and_not_with_three() -> None:
    draw = np.random.default_rng(0)

    def coverage(n_seeds: int) -> float:
        samples = draw.normal(0.03, SPREAD, (60, n_seeds))
        found = [bootstrap_interval(sample.tolist()) for sample in samples]
        return float(np.mean([interval is not None and interval.low <= 0.03 <= interval.high for interval in found]))

    assert coverage(40) == pytest.approx(0.95, abs=0.085)  # three standard errors
    assert coverage(3) < 0.85  # why verdicts rest on Student's t


def test_pairing_removes_what_the_seeds_share() -> None:
    losses = arms([0.0, 0.03], 5, np.random.default_rng(0))
    (found,) = compare(losses, [("arm1", "arm0")])
    unpaired = stats.ttest_ind(list(losses["arm1"].values()), list(losses["arm0"].values()))
    assert found.resolved
    assert unpaired.pvalue > 0.5


def test_equal_arms_are_rarely_called_different() -> None:
    """Family-wise: any of six comparisons of four equal arms, at most ALPHA."""
    draw = np.random.default_rng(0)
    pairs = [(f"arm{i}", f"arm{j}") for i in range(4) for j in range(i)]
    wrong = uncorrected = 0
    for _ in range(400):
        found = compare(arms([0.0] * 4, 4, draw), pairs)
        wrong += any(comparison.resolved for comparison in found)
        uncorrected += any(comparison.p is not None and comparison.p < ALPHA for comparison in found)
    assert wrong / 400 <= ALPHA + 0.033  # three standard errors
    assert uncorrected / 400 > 2 * ALPHA  # so the correction was needed


@pytest.mark.parametrize(("n_seeds", "n_comparisons"), [(3, 1), (3, 3), (5, 2), (10, 6)])
def test_the_smallest_difference_is_resolved_as_often_as_stated(n_seeds: int, n_comparisons: int) -> None:
    alpha = ALPHA / n_comparisons
    effect = statistics.minimum_detectable(SPREAD, n_seeds, alpha)
    assert effect is not None
    samples = np.random.default_rng(0).normal(effect, SPREAD, (20_000, n_seeds))
    power = float(np.mean(stats.ttest_1samp(samples, 0.0, axis=1).pvalue < alpha))
    assert power == pytest.approx(POWER, abs=0.01)  # a standard error is 0.003


def test_power_of_a_whole_comparison_at_the_stated_difference() -> None:
    """Four arms, of which one differs by what was stated for three comparisons: Holm's first step has that power."""
    draw = np.random.default_rng(0)
    effect = statistics.minimum_detectable(SPREAD, 4, ALPHA / 3)
    assert effect is not None
    pairs = [(f"arm{i}", "arm0") for i in (1, 2, 3)]
    resolved = [compare(arms([0.0, effect, 0.0, 0.0], 4, draw), pairs)[0].resolved for _ in range(400)]
    assert np.mean(resolved) == pytest.approx(POWER, abs=0.06)  # three standard errors, and Holm's later steps help


def test_seeds_needed_are_enough_and_one_less_is_not() -> None:
    for mean in (0.003, 0.01, 0.04, 0.5):
        for alpha in (ALPHA, ALPHA / 3):
            needed = statistics.seeds_needed(mean, SPREAD, alpha)
            assert needed is not None
            power = TTestPower().power(mean / SPREAD, needed, alpha)
            assert math.isnan(power) or power >= POWER - 1e-9  # nan: scipy, far above
            if needed > 2:
                assert TTestPower().power(mean / SPREAD, needed - 1, alpha) < POWER
    assert statistics.seeds_needed(1e-6, SPREAD) is None
    assert statistics.seeds_needed(0.0, SPREAD) is None


def test_the_smallest_difference_agrees_with_statsmodels_where_its_solver_works() -> None:
    for n_seeds in (5, 20, 100):
        effect = TTestPower().solve_power(nobs=n_seeds, alpha=ALPHA, power=POWER)
        assert statistics.minimum_detectable(1.0, n_seeds) == pytest.approx(effect, rel=1e-4)


def test_the_numbers_are_those_of_the_paired_test() -> None:
    losses = arms([0.0, 0.01, 0.02], 5, np.random.default_rng(3))
    a, b, c = (list(losses[f"arm{i}"].values()) for i in range(3))
    first, second = compare(losses, [("arm1", "arm0"), ("arm2", "arm0")])
    result = stats.ttest_rel(b, a)
    assert first.p == pytest.approx(result.pvalue)
    assert first.t == pytest.approx(tuple(result.confidence_interval(0.95)))
    p_values = sorted((result.pvalue, stats.ttest_rel(c, a).pvalue))
    assert sorted((first.p_holm, second.p_holm)) == pytest.approx(
        [min(1, 2 * p_values[0]), max(2 * p_values[0], p_values[1])]
    )


def test_only_equal_seeds_are_pairs() -> None:
    (found,) = compare({"a": {1: 3.0, 2: 3.2, 4: 9.0}, "b": {1: 2.9, 2: 3.0, 3: 0.0}}, [("a", "b")])
    assert found.differences == pytest.approx({1: 0.1, 2: 0.2})


def test_a_bootstrap_is_the_same_each_time() -> None:
    values = [0.01, 0.02, 0.015, 0.03]
    assert isinstance(bootstrap_interval(values), Interval)
    assert bootstrap_interval(values) == bootstrap_interval(values)


# --- sentences -------------------------------------------------------------------------------------------------------


def words(a: list[float], b: list[float], matched: tuple[str, ...] = ("tokens",)) -> str:
    (found,) = compare({"gqa": by_seed(a), "mha": by_seed(b)}, [("gqa", "mha")])
    return sentence(found, "nats", matched)


def test_a_resolved_difference() -> None:
    worse = words([3.011, 3.112, 3.213], [3.0, 3.1, 3.2])
    assert worse == "gqa − mha = +0.0120 nats (95 % CI +0.0095 … +0.0145, 3 seeds, matched tokens): worse."
    assert words([3.0, 3.1, 3.2], [3.011, 3.112, 3.213]).endswith("): better.")


def test_an_unresolved_difference_says_what_could_have_been_seen() -> None:
    found = words([3.001, 3.099, 3.204], [3.0, 3.1, 3.2])
    assert found.startswith(
        "gqa − mha = +0.001 nats (95 % CI −0.005 … +0.008, 3 seeds, matched tokens): not resolved at 3"
    )
    smallest = statistics.minimum_detectable(float(np.std([0.001, -0.001, 0.004], ddof=1)), 3)
    assert (
        f"the smallest difference that 3 seeds can show is {smallest:.3f}; one of this size takes about 30 seeds."
        in found
    )


def test_one_seed_resolves_nothing() -> None:
    found = words([3.5], [3.0])
    assert (
        found
        == "gqa − mha = +0.5000 nats (1 seed, matched tokens): one seed cannot resolve anything; train more seeds."
    )


def test_no_seed_in_common() -> None:
    (found,) = compare({"a": {1: 3.0}, "b": {2: 3.0}}, [("a", "b")])
    assert sentence(found, "nats", ["tokens"]) == "a − b: not compared, they have no seed in common."


def test_no_spread_is_no_certainty() -> None:
    assert "identical, the setting changed nothing" in words([3.0, 3.1], [3.0, 3.1])
    (found,) = compare({"a": by_seed([3.5, 3.5]), "b": by_seed([3.0, 3.0])}, [("a", "b")])
    assert not found.resolved
    assert "no spread to judge by" in sentence(found, "nats", [])


def test_a_result_that_the_correction_takes_away_says_so() -> None:
    losses = arms([0.0, 0.012, 0.0, 0.0], 3, np.random.default_rng(5))
    losses["arm1"] = by_seed(np.array([*losses["arm0"].values()]) + np.array([0.010, 0.013, 0.008]))
    found = compare(losses, [("arm1", "arm0"), ("arm2", "arm0"), ("arm3", "arm0")])[0]
    assert found.p is not None
    assert found.p < ALPHA < (found.p_holm or 0)
    assert "not resolved once corrected for 3 comparisons (p = 0.058)" in sentence(found, "nats", [], 3)
    assert "budgets not matched" in sentence(found, "nats", [], 3)


def test_signed_numbers() -> None:
    assert [statistics.signed(x, 3) for x in (0.0123, -0.0123, 0.0001, -0.0001)] == [
        "+0.012",
        "−0.012",
        "0.000",
        "0.000",
    ]
