"""Statistics on paired differences of runs: how large, and how sure.

Runs of equal seed start from the same weights and see the same tokens, so that differences within a seed vary less
than the losses do.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from thunderhead.lab import multiplicity
from thunderhead.lab.multiplicity import ALPHA

SMALLEST_EFFECT = 0.005
"""Nats (or bits per byte, where they are compared) below which a difference does not matter."""
LEAST_CHANCE = 0.2
"""Of a verdict by the last look; no more seeds for what has less."""
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
    - interval: of the mean difference: all of a report contain the true differences at once with a probability of
      1 - ALPHA at least. None where there are fewer than two pairs, or all differences are equal.
    - p: as if all arms were equal, the chance of a difference as clear in any comparison: below ALPHA where the
      interval does not contain 0.
    - smallest_effect: differences below it do not matter.
    - diverged: of seeds that diverged, in words: those that did not say nothing for an arm.
    - chance: of a verdict at the last look that was planned, as far as these differences tell; None if that is this.
    """

    arm: str
    against: str
    differences: Mapping[int, float]
    interval: Interval | None
    p: float | None
    smallest_effect: float = SMALLEST_EFFECT
    diverged: str = ""
    chance: float | None = None

    @property
    def n(self) -> int:
        return len(self.differences)

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.differences.values()))) if self.n else math.nan

    @property
    def is_unclear(self) -> bool:
        """Whether more seeds could tell more."""
        return self.verdict == "open" and self.interval is not None and not self.diverged

    @property
    def is_given_up(self) -> bool:
        """Whether it is unclear, and likely to stay so."""
        return self.is_unclear and self.chance is not None and self.chance < LEAST_CHANCE

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
    looks: Sequence[int] = (),
) -> list[Comparison]:
    """Compare arms by their final losses, by arm, then seed; the intervals of all `pairs` (arm, against) hold at once.

    They are Student's, of variances and at a level that `thunderhead.lab.multiplicity` explains; of two arms the usual
    ones. `diverged` says, by arm, how many of its seeds have no loss because of that. Who looks after each added seed
    gives all numbers of seeds at which to look in `looks`, planned before the first: range(3, 9). Then the intervals of
    all looks hold at once, whenever one stops. ValueError for a look at fewer than 2 seeds, or more seeds than planned.
    """
    paired = {pair: _paired(losses, *pair) for pair in pairs}
    tested = [pair for pair in pairs if _varies(list(paired[pair].values()))]
    n_seeds = max([2, *map(len, paired.values())])
    if min(looks, default=2) < 2:
        raise ValueError("a look needs 2 seeds at least")
    if n_seeds > max(looks, default=n_seeds):
        raise ValueError(f"there are {n_seeds} seeds, but no look was planned at more than {max(looks)}")
    names = [name for name, _ in Counter(chain.from_iterable(tested)).most_common()]  # the baseline first
    every = [list(_paired(losses, *pair).values()) for pair in combinations(names, 2)]
    variances = np.array([np.var(values, ddof=1) for values in every if _varies(values)])
    level, adjust = multiplicity.correction([tuple(map(names.index, pair)) for pair in tested], looks or (n_seeds,))
    found = []
    for pair, differences in paired.items():
        told = " and ".join(diverged[arm] for arm in pair if arm in diverged) if diverged else ""
        interval = p = chance = None
        if pair in tested:
            n, mean = len(differences), float(np.mean(list(differences.values())))
            own = np.var([list(differences.values())], axis=1, ddof=1)
            error = math.sqrt(multiplicity.moderated(own, variances, n).item() / n)
            width = error * float(special.stdtrit(n - 1, 1 - level / 2))
            interval = Interval(mean - width, mean + width)
            p = adjust(float(2 * special.stdtr(n - 1, -abs(mean) / error)))
            if n < (last := max(looks, default=n)):
                deviation = error * math.sqrt(n)
                width = deviation / math.sqrt(last) * float(special.stdtrit(last - 1, 1 - level / 2))
                spread = deviation * math.sqrt(1 / n - 1 / last)
                chance = _chance(abs(mean), spread, n - 1, width, smallest_effect)
        found.append(Comparison(*pair, differences, interval, p, smallest_effect, told, chance))
    return found


