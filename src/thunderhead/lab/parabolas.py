"""Approach 2 of Hoffmann et al. (2203.15556, section 3.2): at each budget a parabola of the loss in log N."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from thunderhead.lab.runs import Array
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


class Power(NamedTuple):
    """A power law y = coefficient · C^exponent."""

    coefficient: float
    exponent: float


class IsoFlop(NamedTuple):
    """Approach 2: a parabola for each budget; optimal N ("a") and D ("b") by budget if two or more have a minimum."""

    parabolas: list[Parabola]
    powers: dict[str, Power]


def fit_isoflop(points: Sequence[Point], weights: Array | None = None) -> IsoFlop:
    """A parabola in log N for each budget, and power laws through their minima; `weights`: of the runs, (R,).

    A minimum outside of the sizes that its budget was trained with is not counted.
    """
    weight = dict(zip(map(id, points), np.ones(len(points)) if weights is None else weights, strict=True))
    groups = by_budget(points)
    parabolas = [_parabola(group, points, np.array([weight[id(p)] for p in group])) for group in groups]
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


def _parabola(group: list[Point], points: Sequence[Point], weights: Array) -> Parabola:
    flops = float(np.mean([p.flops for p in group]))
    sizes = np.log([p.parameters for p in group])
    if len(set(sizes)) < 3:
        return Parabola(flops, group, problem=f"has {len(set(sizes))} size(s), and a parabola needs 3")
    middle = sizes.mean()  # for the condition of the least squares
    curvature, slope, height = np.polyfit(sizes - middle, [p.loss for p in group], 2, w=np.sqrt(weights))
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


def exponent_intervals(isoflop: IsoFlop, resampled: Sequence[IsoFlop]) -> dict[str, Interval]:
    """Of a and b, by resampled runs, widened for the parabolas' three parameters each."""
    good = [p for p in isoflop.parabolas if not p.problem]
    n_points = sum(len(p.points) for p in good)
    freedom = n_points - 3 * len(good)
    found = [again.powers for again in resampled if again.powers]
    if len(good) < 2 or freedom < 1 or len(found) < len(resampled) / 2:
        return {}
    intervals = {}
    for name in "ab":
        centre = isoflop.powers[name].exponent
        values = np.array([powers[name].exponent for powers in found])
        intervals[name] = percentiles(centre + np.sqrt(n_points / freedom) * (values - centre))
    return intervals
