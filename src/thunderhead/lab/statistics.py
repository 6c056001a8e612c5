"""Statistics on paired differences of runs: how large, and how sure.

Runs of equal seed start from the same weights and see the same tokens, so that differences within a seed vary less
than the losses do. Student's t is scipy's.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from scipy import stats

ALPHA = 0.05
"""Chance that any interval of a report misses the true difference, and of calling any of its equal arms different."""
SMALLEST_EFFECT = 0.005
"""Nats (or bits per byte, where they are compared) below which a difference does not matter."""
Verdict = Literal["better", "worse", "equal", "open"]
"""Of the first arm; `equal`: practically; `open`: not resolved."""


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """One arm against another: differences of their final losses, paired by seed.

    - differences: by seed.
    - interval: of the mean difference, by Student's t: all `n_comparisons` of a report contain the true differences at
      once with a probability of 1 - ALPHA at least (Bonferroni). None where there are fewer than two pairs, or all
      differences are equal.
    - p: of the paired t-test, times `n_comparisons`: below ALPHA where the interval does not contain 0.
    - smallest_effect: differences below it do not matter.
    - diverged: of seeds that diverged, in words: those that did not say nothing for an arm.
    """

    arm: str
    against: str
    differences: Mapping[int, float]
    interval: Interval | None
    p: float | None
    n_comparisons: int = 1
    smallest_effect: float = SMALLEST_EFFECT
    diverged: str = ""

    @property
    def n(self) -> int:
        return len(self.differences)

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.differences.values()))) if self.n else math.nan

    @property
    def verdict(self) -> Verdict:
        """What the interval says, and nothing else does, so that the two cannot disagree."""
        if self.interval is None or self.diverged:
            return "open"
        low, high = self.interval
        if -self.smallest_effect < low and high < self.smallest_effect:
            return "equal"
        return "worse" if low > 0 else "better" if high < 0 else "open"


def compare(
    losses: Mapping[str, Mapping[int, float]],
    pairs: Sequence[tuple[str, str]],
    smallest_effect: float = SMALLEST_EFFECT,
    diverged: Mapping[str, str] | None = None,
) -> list[Comparison]:
    """Compare arms by their final losses, by arm, then seed; the intervals of all `pairs` (arm, against) hold at once.

    `diverged` says, by arm, how many of its seeds have no loss because of that.
    """
    paired = [
        {seed: loss - losses[b][seed] for seed, loss in sorted(losses[a].items()) if seed in losses[b]}
        for a, b in pairs
    ]
    tested = sum(_varies(list(differences.values())) for differences in paired)
    found = []
    for pair, differences in zip(pairs, paired, strict=True):
        told = " and ".join(diverged[arm] for arm in pair if arm in diverged) if diverged else ""
        test = _t_test(list(differences.values()), tested)
        found.append(Comparison(*pair, differences, *test, tested, smallest_effect, told))
    return found


def _varies(values: Sequence[float]) -> bool:
    return len(values) >= 2 and np.ptp(values) > 0


def _t_test(values: Sequence[float], n_tests: int = 1) -> tuple[Interval | None, float | None]:
    """Interval and p-value of the mean, as one of several; None for fewer than two values, or all the same."""
    if not _varies(values):
        return None, None
    result = stats.ttest_1samp(values, 0.0)
    interval = Interval(*map(float, result.confidence_interval(1 - ALPHA / n_tests)))
    return interval, min(1.0, float(result.pvalue) * n_tests)


def mean_interval(values: Sequence[float]) -> Interval | None:
    """Student's interval of the mean of one arm's losses; None for fewer than two, or values that are all the same."""
    return _t_test(values)[0]


def percentiles(values: Sequence[float]) -> Interval:
    """The middle 95 % of resampled values."""
    return Interval(*map(float, np.percentile(values, [100 * ALPHA / 2, 100 - 100 * ALPHA / 2])))


# --- in words ---------------------------------------------------------------------------------------------------------


def sentence(found: Comparison, unit: str, conditions: str) -> str:
    """A comparison in plain words.

    `unit` is of the losses, `conditions` says what is equal in both arms, and what is not ("matched tokens").
    """
    name = f"{found.arm} − {found.against}"
    if found.diverged:
        return f"{name}: {found.diverged}, and what the other seeds say is not compared."
    if found.n == 0:
        return f"{name}: not compared, they have no seed in common."
    if found.n == 1:
        once = f"{name} = {signed(found.mean)} {unit} (1 seed, {conditions})"
        return f"{once}: one seed cannot resolve anything; train more seeds."
    if found.interval is None:
        if found.mean == 0:
            return f"{name} = 0 {unit} (all {found.n} seeds, {conditions}): identical, the setting changed nothing."
        shown = f"{name} = {signed(found.mean)} {unit} at each of {found.n} seeds, {conditions}"
        return f"{shown}: no spread to judge by, the seed changed nothing."
    width = found.interval.high - found.interval.low
    digits = min(6, max(3, 1 - math.floor(math.log10(width)))) if width > 0 else 4  # two of the interval's width
    low, high, mean = (signed(value, digits) for value in (*found.interval, found.mean))
    what = f"{name} = {mean} {unit} (95 % CI {low} … {high}, {found.n} seeds, {conditions})"
    said = {
        "equal": f"practically equal, less than {found.smallest_effect:g} {unit} apart",
        "open": f"not resolved at {found.n} seeds",
    }
    return f"{what}: {said.get(found.verdict, found.verdict)}."


def signed(value: float, digits: int = 4) -> str:
    """+0.012, −0.012, 0.000."""
    shown = f"{abs(value):.{digits}f}"
    sign = "" if float(shown) == 0 else "+" if value > 0 else "−"
    return sign + shown
