"""Fit scaling laws to finished runs: what loss N parameters reach with D tokens, and how to split a compute budget.

By two of the three approaches of Hoffmann et al. (2203.15556): a parabola in log N at each budget, which needs no form
of the law (approach 2, section 3.2), and L(N, D) = E + A / N^α + B / D^β of all runs (approach 3, section 3.3).
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.special import huber

from thunderhead.core.types import Count
from thunderhead.lab.runs import Array
from thunderhead.lab.statistics import Interval, percentiles
from thunderhead.scaling_law import Law

SAME_BUDGET = 1.05
"""Runs whose training FLOPs differ by a smaller factor are of one budget: runs are whole steps."""
PARAMETERS = ("E", "A", "B", "alpha", "beta")
"""Of the law."""
STARTS = tuple(
    itertools.product(
        np.arange(0, 30, 5.0),  # a = log A
        np.arange(0, 30, 5.0),  # b = log B
        np.arange(-1, 1.5, 0.5),  # e = log E
        np.arange(0, 2.5, 0.5),  # alpha
        np.arange(0, 2.5, 0.5),  # beta
    )
)
"""Where Hoffmann et al. start L-BFGS (section D.2)."""
DELTA = 1e-3
"""Where the Huber loss of log L goes from squares to absolute values."""
POLISHED = 40
"""Of the starts, those with the lowest objective are followed."""


class Point(NamedTuple):
    """A finished run, for the fit."""

    name: str
    parameters: float  # N, as counted
    tokens: float  # D
    flops: float  # C, of training
    loss: float  # nats a token, on the validation data


class Prediction(NamedTuple):
    """A run that the fit did not see, and what the fit says.

    `interval` is of the measured loss, if the law's form is right: of the fit, and the scatter of single runs.
    """

    point: Point
    loss: float
    interval: Interval

    @property
    def error(self) -> float:
        """How far the measured loss lies above the predicted one, relative to it."""
        return self.point.loss / self.loss - 1


@dataclass(frozen=True)
class Parabola:
    """The runs of one budget, and loss = height + curvature · (log N − log optimum)²."""

    flops: float
    points: list[Point]
    parameters: float = np.nan  # at the minimum; nan where the parabola has none
    tokens: float = np.nan
    loss: float = np.nan
    coefficients: tuple[float, ...] = ()  # of log N, the highest power first
    problem: str = ""  # why the minimum does not count; nothing if it does


class Power(NamedTuple):
    """A power law y = coefficient · C^exponent."""

    coefficient: float
    exponent: float


class IsoFlop(NamedTuple):
    """Approach 2: a parabola for each budget; optimal N ("a") and D ("b") by budget if two or more have a minimum."""

    parabolas: list[Parabola]
    powers: dict[str, Power]


@dataclass(frozen=True)
class Fit:
    """Both approaches, with 95 % intervals of a bootstrap.

    - intervals: of PARAMETERS, a and b (the exponents of the optimum).
    - isoflop_intervals: of a and b of approach 2, if it has any.
    - laws: the resampled laws, for intervals of whatever is asked of them.
    """

    law: Law
    points: list[Point]
    held_out: list[Point]
    isoflop: IsoFlop
    intervals: dict[str, Interval]
    isoflop_intervals: dict[str, Interval]
    warnings: list[str]
    laws: list[Law] = field(repr=False)
    residuals: Array = field(repr=False)

    def interval(self, quantity: Callable[[Law], float]) -> Interval:
        """Of anything that a law predicts; it tells how sure the fit is, not how wrong its form."""
        return percentiles([quantity(law) for law in self.laws])

    @cached_property
    def predictions(self) -> list[Prediction]:
        """Of what was held out."""
        return [self.predict(point) for point in self.held_out]

    def predict(self, point: Point) -> Prediction:
        """The loss of another run, as if it had not been measured."""
        losses = [law.loss(point.parameters, point.tokens) for law in self.laws]
        scattered = np.array(losses) * np.exp(np.random.default_rng(0).choice(self.residuals, len(losses)))
        return Prediction(point, self.law.loss(point.parameters, point.tokens), percentiles(scattered))


def fit(
    points: Sequence[Point], *, count: Count, held_out: Sequence[Point] = (), n_resamples: int = 200, seed: int = 0
) -> Fit:
    """Fit a law to finished runs of one kind of model on one data set; those that are held out are only predicted.

    Intervals come from resampled residuals (Efron & Tibshirani 1993, section 9.4), since the sizes and budgets of an
    IsoFLOP grid are chosen, not drawn; residuals are widened for the parameters that were fitted.

    Raises ValueError if the runs cannot tell a law, with what is missing.
    """
    _refuse_degenerate(points)
    points = sorted(points, key=lambda p: (p.flops, p.parameters))
    parameters, tokens, flops, loss = np.array([p[1:] for p in points]).T
    exponent, intercept = np.polyfit(np.log(parameters), np.log(flops / tokens), 1)

    def law_of(theta: Array) -> Law:
        A, B, E = map(float, np.exp(theta[:3]))
        alpha, beta, k, p = map(float, (theta[3], theta[4], np.exp(intercept), exponent))
        ranges = [(float(values.min()), float(values.max())) for values in (parameters, tokens, flops)]
        return Law(count, E, A, B, alpha, beta, k, p, *ranges)

    theta = fit_parametric(parameters, tokens, loss)
    for value, symbol, name in ((theta[3], "alpha", "parameters"), (theta[4], "beta", "tokens")):
        if value <= 0:
            raise ValueError(
                f"no scaling law: {symbol} comes out as {value:.3g}, as if the loss did not fall with more {name}. "
                "The budgets or sizes are too close to each other for the noise, or the learning rates do not fit"
            )
    law, isoflop = law_of(theta), fit_isoflop(points)

    draw = np.random.default_rng(seed)
    widened = np.sqrt(len(points) / max(1, len(points) - len(PARAMETERS)))
    expected = law.loss(parameters, tokens)
    residuals = (np.log(loss) - np.log(expected)) * widened
    laws = []
    for _ in range(n_resamples):
        resampled = expected * np.exp(draw.choice(residuals, len(points)))
        again = fit_parametric(parameters, tokens, resampled, near=theta)
        if again[3] > 0 and again[4] > 0:
            laws.append(law_of(again))
    intervals = {name: percentiles([getattr(found, name) for found in laws]) for name in PARAMETERS}
    intervals |= {name: percentiles([found.exponents[i] for found in laws]) for i, name in enumerate("ab")}
    of_isoflop = _isoflop_intervals(isoflop, n_resamples, draw)
    warnings = _doubts(law, points, isoflop, intervals)
    if len(laws) < n_resamples:
        warnings.append(
            f"In {n_resamples - len(laws)} of {n_resamples} resampled fits alpha or beta is not above 0; the intervals "
            "leave them out and are too narrow."
        )
    return Fit(law, points, list(held_out), isoflop, intervals, of_isoflop, warnings, laws, residuals)


def _refuse_degenerate(points: Sequence[Point]) -> None:
    """Raise ValueError where no law can be told apart from others, whatever the losses are."""
    sizes, budgets = {p.parameters for p in points}, {round(np.log(p.flops) / np.log(SAME_BUDGET)) for p in points}
    problems = []
    if len(points) <= len(PARAMETERS):
        problems.append(f"{len(points)} finished run(s) are not enough for the law's {len(PARAMETERS)} parameters")
    if len(sizes) < 3:
        problems.append(f"the runs have {len(sizes)} size(s) of the model: train at least 3")
    if len(budgets) < 2:
        problems.append(f"the runs have {len(budgets)} compute budget(s): train at least 2")
    if problems:
        raise ValueError("no scaling law: " + "; ".join(problems))


def _doubts(law: Law, points: Sequence[Point], isoflop: IsoFlop, intervals: dict[str, Interval]) -> list[str]:
    """What should keep the reader from believing the fit: one sentence each."""
    found = [f"The budget of {p.flops:.2g} FLOPs {p.problem}." for p in isoflop.parabolas if p.problem]
    if not isoflop.powers:
        found.append("Fewer than two budgets have a minimum: approach 2 says nothing here.")
    if intervals["E"].low < 0.01 * law.loss(law.parameters[1], law.tokens[1]):
        found.append(
            "These runs do not tell the loss E that remains in the end from 0: do not use the law far outside of them."
        )
    miss = max(abs(p.flops / law.flops_of(p.parameters, p.tokens) - 1) for p in points)
    if miss > SAME_BUDGET - 1:
        found.append(
            f"Training FLOPs per token are no power law of N here: it misses them by up to {miss:.0%}, and so does "
            "the optimum at a budget."
        )
    return found


# --- approach 3: a law of all runs ------------------------------------------------------------------------------------


def fit_parametric(
    parameters: Array, tokens: Array, loss: Array, *, near: Array | None = None, n_starts: int = POLISHED
) -> Array:
    """The a = log A, b = log B, e = log E, α, β with the lowest Huber loss of log L, by L-BFGS from many starts.

    The Huber losses are added up and scaled, not averaged: a mean of order 1e-7 is below the tolerances of L-BFGS,
    which then stops far from the optimum (Besiroglu et al. 2404.10102).

    N, D and L of each run go in. `near` is a fit to almost the same losses to start at; None = the paper's grid of
    starts, of which `n_starts` are followed.
    """
    log_n, log_d, log_loss = np.log(parameters), np.log(tokens), np.log(loss)
    # Around their means, a and α hardly depend on each other.
    mean_n, mean_d = log_n.mean(), log_d.mean()
    n, d, zero = log_n - mean_n, log_d - mean_d, np.zeros_like(log_n)
    slopes = np.stack([n, d, zero])

    def objective(theta: Array) -> tuple[float, Array]:
        a, b, e, alpha, beta = theta
        terms = np.stack([a - alpha * n, b - beta * d, e + zero])
        predicted = np.logaddexp.reduce(terms)
        residual = predicted - log_loss
        slope = np.exp(terms - predicted) * np.clip(residual, -DELTA, DELTA)
        gradient = np.array([*slope.sum(axis=1), *-(slope * slopes).sum(axis=1)[:2]])
        return float(huber(DELTA, residual).sum()) / DELTA, gradient / DELTA

    if near is None:
        starts = np.array(STARTS)
        starts[:, 0] -= starts[:, 3] * mean_n
        starts[:, 1] -= starts[:, 4] * mean_d
        a, b, e, alpha, beta = starts.T[..., np.newaxis]
        terms = np.stack([a - alpha * n, b - beta * d, e + zero])
        heights = huber(DELTA, np.logaddexp.reduce(terms) - log_loss).sum(axis=1)
        starts = starts[np.argsort(heights, kind="stable")[:n_starts]]
    else:
        centre = near - np.array([near[3] * mean_n, near[4] * mean_d, 0, 0, 0])
        starts = centre + np.array([[0, 0, 0, 0, 0], [0.1, 0.1, -0.3, 0.05, -0.05], [-0.1, -0.1, 0.1, -0.05, 0.05]])
    options = {"maxiter": 2000, "maxfun": 4000, "ftol": 1e-12, "gtol": 1e-8}
    found = [minimize(objective, start, jac=True, method="L-BFGS-B", options=options) for start in starts]
    best = min(found, key=lambda result: float(result.fun)).x
    return np.asarray(best + np.array([best[3] * mean_n, best[4] * mean_d, 0, 0, 0]))


# --- approach 2: a parabola for each budget ---------------------------------------------------------------------------


def fit_isoflop(points: Sequence[Point]) -> IsoFlop:
    """A parabola in log N for each budget, and power laws through their minima.

    A minimum outside of the sizes that its budget was trained with is not counted.
    """
    parabolas = [_parabola(group, points) for group in by_budget(points)]
    good = [p for p in parabolas if not p.problem]
    powers = {}
    if len(good) >= 2:
        budgets = np.log([p.flops for p in good])
        for name, values in (("a", [p.parameters for p in good]), ("b", [p.tokens for p in good])):
            exponent, intercept = np.polyfit(budgets, np.log(values), 1)
            powers[name] = Power(float(np.exp(intercept)), float(exponent))
    return IsoFlop(parabolas, powers)


def by_budget(points: Sequence[Point]) -> list[list[Point]]:
    """Points of (almost) equal training FLOPs, the smallest budget first, in each the smallest model first."""
    groups: list[list[Point]] = []
    for point in sorted(points, key=lambda p: p.flops):
        if groups and point.flops <= SAME_BUDGET * groups[-1][0].flops:
            groups[-1].append(point)
        else:
            groups.append([point])
    return [sorted(group, key=lambda p: p.parameters) for group in groups]


def _parabola(group: list[Point], points: Sequence[Point]) -> Parabola:
    flops = float(np.mean([p.flops for p in group]))
    sizes = np.log([p.parameters for p in group])
    if len(set(sizes)) < 3:
        return Parabola(flops, group, problem=f"has {len(set(sizes))} size(s), and a parabola needs 3")
    middle = sizes.mean()  # for the condition of the least squares
    curvature, slope, height = np.polyfit(sizes - middle, [p.loss for p in group], 2)
    coefficients = (curvature, slope - 2 * curvature * middle, height - slope * middle + curvature * middle**2)
    if curvature <= 0:
        return Parabola(flops, group, coefficients=coefficients, problem="has a loss that bends the wrong way")
    at = middle - slope / (2 * curvature)
    if not sizes[0] <= at <= sizes[-1]:
        side, add = ("below the smallest", "smaller") if at < sizes[0] else ("above the largest", "larger")
        problem = f"has its minimum {side} size that was trained: add {add} ones"
        return Parabola(flops, group, coefficients=coefficients, problem=problem)
    known = sorted({(np.log(p.parameters), np.log(p.flops / p.tokens)) for p in points})
    flops_per_token = np.exp(np.interp(at, *np.transpose(known)))
    loss = height - slope**2 / (4 * curvature)
    return Parabola(flops, group, float(np.exp(at)), float(flops / flops_per_token), float(loss), coefficients)


def _isoflop_intervals(isoflop: IsoFlop, n_resamples: int, draw: np.random.Generator) -> dict[str, Interval]:
    """Of a and b, by resampled residuals of the parabolas."""
    good = [p for p in isoflop.parabolas if not p.problem]
    points = [point for parabola in good for point in parabola.points]
    freedom = len(points) - 3 * len(good)
    if len(good) < 2 or freedom < 1:
        return {}
    expected = np.concatenate([np.polyval(p.coefficients, np.log([q.parameters for q in p.points])) for p in good])
    residuals = (np.array([p.loss for p in points]) - expected) * np.sqrt(len(points) / freedom)
    resampled = []
    for _ in range(n_resamples):
        losses = expected + draw.choice(residuals, len(points))
        again = fit_isoflop([p._replace(loss=float(loss)) for p, loss in zip(points, losses, strict=True)])
        resampled.append({name: power.exponent for name, power in again.powers.items()})
    found = [exponents for exponents in resampled if exponents]
    if len(found) < n_resamples / 2:
        return {}
    return {name: percentiles([exponents[name] for exponents in found]) for name in "ab"}
