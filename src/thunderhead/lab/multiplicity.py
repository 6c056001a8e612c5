"""How sure one of several comparisons has to be, so that all of a report hold at once, also when looked at repeatedly.

The losses of a seed are one draw from a normal distribution over the arms, whose covariance is not known: an arm may
vary ten times as much as the others, and two arms may go up and down together. With few seeds, Student's t errs where
the few differences happen to lie close together, and Bonferroni's correction pays for that in every pair. Adding some
of the other pairs' variances to a pair's own (Tusher et al. 2001, 10.1073/pnas.091062498; Smyth 2004,
10.2202/1544-6115.1027) takes these accidents away. By how much depends on the covariance, so the level is the largest
that keeps ALPHA under the least favourable of `covariances`, by simulation. It is never below Bonferroni's. For
repeated looks it is one level for all (Pocock 1977, 10.1093/biomet/64.2.191). docs/trust.md has the proof.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import combinations

import numpy as np
import numpy.typing as npt
from scipy import special

ALPHA = 0.05
"""Chance that any interval of a report misses the true difference, and of calling any of its equal arms different."""
PRIOR_DF = 1
"""Degrees of freedom that the other pairs count for, beside the n - 1 of a pair's own."""
MOST = 30
"""Times a pair's own variance that another's counts at most: a noisy arm does not decide for the quiet ones."""
DRAWS = 20_000
"""Simulated reports under each covariance, of up to 6 arms (of more, less): a chance of ALPHA is told to ± 0.0015."""
KEPT = 0.9
"""Share of ALPHA that the simulated covariances may use. A search among thousands of others found 0.002 more."""
Floats = npt.NDArray[np.float64]


def moderated(own: Floats, every: Floats, n: int) -> Floats:
    """Add to `own` variances of pairs of n seeds, (…, pairs), those of the others of `every` pair, (…, all pairs).

    That is their sum by the number of all pairs; two arms have no other pair.
    """
    others = np.minimum(every[..., None, :], MOST * own[..., None]).sum(-1) - own
    return np.asarray(own + PRIOR_DF / (n - 1) * others / every.shape[-1])


def covariances(n_arms: int, symmetric: bool = False) -> Iterator[Floats]:
    """Yield factors L of covariances L Lᵀ of arms that are unfavourable in one way or another, (arms, arms).

    Some arms of equal variance, the others 10, 10³ or 10⁶ times that, or each that much above the one before, where the
    first arm is the quietest, the noisiest or the second noisiest; arms against each other, by twos and in halves.
    `symmetric`: the order of the arms makes no difference, as where all pairs are compared.
    """
    yield np.eye(n_arms)
    if n_arms == 2:
        return  # one difference, whose variance does not matter
    index = np.arange(n_arms)
    for quiet in sorted({1, 2, n_arms // 2, n_arms - 2, n_arms - 1}):
        for steps in np.clip(index - quiet + 1, 0, 5), np.clip(index - quiet + 1, 0, 1):
            for ratio in (10.0, 1e3, 1e6):
                factor = np.diag(ratio ** (steps / 2))
                yield from (factor,) if symmetric else (factor, factor[::-1], np.roll(factor, 2, axis=0))
    opposed = np.zeros((n_arms, n_arms))
    opposed[index, index // 2] = np.where(index % 2, -1.0, 1.0)
    for together in (opposed * (index < 2), opposed, (index[:, None] < n_arms // 2) == (index < 1)):
        yield together + 0.01 * np.eye(n_arms)


def correction(pairs: Sequence[Sequence[int]], looks: Sequence[int]) -> tuple[float, Callable[[float], float]]:
    """Return the level of each interval, and what makes a p-value one of all `pairs` of arms (0, 1, …) and `looks`.

    `looks` are the numbers of seeds at which one looks. A p-value and a level are of Student's t with the moderated
    variance; they lie between those of a single comparison and Bonferroni's.
    """
    n_tests = max(1, len(pairs) * len(looks))
    simulated = _smallest_p(tuple(sorted((min(pair), max(pair)) for pair in pairs)), tuple(looks))

    def adjust(p: float) -> float:
        share = (np.searchsorted(simulated, p, side="right") + 1) / (len(simulated) + 1)
        return float(np.clip(share / KEPT, p, min(1.0, n_tests * p)))

    return float(np.clip(simulated[int(KEPT * ALPHA * len(simulated)) - 1], ALPHA / n_tests, ALPHA)), adjust


@lru_cache(maxsize=64)
def _smallest_p(pairs: tuple[tuple[int, int], ...], looks: tuple[int, ...]) -> Floats:
    """Simulate reports without any difference; return the smallest p-value of each, (draws,), sorted.

    Under each covariance; of these the least favourable at each rank.
    """
    n_arms = max((arm + 1 for pair in pairs for arm in pair), default=2)
    every = list(combinations(range(n_arms), 2))
    first, second = np.array(every).T
    tested = [every.index(pair) for pair in pairs] or [0]
    draws = DRAWS * 15 // max(15, len(every))
    found = []
    for factor in covariances(n_arms, symmetric=len(pairs) == len(every)):
        draw = np.random.default_rng(0)  # the same for all
        total, squares, smallest = np.zeros((draws, len(every))), np.zeros((draws, len(every))), np.ones(draws)
        for n in range(1, max(looks) + 1):
            losses = draw.standard_normal((draws, n_arms)) @ factor.T
            differences = losses[:, first] - losses[:, second]
            total += differences
            squares += differences**2
            if n in looks:
                variances = (squares - total**2 / n) / (n - 1)
                t = np.abs(total[:, tested]) / np.sqrt(n * moderated(variances[:, tested], variances, n))
                smallest = np.minimum(smallest, 2 * special.stdtr(n - 1, -t.max(1)))
        found.append(np.sort(smallest))
    return np.asarray(np.min(found, axis=0))
