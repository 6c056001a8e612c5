"""Whether the effect of a choice persists across sizes: compute multipliers, their trend, a verdict, a projection.

An arm's compute multiplier is how much more compute the baseline needs for the arm's loss, by the baseline's own law
L(C) = E + k / C^γ, moved so that it goes through what the baseline measured at this size. So seeds stay paired, and
what the law misses at a size is not taken for an effect.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from thunderhead.lab.law_forms import EXPONENTS, fit_powers
from thunderhead.lab.runs import Array
from thunderhead.lab.statistics import Interval

LEVEL = 0.90
"""Of all intervals of a ladder."""
DRAWS = 500
LIMIT = np.log(1e3)
"""Multipliers are at most that far from 1: where an arm's loss lies below all that the baseline's law can reach."""
Verdict = Literal["persists", "shrinks", "grows", "flips", "unknown"]


class Rung(NamedTuple):
    """An arm at one size: its parameters N, the training FLOPs of a run, and the final losses by seed."""

    size: str
    parameters: float
    flops: float
    losses: Mapping[int, float]

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.losses.values())))


class Estimate(NamedTuple):
    """A value and the interval that holds the true one in LEVEL of ladders."""

    value: float
    interval: Interval

    @property
    def side(self) -> int:
        """Of 1: 1 if the interval lies above, -1 if below, 0 if it contains 1."""
        return int(self.interval.low > 1) - int(self.interval.high < 1)


class Effect(NamedTuple):
    """An arm against the baseline at a size.

    - compute: the arm's training FLOPs, relative to the baseline's. difference: of the losses, in nats, paired by seed.
    - multiplier: of compute; above 1 the arm is better. fitted: the same by the trend through all sizes.
    """

    arm: Rung
    baseline: Rung
    n_seeds: int
    difference: Estimate
    multiplier: Estimate
    fitted: Estimate

    @property
    def compute(self) -> float:
        return self.arm.flops / self.baseline.flops


@dataclass(frozen=True)
class Persistence:
    """What becomes of an arm's effect from size to size.

    - effects: by size, the smallest first. trend: by what ten times the compute multiplies the multiplier.
    - weights: of the sizes in it.
    - log_multipliers, baseline_losses, losses: at the sizes, (1 + draws, sizes): first the estimates, then what else
      the seeds allow.
    """

    arm: str
    effects: list[Effect]
    trend: Estimate
    weights: Array = field(repr=False)
    log_multipliers: Array = field(repr=False)
    baseline_losses: Array = field(repr=False)
    losses: Array = field(repr=False)

    @property
    def verdict(self) -> Verdict:
        """Follows from three intervals: the trend's, and of the fitted multiplier those at both ends."""
        first, last, trend = self.effects[0].fitted.side, self.effects[-1].fitted.side, self.trend.side
        if trend == 0:
            return "persists" if first == last != 0 else "unknown"
        if first == -trend:
            return "flips" if last == trend else "shrinks"
        return "grows" if last == trend else "unknown"

    def line(self, flops: float) -> Estimate:
        """The multiplier by the trend."""
        return _estimate(np.exp(_line(self._flops, self.log_multipliers, self.weights, flops)))

    def project(self, flops: float) -> Estimate:
        """The multiplier at another compute of the arm; the interval is of all forms' draws together.

        By the trend, which is a line in log C; by one multiplier for all sizes; and by a law of each arm.
        """
        E, k, gamma = _laws(self._baseline_flops, self.baseline_losses)
        own_E, own_k, own_gamma = _laws(self._flops, self.losses)
        share = (own_E + own_k * flops**-own_gamma - E) / (k * flops**-gamma)
        forms = [
            _line(self._flops, self.log_multipliers, self.weights, flops),
            self.log_multipliers @ self.weights / self.weights.sum(),
            _limited(-np.log(np.maximum(share, 1e-300)) / gamma),
        ]
        return _of_forms([np.exp(form) for form in forms])

    def predict_loss(self, flops: float, *, of_baseline: bool = False) -> Estimate:
        """The loss at another compute, by E + k / C^γ; the interval is of the draws of three forms together.

        By that, by k / C^γ, and by k / C^γ through the two largest sizes: losses of short runs fall ever faster.
        """
        at, losses = (self._baseline_flops, self.baseline_losses) if of_baseline else (self._flops, self.losses)
        E, k, gamma = _laws(at, losses)
        logs = np.log(np.maximum(losses, 1e-9))  # Student's t of two seeds knows no bound
        power, local = (np.exp(_line(at[-n:], logs[:, -n:], np.ones(n), flops)) for n in (len(at), 2))
        law = E + k * flops**-gamma
        return _of_forms([np.where(np.isnan(law), power, law), power, local])  # a draw whose losses rise has no law

    @property
    def _flops(self) -> Array:
        return np.array([effect.arm.flops for effect in self.effects])

    @property
    def _baseline_flops(self) -> Array:
        return np.array([effect.baseline.flops for effect in self.effects])


