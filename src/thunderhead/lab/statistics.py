"""Statistics on paired differences of runs: how large, how sure, and what could have been seen.

Runs of equal seed start from the same weights and see the same tokens, so that differences within a seed vary less
than the losses do. All formulas are scipy's and statsmodels'.
"""

import bisect
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

import numpy as np
from scipy import stats
from scipy.optimize import brentq
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

ALPHA = 0.05
"""Chance of calling any of the equal arms of a report different (family-wise)."""
POWER = 0.8
MIN_BOOTSTRAP_SEEDS = 3
MOST_SEEDS = 10_000


class Interval(NamedTuple):
    """A confidence interval of 95 %."""

    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """One arm against another: differences of their final losses, paired by seed.

    - differences: by seed.
    - t: interval of the mean difference by Student's t; p: of the paired t-test. None where there are fewer than two
      pairs, or all differences are equal.
    - p_holm: corrected for the number of comparisons (Holm 1979).
    - alpha: the significance level that the first step of Holm's correction asks for.
    """

    arm: str
    against: str
    differences: Mapping[int, float]
    t: Interval | None
    p: float | None
    p_holm: float | None
    alpha: float

    @property
    def n(self) -> int:
        return len(self.differences)

    @property
    def mean(self) -> float:
        return float(np.mean(self._values)) if self.n else math.nan

    @property
    def resolved(self) -> bool:
        """Whether the arms differ, the number of comparisons considered."""
        return self.p_holm is not None and self.p_holm < ALPHA

    @cached_property
    def bootstrap(self) -> Interval | None:
        """Interval by BCa (Efron 1987), for comparison only: it is too narrow for a handful of seeds."""
        return bootstrap_interval(self._values)

    @cached_property
    def minimum_detectable(self) -> float | None:
        """The smallest true difference that so many seeds resolve at `alpha` with a probability of POWER."""
        return minimum_detectable(self._spread, self.n, self.alpha) if self.p is not None else None

    @cached_property
    def seeds_needed(self) -> int | None:
        """To resolve a true difference of the observed size as surely; None = more than MOST_SEEDS, or unknown."""
        return seeds_needed(self.mean, self._spread, self.alpha) if self.p is not None else None

    @property
    def _values(self) -> list[float]:
        return list(self.differences.values())

    @property
    def _spread(self) -> float:
        return float(np.std(self._values, ddof=1))


def compare(losses: Mapping[str, Mapping[int, float]], pairs: Sequence[tuple[str, str]]) -> list[Comparison]:
    """Compare arms by their final losses, by arm, then seed; Holm's correction covers all `pairs` (arm, against)."""
    paired = [
        {seed: loss - losses[b][seed] for seed, loss in sorted(losses[a].items()) if seed in losses[b]}
        for a, b in pairs
    ]
    tests = [_t_test(list(differences.values())) for differences in paired]
    tested = [index for index, (_, p) in enumerate(tests) if p is not None]
    corrected: dict[int, float] = {}
    if tested:
        p_values = multipletests([tests[index][1] for index in tested], alpha=ALPHA, method="holm")[1]
        corrected = dict(zip(tested, map(float, p_values), strict=True))
    alpha = ALPHA / max(1, len(tested))
    return [
        Comparison(arm, against, paired[index], *tests[index], p_holm=corrected.get(index), alpha=alpha)
        for index, (arm, against) in enumerate(pairs)
    ]


def _t_test(differences: Sequence[float]) -> tuple[Interval | None, float | None]:
    """Interval and p-value of the mean; None for fewer than two values, or values that are all the same."""
    if len(differences) < 2 or np.ptp(differences) == 0:
        return None, None
    result = stats.ttest_1samp(differences, 0.0)
    return Interval(*map(float, result.confidence_interval(1 - ALPHA))), float(result.pvalue)


def mean_interval(values: Sequence[float]) -> Interval | None:
    """Student's interval of the mean of one arm's losses; None for fewer than two, or values that are all the same."""
    return _t_test(values)[0]


def bootstrap_interval(values: Sequence[float]) -> Interval | None:
    """The bootstrap's BCa interval of the mean, the same each time; None below MIN_BOOTSTRAP_SEEDS."""
    if len(values) < MIN_BOOTSTRAP_SEEDS or np.ptp(values) == 0:
        return None
    with warnings.catch_warnings():  # scipy warns where an interval is degenerate, and returns nan
        warnings.simplefilter("ignore")
        found = stats.bootstrap((values,), np.mean, confidence_level=1 - ALPHA, method="BCa", rng=0)
    low, high = map(float, found.confidence_interval)
    return Interval(low, high) if math.isfinite(low) and math.isfinite(high) else None


