"""Fit scaling laws to finished runs: what loss N parameters reach with D tokens, and how to split a compute budget.

By two of the three approaches of Hoffmann et al. (2203.15556, section 3): parabolas, and a law of all runs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from thunderhead.core.types import Count
from thunderhead.lab import law as parametric
from thunderhead.lab import parabolas
from thunderhead.lab.parabolas import SAME_BUDGET, IsoFlop, Point
from thunderhead.lab.runs import Array
from thunderhead.lab.statistics import Interval, percentiles
from thunderhead.scaling_law import Law


@dataclass(frozen=True)
class Fit:
    """Both approaches, with 95 % intervals of a bootstrap.

    - intervals: of E, A, B, alpha, beta, a and b (the exponents of the optimum).
    - isoflop_intervals: of a and b of approach 2, if it has any.
    - laws: the resampled laws, for intervals of whatever is asked of them.
    """

    law: Law
    points: list[Point]
    isoflop: IsoFlop
    intervals: dict[str, Interval]
    isoflop_intervals: dict[str, Interval]
    warnings: list[str]
    laws: list[Law] = field(repr=False)
    residuals: Array = field(repr=False)

    def interval(self, quantity: Callable[[Law], float]) -> Interval:
        """Of anything that a law predicts; it tells how sure the fit is, not how wrong its form."""
        return percentiles([quantity(law) for law in self.laws])

    def predict(self, point: Point) -> "Prediction":
        """The loss of another run, as if it had not been measured."""
        draw = np.random.default_rng(0)
        losses = [law.loss(point.parameters, point.tokens) for law in self.laws]
        scattered = np.array(losses) * np.exp(draw.choice(self.residuals, len(losses)))
        return Prediction(point, self.law.loss(point.parameters, point.tokens), percentiles(scattered))


class Prediction(NamedTuple):
    """A run that the fit did not see, and what the fit says."""

    point: Point
    loss: float
    interval: Interval
    """Of the measured loss, if the law's form is right: of the fit, and the scatter of single runs."""

    @property
    def error(self) -> float:
        """How far the measured loss lies above the predicted one, relative to it."""
        return self.point.loss / self.loss - 1


def fit(points: Sequence[Point], *, count: Count, n_resamples: int = 200, delta: float = 1e-3, seed: int = 0) -> Fit:
    """Fit a law to finished runs, by both approaches.

    Intervals come from resampled residuals (Efron & Tibshirani 1993, section 9.4), since the sizes and budgets of an
    IsoFLOP grid are chosen, not drawn; residuals are widened for the parameters that were fitted.

    The points are of one kind of model on one data set; `delta` is of the Huber loss on log L.

    Raises:
        ValueError: the runs cannot tell a law; names what is missing.
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

    theta = parametric.fit_parametric(parameters, tokens, loss, delta=delta)
    _refuse_senseless(theta)
    law, isoflop = law_of(theta), parabolas.fit_isoflop(points)

    draw = np.random.default_rng(seed)
    widened = np.sqrt(len(points) / max(1, len(points) - parametric.PARAMETERS))
    expected = law.loss(parameters, tokens)
    residuals = (np.log(loss) - np.log(expected)) * widened
    laws = []
    for _ in range(n_resamples):
        resampled = expected * np.exp(draw.choice(residuals, len(points)))
        again = parametric.fit_parametric(parameters, tokens, resampled, delta=delta, near=theta)
        if again[3] > 0 and again[4] > 0:
            laws.append(law_of(again))
    names = ("E", "A", "B", "alpha", "beta")
    intervals = {name: percentiles([getattr(found, name) for found in laws]) for name in names}
    intervals |= {name: percentiles([found.exponents[i] for found in laws]) for i, name in enumerate("ab")}
    of_isoflop = parabolas.intervals(isoflop, n_resamples, draw)
    warnings = [*_doubts(law, isoflop, intervals, len(laws), n_resamples), *_flops_miss(law, points)]
    return Fit(law, points, isoflop, intervals, of_isoflop, warnings, laws, residuals)


def _refuse_degenerate(points: Sequence[Point]) -> None:
    """Raise ValueError where no law can be told apart from others, whatever the losses are."""
    sizes, budgets = {p.parameters for p in points}, {round(np.log(p.flops) / np.log(SAME_BUDGET)) for p in points}
    problems = []
    if len(points) <= parametric.PARAMETERS:
        problems.append(
            f"{len(points)} finished run(s) are not enough for the law's {parametric.PARAMETERS} parameters"
        )
    if len(sizes) < 3:
        problems.append(f"the runs have {len(sizes)} size(s) of the model: train at least 3")
    if len(budgets) < 2:
        problems.append(f"the runs have {len(budgets)} compute budget(s): train at least 2")
    if problems:
        raise ValueError("no scaling law: " + "; ".join(problems))


def _refuse_senseless(theta: Array) -> None:
    for value, symbol, name in ((theta[3], "alpha", "parameters"), (theta[4], "beta", "tokens")):
        if value <= 0:
            raise ValueError(
                f"no scaling law: {symbol} comes out as {value:.3g}, as if the loss did not fall with more {name}. "
                "The budgets or sizes are too close to each other for the noise, or the learning rates do not fit"
            )


def _doubts(law: Law, isoflop: IsoFlop, intervals: dict[str, Interval], n_sensible: int, n_resamples: int) -> list[str]:
    """What should keep the reader from believing the fit: one sentence each."""
    found = [f"The budget of {p.flops:.2g} FLOPs {p.problem}." for p in isoflop.parabolas if p.problem]
    if isoflop.parameters is None:
        found.append("Fewer than two budgets have a minimum: approach 2 says nothing here.")
    if intervals["E"].low < 0.01 * law.loss(law.parameters[1], law.tokens[1]):
        found.append(
            "These runs do not tell the loss E that remains in the end from 0: do not use the law far outside of them."
        )
    if n_sensible < n_resamples:
        found.append(
            f"In {n_resamples - n_sensible} of {n_resamples} resampled fits alpha or beta is not above 0; the "
            "intervals leave them out and are too narrow."
        )
    return found


def _flops_miss(law: Law, points: Sequence[Point]) -> list[str]:
    misses = [abs(p.flops / law.flops_of(p.parameters, p.tokens) - 1) for p in points]
    if max(misses) <= SAME_BUDGET - 1:
        return []
    return [
        f"Training FLOPs per token are no power law of N here: it misses them by up to {max(misses):.0%}, and so does "
        "the optimum at a budget."
    ]
