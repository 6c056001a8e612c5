"""Forms of a scaling law, fitted to losses: a sum of powers of N and D, Kaplan's joint form, and the optima by C.

Fits minimise the Huber loss of log L (Hoffmann et al. 2203.15556, section D.2) by least squares in a trust region.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import least_squares
from scipy.special import huber

from thunderhead.lab.runs import Array

DELTA = 1e-3
"""Where the Huber loss of log L goes from squares to absolute values."""
POLISHED = 10
"""Of the starts, those with the lowest objective are followed."""


class Form(NamedTuple):
    """log L as a function of θ, log N and log D, which enter as a − x · log N and b − y · log D.

    - value: (R,) of R runs. slopes: its derivatives by θ, (R, P).
    - starts: of a search, (S, P), for log N and log D less their means, given log L and these means.
    - turns: the places in θ of a, x, b and y; None for a y of 1.
    """

    name: str
    formula: str
    value: Callable[[Array, Array, Array], Array]
    slopes: Callable[[Array, Array, Array], Array]
    starts: Callable[[Array, float, float], Array]
    turns: tuple[int, int, int, int | None]

    def moved(self, theta: Array, mean_n: float, mean_d: float) -> Array:
        """The θ that says of log N and log D what `theta` says of them less their means."""
        a, x, b, y = self.turns
        found = np.array(theta)
        found[a] += theta[x] * mean_n
        found[b] += (1.0 if y is None else theta[y]) * mean_d
        return found


# --- E + A / N^α + B / D^β: θ = log A, log B, log E, α, β ------------------------------------------------------------


def _sum_terms(theta: Array, n: Array, d: Array) -> Array:
    a, b, e, alpha, beta = theta
    return np.stack([a - alpha * n, b - beta * d, e + np.zeros_like(n)])


def _sum_value(theta: Array, n: Array, d: Array) -> Array:
    return np.asarray(np.logaddexp.reduce(_sum_terms(theta, n, d)))


def _sum_slopes(theta: Array, n: Array, d: Array) -> Array:
    terms = _sum_terms(theta, n, d)
    of_a, of_b, of_e = np.exp(terms - np.logaddexp.reduce(terms))
    return np.stack([of_a, of_b, of_e, -of_a * n, -of_b * d], axis=1)


STARTS = np.array(
    list(
        itertools.product(
            np.arange(0, 30, 5.0),  # log A
            np.arange(0, 30, 5.0),  # log B
            np.arange(-1, 1.5, 0.5),  # log E
            np.arange(0, 2.5, 0.5),  # alpha
            np.arange(0, 2.5, 0.5),  # beta
        )
    )
)
"""Where Hoffmann et al. start (section D.2), of log N and log D themselves."""


def _sum_starts(log_loss: Array, mean_n: float, mean_d: float) -> Array:
    found = STARTS.copy()
    found[:, 0] -= found[:, 3] * mean_n
    found[:, 1] -= found[:, 4] * mean_d
    return found


SUM = Form("sum", "L = E + A / N^α + B / D^β", _sum_value, _sum_slopes, _sum_starts, (0, 3, 1, 4))


# --- ((A / N)^r + B / D)^γ, Kaplan et al. 2001.08361, equation 1.5: θ = r · log A, log B, r, γ -----------------------


def _joint_value(theta: Array, n: Array, d: Array) -> Array:
    a, b, ratio, gamma = theta
    return np.asarray(gamma * np.logaddexp(a - ratio * n, b - d))


def _joint_slopes(theta: Array, n: Array, d: Array) -> Array:
    a, b, ratio, gamma = theta
    terms = np.stack([a - ratio * n, b - d])
    both = np.logaddexp.reduce(terms)
    of_a, of_b = gamma * np.exp(terms - both)
    return np.stack([of_a, of_b, -of_a * n, both], axis=1)


def _joint_starts(log_loss: Array, mean_n: float, mean_d: float) -> Array:
    """Whatever the exponents and the weight of N against D, the mean loss is met at the mean N and D."""
    found = []
    for gamma, ratio, weight in itertools.product(
        (0.05, 0.1, 0.2, 0.3, 0.5, 1.0), (0.5, 0.75, 1.0, 1.5), (-3, -1, 0, 1, 3)
    ):
        b = log_loss.mean() / gamma - np.logaddexp(weight, 0.0)
        found.append([b + weight, b, ratio, gamma])
    return np.array(found)


JOINT = Form(
    "joint", "L = ((A / N)^r + B / D)^γ (Kaplan et al.)", _joint_value, _joint_slopes, _joint_starts, (0, 2, 1, None)
)


def fit_form(
    form: Form,
    parameters: Array,
    tokens: Array,
    loss: Array,
    *,
    weights: Array | None = None,
    near: Array | None = None,
    n_starts: int = POLISHED,
) -> Array:
    """θ with the lowest weighted Huber loss of log L; N, D and L of each run go in, (R,).

    `near` is a fit to the same losses with other weights to start at; None = the form's starts, of which `n_starts` are
    followed.
    """
    log_n, log_d, log_loss = np.log(parameters), np.log(tokens), np.log(loss)
    mean_n, mean_d = float(log_n.mean()), float(log_d.mean())
    n, d = log_n - mean_n, log_d - mean_d  # around their means, a and x hardly depend on each other
    if near is not None:
        starts = form.moved(near, -mean_n, -mean_d)[np.newaxis]
    else:
        given = form.starts(log_loss, mean_n, mean_d)
        heights = [huber(DELTA, form.value(start, n, d) - log_loss).sum() for start in given]
        starts = given[np.argsort(heights, kind="stable")[:n_starts]]

    def followed(start: Array, **more: Any) -> Any:
        return least_squares(
            lambda theta: form.value(theta, n, d) - log_loss,
            start,
            jac=lambda theta: form.slopes(theta, n, d),
            loss="huber" if weights is None else _weighted_huber(weights),
            f_scale=DELTA,
            x_scale="jac",
            **more,
        )

    best = min((followed(start, max_nfev=60) for start in starts), key=lambda result: float(result.cost)).x
    if near is None:  # along what the losses hardly tell apart
        best = followed(best, max_nfev=3000, xtol=1e-14, ftol=1e-14, gtol=1e-14).x
    return form.moved(np.asarray(best), mean_n, mean_d)


def _weighted_huber(weights: Array) -> Callable[[Array], Array]:
    """Huber's loss of z, squares in units of f_scale's, and its first two derivatives, times a weight for each run."""

    def loss(z: Array) -> Array:
        root = np.sqrt(np.maximum(z, 1.0))  # 1 where the loss is a square
        is_square = z <= 1
        height = np.where(is_square, z, 2 * root - 1)
        return np.asarray(weights * np.stack([height, 1 / root, np.where(is_square, 0.0, -0.5 / root**3)]))

    return loss


class Optima(NamedTuple):
    """The lowest loss of each budget: L*(C) = E + k / C^γ."""

    E: float
    k: float
    gamma: float

    def loss(self, flops: float) -> float:
        return float(self.E + self.k * flops**-self.gamma)


EXPONENTS = np.geomspace(0.01, 2, 400)
"""Of C that are tried."""


def fit_powers(flops: Array, loss: Array, exponents: Array = EXPONENTS) -> Array:
    """E, k, γ of E + k / C^γ by least squares, (3, …), of losses at 3 budgets or more, (…, B); nan where they rise.

    Of each of the `exponents` E and k are linear regressions, and E is not below 0.
    """
    scale = np.exp(np.log(flops).mean())
    x_XB = (flops / scale) ** -exponents[:, np.newaxis]
    x_mean, y_mean = x_XB.mean(axis=1), loss.mean(axis=-1, keepdims=True)
    x_centred, y_centred = x_XB - x_mean[:, np.newaxis], loss - y_mean
    xx, xy, yy = (x_centred**2).sum(axis=1), y_centred @ x_centred.T, (y_centred**2).sum(axis=-1, keepdims=True)
    k = np.where(y_mean > xy / xx * x_mean, xy / xx, loss @ x_XB.T / (x_XB**2).sum(axis=1))
    E = np.maximum(y_mean - k * x_mean, 0.0)
    misses = k**2 * xx - 2 * k * xy + yy + len(flops) * (E + k * x_mean - y_mean) ** 2
    best = np.where(k > 0, misses, np.inf).argmin(axis=-1)[..., np.newaxis]
    E, k = (np.take_along_axis(values, best, axis=-1)[..., 0] for values in (E, k))
    gamma = exponents[best[..., 0]]
    return np.where(k > 0, [E, k * scale**gamma, gamma], np.nan)


def fit_optima(flops: Array, loss: Array) -> Optima | None:
    """L*(C) through the lowest losses of three budgets or more; None if they are fewer, or rise."""
    if len(flops) < 3:
        return None
    E, k, gamma = map(float, fit_powers(flops, loss))
    return Optima(E, k, gamma) if k > 0 else None