def climb(baseline: Sequence[Rung], name: str, arm: Sequence[Rung], seed: int = 0) -> Persistence:
    """Compare an arm with the baseline at all sizes that both have.

    Intervals are of draws from what the seeds allow: Student's t around the mean difference, and around the baseline's
    mean loss, through which its law is fitted anew.

    Raises ValueError with what is missing: three sizes, two seeds at each, and a baseline whose loss falls.
    """
    by_size = {rung.size: rung for rung in arm}
    pairs = [(by_size[base.size], base) for base in baseline if base.size in by_size]
    pairs.sort(key=lambda pair: pair[1].flops)
    paired = [[own.losses[seed] - base.losses[seed] for seed in own.losses.keys() & base.losses] for own, base in pairs]
    if len(pairs) < 3 or min(map(len, paired)) < 2:
        shown = ", ".join(f"{base.size}: {len(values)}" for (_, base), values in zip(pairs, paired, strict=True))
        told = f"seeds in common are {shown}" if pairs else "they have no size in common"
        raise ValueError(f"{name}: a ladder needs 3 sizes, and 2 seeds in common with the baseline at each; {told}")
    draw = np.random.default_rng(seed)
    flops, base_flops = (np.array([pair[index].flops for pair in pairs]) for index in (0, 1))
    measured = [list(base.losses.values()) for _, base in pairs]
    base_losses = _means(measured, _scatter(measured, base_flops), draw)
    scatter = _scatter(paired, base_flops)
    difference = _means(paired, scatter, draw)
    _, k, gamma = _laws(base_flops, base_losses)[..., np.newaxis]
    if np.isnan(gamma[0]):
        raise ValueError(f"{name}: the baseline's loss does not fall with more compute: there is no law to compare by")
    share = 1 + difference / (k * base_flops**-gamma)
    multiplier = _limited(np.log(base_flops / flops) - np.log(np.maximum(share, 1e-300)) / gamma)
    weights = (gamma[0] * k[0] * base_flops ** -gamma[0]) ** 2 / scatter  # one over the variance of log multipliers
    effects = [
        Effect(
            *pairs[index],
            len(paired[index]),
            _estimate(difference[:, index]),
            _estimate(np.exp(multiplier[:, index])),
            _estimate(np.exp(_line(flops, multiplier, weights, flops[index]))),
        )
        for index in range(len(pairs))
    ]
    per_decade = _line(flops, multiplier, weights, 10.0) - _line(flops, multiplier, weights, 1.0)
    return Persistence(
        name, effects, _estimate(np.exp(per_decade)), weights, multiplier, base_losses, base_losses + difference
    )


def _laws(flops: Array, losses: Array) -> Array:
    """E, k and γ of each draw, (3, draws); fewer exponents are tried than for one law."""
    return fit_powers(flops, losses, EXPONENTS[::4])


def _scatter(by_size: Sequence[Sequence[float]], flops: Array) -> Array:
    """The variance from seed to seed as a power law of compute, (sizes,), up to a factor.

    Small budgets scatter more than large ones, and two or three seeds do not tell each size's variance.
    """
    x = np.log(flops) - np.log(flops).mean()
    variances = np.array([np.var(values, ddof=1) for values in by_size])
    return np.asarray(np.exp(np.log(np.maximum(variances, 1e-16)) @ x / (x @ x) * x))


def _means(by_size: Sequence[Sequence[float]], scatter: Array, draw: np.random.Generator) -> Array:
    """Means over seeds, (1 + DRAWS, sizes): the measured ones, then draws of the true ones, by Student's t.

    The variance is `scatter` times a factor that all sizes tell; the power law takes a degree of freedom.
    """
    n = np.array([len(values) for values in by_size])
    squares = np.array([np.var(values) * len(values) for values in by_size])
    df = n.sum() - len(n) - 1
    spread = np.sqrt((squares / scatter).sum() / draw.chisquare(df, (DRAWS, 1)) * scatter / n)
    means = np.array([np.mean(values) for values in by_size])
    return np.vstack([means, means + spread * draw.standard_normal(spread.shape)])


def _line(flops: Array, values: Array, weights: Array, at: float) -> Array:
    """Values at another compute, (draws,), by straight lines in log C through those at the sizes, (draws, sizes)."""
    share, x = weights / weights.sum(), np.log(flops)
    x = x - share @ x
    slope = values @ (share * x) / (share @ x**2)
    return np.asarray(values @ share + slope * (np.log(at) - share @ np.log(flops)))


def _limited(log_multiplier: Array) -> Array:
    """Within LIMIT; where there was no law, it says nothing."""
    return np.clip(np.nan_to_num(log_multiplier), -LIMIT, LIMIT)


def _estimate(values: Array) -> Estimate:
    low, high = np.percentile(values[1:], [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return Estimate(float(values[0]), Interval(float(low), float(high)))


def _of_forms(forms: Sequence[Array]) -> Estimate:
    """The first form's value; the interval is of all forms' draws together, as if each were as likely."""
    return _estimate(np.concatenate([forms[0][:1], *(form[1:] for form in forms)]))


class Ladder(NamedTuple):
    """All arms but the baseline, what of them was held out, and where they are projected to.

    - tested: by arm, the same with the held-out size. projections: by arm.
    """

    baseline: str
    arms: list[Persistence]
    tested: dict[str, Persistence]
    parameters: float
    projections: dict[str, tuple[float, Estimate]]  # training FLOPs, and the multiplier