def percentiles(values: Sequence[float]) -> Interval:
    """The middle 95 % of resampled values."""
    return Interval(*map(float, np.percentile(values, [100 * ALPHA / 2, 100 - 100 * ALPHA / 2])))


def minimum_detectable(spread: float, n: int, alpha: float = ALPHA) -> float | None:
    """The smallest true mean difference that n pairs of this spread resolve with a probability of POWER.

    By a two-sided paired t-test at the level `alpha`; None for fewer than two pairs.
    """
    return spread * _detectable_effect(n, alpha) if n >= 2 else None


@cache
def _detectable_effect(n: int, alpha: float) -> float:
    """In standard deviations. statsmodels' own solver stops on wrong values for a few pairs, its power is right."""
    highest = 1.0
    while _power(highest, n, alpha) < POWER:
        highest *= 2
    return float(brentq(lambda effect: _power(effect, n, alpha) - POWER, 0.0, highest))


def seeds_needed(mean: float, spread: float, alpha: float = ALPHA) -> int | None:
    """Pairs that resolve a true difference of `mean` with a probability of POWER; None = more than MOST_SEEDS."""
    effect = abs(mean) / spread if spread else 0.0
    counts = range(2, MOST_SEEDS + 1)
    index = bisect.bisect_left(counts, POWER, key=lambda n: _power(effect, n, alpha))
    return counts[index] if index < len(counts) else None


def _power(effect: float, n: int, alpha: float) -> float:
    """Chance that n pairs resolve an effect, in the right direction.

    The chance of the wrong direction, left out, is below 0.001 where this is POWER; scipy's non-central t returns nan
    for it at random, and for the right direction only where the power is 1.
    """
    power = float(TTestPower().power(effect, n, alpha / 2, alternative="larger"))
    return 1.0 if math.isnan(power) else power


# --- in words ---------------------------------------------------------------------------------------------------------


def sentence(found: Comparison, unit: str, matched: Sequence[str], n_comparisons: int = 1) -> str:
    """A comparison in plain words.

    `unit` is of the losses, `matched` what is equal in both arms (tokens, FLOPs, …), `n_comparisons` how many the
    report has, for a result that only the correction for their number takes away.
    """
    name = f"{found.arm} − {found.against}"
    listed = " and ".join([", ".join(matched[:-1]), matched[-1]] if len(matched) > 1 else matched)
    equal = f", matched {listed}" if matched else ", budgets not matched"
    if found.n == 0:
        return f"{name}: not compared, they have no seed in common."
    if found.n == 1:
        once = f"{name} = {signed(found.mean)} {unit} (1 seed{equal})"
        return f"{once}: one seed cannot resolve anything; train more seeds."
    if found.t is None or found.p is None:
        if found.mean == 0:
            return f"{name} = 0 {unit} (all {found.n} seeds{equal}): identical, the setting changed nothing."
        shown = f"{name} = {signed(found.mean)} {unit} at each of {found.n} seeds{equal}"
        return f"{shown}: no spread to judge by, the seed changed nothing."
    width = found.t.high - found.t.low
    digits = min(6, max(3, 1 - math.floor(math.log10(width)))) if width > 0 else 4  # two of the interval's width
    low, high, mean = (signed(value, digits) for value in (*found.t, found.mean))
    what = f"{name} = {mean} {unit} (95 % CI {low} … {high}, {found.n} seeds{equal})"
    if found.resolved:
        return f"{what}: {'worse' if found.mean > 0 else 'better'}."
    assert found.minimum_detectable is not None
    why = f"not resolved at {found.n} seeds"
    if found.p < ALPHA:
        why = f"not resolved once corrected for {n_comparisons} comparisons (p = {found.p_holm:.2g})"
    needed = f"about {found.seeds_needed:,}" if found.seeds_needed else f"more than {MOST_SEEDS:,}"
    smallest = f"the smallest difference that {found.n} seeds can show is {found.minimum_detectable:.{digits}f}"
    return f"{what}: {why}, {smallest}; one of this size takes {needed} seeds."


def signed(value: float, digits: int = 4) -> str:
    """+0.012, −0.012, 0.000."""
    shown = f"{abs(value):.{digits}f}"
    sign = "" if float(shown) == 0 else "+" if value > 0 else "−"
    return sign + shown
