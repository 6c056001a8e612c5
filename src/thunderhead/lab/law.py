"""The fit of L(N, D) = E + A / N^α + B / D^β to runs, approach 3 of Hoffmann et al. (2203.15556, section 3.3)."""

import itertools

import numpy as np
from scipy.optimize import minimize
from scipy.special import huber

from thunderhead.lab.runs import Array

PARAMETERS = 5
"""Of the law: E, A, B, α, β."""
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
POLISHED = 40
"""Of the starts, those with the lowest objective are followed."""


def fit_parametric(
    parameters: Array, tokens: Array, loss: Array, *, delta: float, near: Array | None = None, n_starts: int = POLISHED
) -> Array:
    """The a = log A, b = log B, e = log E, α, β with the lowest Huber loss of log L, by L-BFGS from many starts.

    The Huber losses are added up and scaled, not averaged: a mean of order 1e-7 is below the tolerances of L-BFGS,
    which then stops far from the optimum (Besiroglu et al. 2404.10102).

    N, D and L of each run go in. `delta` is where the Huber loss goes from squares to absolute values, `near` a fit to
    almost the same losses to start at; None = the paper's grid of starts, of which `n_starts` are followed.
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
        slope = np.exp(terms - predicted) * np.clip(residual, -delta, delta)
        gradient = np.array([*slope.sum(axis=1), *-(slope * slopes).sum(axis=1)[:2]])
        return float(huber(delta, residual).sum()) / delta, gradient / delta

    if near is None:
        starts = np.array(STARTS)
        starts[:, 0] -= starts[:, 3] * mean_n
        starts[:, 1] -= starts[:, 4] * mean_d
        a, b, e, alpha, beta = starts.T[..., np.newaxis]
        terms = np.stack([a - alpha * n, b - beta * d, e + zero])
        heights = huber(delta, np.logaddexp.reduce(terms) - log_loss).sum(axis=1)
        starts = starts[np.argsort(heights, kind="stable")[:n_starts]]
    else:
        centre = near - np.array([near[3] * mean_n, near[4] * mean_d, 0, 0, 0])
        starts = centre + np.array([[0, 0, 0, 0, 0], [0.1, 0.1, -0.3, 0.05, -0.05], [-0.1, -0.1, 0.1, -0.05, 0.05]])
    options = {"maxiter": 2000, "maxfun": 4000, "ftol": 1e-12, "gtol": 1e-8}
    found = [minimize(objective, start, jac=True, method="L-BFGS-B", options=options) for start in starts]
    best = min(found, key=lambda result: float(result.fun)).x
    return np.asarray(best + np.array([best[3] * mean_n, best[4] * mean_d, 0, 0, 0]))
