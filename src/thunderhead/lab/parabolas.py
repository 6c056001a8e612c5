"""Approach 2 of Hoffmann et al. (2203.15556, section 3.2): the lowest point of a parabola in log N for each budget.

It needs no form of the law.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from thunderhead.lab.statistics import Interval, percentiles

SAME_BUDGET = 1.05
"""Runs whose training FLOPs differ by a smaller factor are of one budget: runs are whole steps."""


class Point(NamedTuple):
    """A finished run, for the fit."""

    name: str
    parameters: float  # N, as counted
    tokens: float  # D
    flops: float  # C, of training
    loss: float  # nats a token, on the validation data


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


@dataclass(frozen=True)
class Power:
    """A power law y = coefficient · C^exponent."""

    coefficient: float
    exponent: float

    def __call__(self, flops: float) -> float:
        return float(self.coefficient * flops**self.exponent)


@dataclass(frozen=True)
class IsoFlop:
    """Approach 2: optimal N and D by budget."""

    parabolas: list[Parabola]
    parameters: Power | None  # None if fewer than two budgets have a minimum inside of their sizes
    tokens: Power | None


def fit_isoflop(points: Sequence[Point]) -> IsoFlop:
    """A parabola in log N for each budget, and power laws through their minima.

    A minimum outside of the sizes that its budget was trained with is not counted.
    """
    parabolas = [_parabola(group, points) for group in by_budget(points)]
    good = [p for p in parabolas if not p.problem]
    if len(good) < 2:
        return IsoFlop(parabolas, None, None)
    budgets = np.log([p.flops for p in good])
    powers = []
    for values in ([p.parameters for p in good], [p.tokens for p in good]):
        exponent, intercept = np.polyfit(budgets, np.log(values), 1)
        powers.append(Power(float(np.exp(intercept)), float(exponent)))
    return IsoFlop(parabolas, *powers)


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


def intervals(isoflop: IsoFlop, n_resamples: int, draw: np.random.Generator) -> dict[str, Interval]:
    good = [p for p in isoflop.parabolas if not p.problem]
    points = [point for parabola in good for point in parabola.points]
    freedom = len(points) - 3 * len(good)
    if len(good) < 2 or freedom < 1:
        return {}
    expected = np.concatenate([np.polyval(p.coefficients, np.log([q.parameters for q in p.points])) for p in good])
    residuals = (np.array([p.loss for p in points]) - expected) * np.sqrt(len(points) / freedom)
    exponents = []
    for _ in range(n_resamples):
        losses = expected + draw.choice(residuals, len(points))
        found = fit_isoflop([p._replace(loss=float(loss)) for p, loss in zip(points, losses, strict=True)])
        if found.parameters is not None and found.tokens is not None:
            exponents.append((found.parameters.exponent, found.tokens.exponent))
    if len(exponents) < n_resamples / 2:
        return {}
    return {name: percentiles(values) for name, values in zip("ab", np.transpose(exponents), strict=True)}
