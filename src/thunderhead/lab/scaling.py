"""Fit scaling laws to finished runs: what loss N parameters reach with D tokens, and how to split a compute budget.

By two of the three approaches of Hoffmann et al. (2203.15556): a parabola in log N at each budget, which needs no form
of the law (approach 2, section 3.2), and L(N, D) = E + A / N^α + B / D^β of all runs (approach 3, section 3.3). Losses
are predicted by the form, of several, that predicts the largest budget best from the others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from thunderhead.core.types import Count
from thunderhead.lab.law_forms import JOINT, SUM, Form, fit_form, fit_optima
from thunderhead.lab.parabolas import SAME_BUDGET, IsoFlop, Point, by_budget, exponent_intervals, fit_isoflop
from thunderhead.lab.runs import Array
from thunderhead.lab.statistics import Interval, percentiles
from thunderhead.scaling_law import Law

PARAMETERS = ("E", "A", "B", "alpha", "beta")
"""Of the law."""


Loss = Callable[[float, float], float]
"""In nats a token, of N parameters trained on D tokens."""


class Prediction(NamedTuple):
    """A run that the fit did not see, and what the fit says.

    `interval` is of the measured loss: of the fit, the scatter of single runs, and the forms.
    """

    point: Point
    loss: float
    interval: Interval

    @property
    def error(self) -> float:
        """How far the measured loss lies above the predicted one, relative to it."""
        return self.point.loss / self.loss - 1


@dataclass(frozen=True)
class Candidate:
    """A form of the law, fitted.

    - loss: what it says. resampled: what it says of resampled runs.
    - errors: fitted without the largest budget, how far that budget's runs lie above what it says, relative to it;
      empty where that cannot be tried.
    """

    name: str
    formula: str
    loss: Loss
    resampled: list[Loss] = field(repr=False)
    errors: list[float]

    @property
    def mean_error(self) -> float:
        """Of `errors`, which must be there."""
        return sum(self.errors) / len(self.errors)

    @property
    def miss(self) -> float:
        """Root mean square of `errors`; infinity without."""
        return float(np.sqrt(np.mean(np.square(self.errors)))) if self.errors else np.inf


@dataclass(frozen=True)
class Fit:
    """Both approaches, with 95 % intervals of a bootstrap.

    - intervals: of PARAMETERS, a and b (the exponents of the optimum).
    - isoflop_intervals: of a and b of approach 2, if it has any.
    - laws: the resampled laws, for intervals of whatever is asked of them.
    - candidates: forms that predict losses, the best one first.
    """

    law: Law
    points: list[Point]
    held_out: list[Point]
    isoflop: IsoFlop
    intervals: dict[str, Interval]
    isoflop_intervals: dict[str, Interval]
    warnings: list[str]
    candidates: list[Candidate]
    laws: list[Law] = field(repr=False)

    def loss(self, parameters: float, tokens: float) -> float:
        """By the best form."""
        return self.candidates[0].loss(parameters, tokens)

    def interval(self, quantity: Callable[[Law], float]) -> Interval:
        """Of anything that a law predicts; it tells how sure the fit is, not how wrong its form."""
        return percentiles([quantity(law) for law in self.laws])

    @cached_property
    def predictions(self) -> list[Prediction]:
        """Of what was held out."""
        return [self.predict(point) for point in self.held_out]

    def predict(self, point: Point) -> Prediction:
        """The loss of another run, as if it had not been measured.

        By the best form; the interval is from the lowest to the highest end of all forms' intervals.
        """
        n, d = point.parameters, point.tokens
        draw, intervals = np.random.default_rng(0), []
        for candidate in self.candidates:
            scatter = [np.log(p.loss / candidate.loss(p.parameters, p.tokens)) for p in self.points]
            losses = np.array([loss(n, d) for loss in candidate.resampled])
            intervals.append(percentiles(losses * np.exp(draw.choice(scatter, len(losses)))))
        widest = Interval(min(found.low for found in intervals), max(found.high for found in intervals))
        return Prediction(point, self.loss(n, d), widest)


def fit(
    points: Sequence[Point], *, count: Count, held_out: Sequence[Point] = (), n_resamples: int = 200, seed: int = 0
) -> Fit:
    """Fit a law to finished runs of one kind of model on one data set; those that are held out are only predicted.

    Intervals are of a Bayesian bootstrap (Rubin 1981): each run's part in the fit is multiplied by a draw from the
    exponential distribution. Unlike resampled residuals it holds where small budgets scatter more than large ones, and
    unlike resampled runs it keeps all sizes and budgets. Fits are widened for the parameters that were fitted.

    Raises ValueError if the runs cannot tell a law, with what is missing.
    """
    _refuse_degenerate(points)
    points = sorted(points, key=lambda p: (p.flops, p.parameters))
    law_of, theta = _fit_sum(points, count)
    for value, symbol, name in ((theta[3], "alpha", "parameters"), (theta[4], "beta", "tokens")):
        if value <= 0:
            raise ValueError(
                f"no scaling law: {symbol} comes out as {value:.3g}, as if the loss did not fall with more {name}. "
                "The budgets or sizes are too close to each other for the noise, or the learning rates do not fit"
            )
    law, isoflop = law_of(theta), fit_isoflop(points)
    weights = np.random.default_rng(seed).exponential(size=(n_resamples, len(points)))
    thetas = _refits(SUM, points, theta, weights)
    laws = [law_of(again) for again in thetas if again[3] > 0 and again[4] > 0]
    intervals = {name: percentiles([getattr(found, name) for found in laws]) for name in PARAMETERS}
    intervals |= {name: percentiles([found.exponents[i] for found in laws]) for i, name in enumerate("ab")}
    resampled = [fit_isoflop(points, drawn) for drawn in weights]
    warnings = _doubts(law, points, isoflop, intervals)
    if len(laws) < n_resamples:
        warnings.append(
            f"In {n_resamples - len(laws)} of {n_resamples} resampled fits alpha or beta is not above 0; the intervals "
            "leave them out and are too narrow."
        )
    candidates = [
        Candidate(SUM.name, SUM.formula, law.loss, [found.loss for found in laws], []),
        *_others(law, points, isoflop, resampled, weights),
    ]
    candidates = [replace(each, errors=_errors(each.name, points, count, theta)) for each in candidates]
    candidates.sort(key=lambda each: each.miss)  # of equals, and where nothing can be left out, the sum
    of_isoflop = exponent_intervals(isoflop, resampled)
    return Fit(law, points, list(held_out), isoflop, intervals, of_isoflop, warnings, candidates, laws)


def _fit_sum(points: Sequence[Point], count: Count, near: Array | None = None) -> tuple[Callable[[Array], Law], Array]:
    """θ of the sum, and the law that a θ is, with the FLOPs a token of these runs."""
    parameters, tokens, flops = np.array([p[1:4] for p in points]).T
    exponent, intercept = np.polyfit(np.log(parameters), np.log(flops / tokens), 1)

    def law_of(theta: Array) -> Law:
        A, B, E = map(float, np.exp(theta[:3]))
        alpha, beta, k, p = map(float, (theta[3], theta[4], np.exp(intercept), exponent))
        ranges = [(float(values.min()), float(values.max())) for values in (parameters, tokens, flops)]
        return Law(count, E, A, B, alpha, beta, k, p, *ranges)

    return law_of, _fitted(SUM, points, near=near)


def _fitted(form: Form, points: Sequence[Point], weights: Array | None = None, near: Array | None = None) -> Array:
    parameters, tokens, _, loss = np.array([p[1:] for p in points]).T
    return fit_form(form, parameters, tokens, loss, weights=weights, near=near)


def _refits(form: Form, points: Sequence[Point], theta: Array, weights: Array) -> list[Array]:
    """θ of weighted runs, as far off `theta` as it would be without the parameters that were fitted."""
    widening = np.sqrt(len(points) / max(1, len(points) - len(theta)))
    return [theta + widening * (_fitted(form, points, weights=drawn, near=theta) - theta) for drawn in weights]


# --- other forms ------------------------------------------------------------------------------------------------------


def _others(
    law: Law, points: Sequence[Point], isoflop: IsoFlop, resampled: Sequence[IsoFlop], weights: Array
) -> list[Candidate]:
    """The joint form, and the optima where there are enough of them, with what resampled runs say."""
    theta = _fitted(JOINT, points)
    joint = [_loss_of(JOINT, again) for again in _refits(JOINT, points, theta, weights)]
    found = [Candidate(JOINT.name, JOINT.formula, _loss_of(JOINT, theta), joint, [])]
    if (optima := _optima_loss(law, isoflop)) is not None:
        losses = [loss for again in resampled if (loss := _optima_loss(law, again)) is not None]
        if len(losses) >= len(weights) / 2:
            formula = "L*(C) = E + k / C^γ, of the parabolas' lowest points"
            found.append(Candidate("optima", formula, optima, losses or [optima], []))
    return found


def _loss_of(form: Form, theta: Array) -> Loss:
    return lambda n, d: float(np.exp(form.value(theta, np.array(np.log(n)), np.array(np.log(d)))))


def _optima_loss(law: Law, isoflop: IsoFlop) -> Loss | None:
    """L*(C), and off the optimum more than that by as large a part as L(N, D) is."""
    good = [p for p in isoflop.parabolas if not p.problem]
    optima = fit_optima(np.array([p.flops for p in good]), np.array([p.loss for p in good]))
    if optima is None:
        return None

    def loss(n: float, d: float) -> float:
        flops = law.flops_of(n, d)
        return optima.loss(flops) * float(law.loss(n, d) / law.optimum(flops).loss)

    return loss


def _errors(name: str, points: Sequence[Point], count: Count, near: Array) -> list[float]:
    """Of the largest budget's runs, by a fit of this form to the others; none where that says nothing.

    `near`: the sum's θ of all.
    """
    *others, largest = by_budget(points)
    rest = [point for group in others for point in group]
    try:
        _refuse_degenerate(rest)
    except ValueError:
        return []
    loss: Loss | None = None
    if name == JOINT.name:
        loss = _loss_of(JOINT, _fitted(JOINT, rest))
    else:
        law_of, theta = _fit_sum(rest, count, near)
        law = law_of(theta)
        loss = law.loss if name == SUM.name else _optima_loss(law, fit_isoflop(rest))
    return [p.loss / loss(p.parameters, p.tokens) - 1 for p in largest] if loss is not None else []


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