def unresolved(found: Sequence[Comparison]) -> set[str]:
    """Arms of which more seeds could tell more, and likely would."""
    return {name for c in found if c.is_unclear and not c.is_given_up for name in (c.arm, c.against)}


def _chance(mean: float, spread: float, freedom: int, width: float, smallest_effect: float) -> float:
    """Of a verdict by an interval of that half width, around a mean that is yet to move, as Student's t by `spread`."""

    def below(edge: float) -> float:
        return float(special.stdtr(freedom, (edge - mean) / spread))

    room = max(0.0, smallest_effect - width)  # for a mean of arms that are practically equal
    return 1 - below(max(width, room)) + below(-max(width, room)) + below(room) - below(-room)


def _paired(losses: Mapping[str, Mapping[int, float]], arm: str, against: str) -> dict[int, float]:
    """Differences of the seeds that both arms have."""
    return {seed: loss - losses[against][seed] for seed, loss in sorted(losses[arm].items()) if seed in losses[against]}


def _varies(values: Sequence[float]) -> bool:
    """By more than differences of losses in float64 are rounded."""
    return len(values) >= 2 and np.ptp(values) > 1e-12


def mean_interval(values: Sequence[float]) -> Interval | None:
    """Student's interval of the mean of one arm's losses; None for fewer than two, or values that are all the same."""
    if not _varies(values):
        return None
    return Interval(*map(float, stats.ttest_1samp(values, 0.0).confidence_interval(1 - ALPHA)))


def crossed_interval(differences_SE: NDArray[np.float64], level: float = ALPHA) -> Interval | None:
    """Interval of a mean of differences over S seeds × E examples, both drawn from many: two crossed random factors.

    The error's square is what differs between the seeds' means, t of S - 1 degrees of freedom, and what the examples'
    means differ by beyond the noise of a single answer, of E - 1; the quantile of their sum is Cochran's (1964,
    Biometrics 20), the mean of both t weighted by the parts. It is never less than that noise lets one know: few seeds
    may agree by chance. One seed: over examples alone. None without spread.
    """
    n_seeds, n_examples = differences_SE.shape
    mean = differences_SE.mean()
    by_seed_S, by_example_E = differences_SE.mean(axis=1) - mean, differences_SE.mean(axis=0) - mean
    noise_SE = differences_SE - mean - by_seed_S[:, None] - by_example_E
    noise = np.sum(noise_SE**2) / max(1, (n_seeds - 1) * (n_examples - 1)) / n_seeds / n_examples
    of_seeds = np.sum(by_seed_S**2) / max(1, n_seeds - 1) / n_seeds
    of_examples = max(0.0, np.sum(by_example_E**2) / max(1, n_examples - 1) / n_examples - noise)
    if n_examples < 2 or not (variance := max(of_seeds + of_examples, noise)) > 1e-12:
        return None
    t = [float(special.stdtrit(max(1, n - 1), 1 - level / 2)) for n in (n_seeds, n_examples)]
    half = max((of_seeds * t[0] + of_examples * t[1]) / math.sqrt(variance), t[1] * math.sqrt(noise))
    return Interval(float(mean - half), float(mean + half))


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
        "open": f"not resolved at {found.n} seeds" + ", and hardly to be by the last look" * found.is_given_up,
    }
    return f"{what}: {said.get(found.verdict, found.verdict)}."


def signed(value: float, digits: int = 4) -> str:
    """+0.012, −0.012, 0.000."""
    shown = f"{abs(value):.{digits}f}"
    sign = "" if float(shown) == 0 else "+" if value > 0 else "−"
    return sign + shown
