"""The pictures of a scaling law, in the colours and marks of the other reports."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from thunderhead.lab.looks import COLOURS, look, panels
from thunderhead.lab.parabolas import Parabola, by_budget
from thunderhead.lab.runs import Array
from thunderhead.lab.scaling import Fit, Prediction

MEASURED, PREDICTED = "#000000", "#D55E00"
LEVELS = 12
"""Contour lines of the loss."""


def isoflop(fit: Fit) -> Figure:
    """Approach 2: loss against size at each budget, and the optimal size and tokens against the budget."""
    figure, (left, *others) = panels(3, 4.2, width_ratios=(1.5, 1, 1))
    for index, parabola in enumerate(fit.isoflop.parabolas):
        _budget(left, parabola, index)
    left.set(xlabel=f"parameters N ({fit.law.count})", ylabel="validation loss (nats)", title="Loss at equal compute")
    left.legend(title="training FLOPs", fontsize=9)
    _logarithmic(left, "x")

    budgets = np.geomspace(fit.law.flops[0] / 1.5, fit.law.flops[1] * 1.5, 50)
    optima = np.array([fit.law.optimum(float(c))[:2] for c in budgets])
    good = [p for p in fit.isoflop.parabolas if not p.problem]
    labels = {"parameters": "optimal N", "tokens": "optimal D (tokens)"}
    for column, (axes, (name, label)) in enumerate(zip(others, labels.items(), strict=True)):
        axes.plot(budgets, optima[:, column], color=PREDICTED, label="approach 3: L(N, D)")
        if (power := getattr(fit.isoflop, name)) is not None:
            axes.plot(budgets, [power(c) for c in budgets], "--", color=COLOURS[0], label="approach 2: parabolas")
        axes.plot([p.flops for p in good], [getattr(p, name) for p in good], "*", color=COLOURS[0], markersize=11)
        axes.set(xlabel="training FLOPs C", ylabel=label)
        _logarithmic(axes, "both")
    others[0].legend(fontsize=9)
    figure.suptitle("Marks: runs, lines: parabolas, stars: their lowest points")
    return figure


def _budget(axes: Axes, parabola: Parabola, index: int) -> None:
    its = look(index)
    sizes, losses = np.array([(p.parameters, p.loss) for p in parabola.points]).T
    axes.plot(sizes, losses, ls="", **its.of_marks, label=f"{parabola.flops:.2g}", markersize=6)
    if parabola.coefficients:
        line = np.geomspace(sizes.min(), sizes.max(), 60)
        style = ":" if parabola.problem else "-"
        axes.plot(line, np.polyval(parabola.coefficients, np.log(line)), style, color=its.colour, linewidth=1.3)
    if not parabola.problem:
        axes.plot([parabola.parameters], [parabola.loss], "*", color=its.colour, markersize=14, markeredgecolor="black")


def contours(fit: Fit, predictions: Sequence[Prediction]) -> Figure:
    """Approach 3: the loss over N and D, the runs in it, and the best N and D at each budget."""
    figure, (axes,) = panels(1, 4.8, 7.5)
    points = [*fit.points, *(p.point for p in predictions)]
    n, d = (_span([getattr(p, name) for p in points]) for name in ("parameters", "tokens"))
    loss = fit.law.loss(n[np.newaxis, :], d[:, np.newaxis])
    lines = axes.contour(n, d, loss, levels=LEVELS, colors="#57606a", linewidths=0.8)
    axes.clabel(lines, fontsize=8, fmt="%.2f")
    for index, group in enumerate(by_budget(fit.points)):
        x, y = [p.parameters for p in group], [p.tokens for p in group]
        label = f"{np.mean([p.flops for p in group]):.2g} FLOPs"
        axes.plot(x, y, **look(index).of_marks, linestyle=":", markersize=6, label=label)
    budgets = np.geomspace(min(p.flops for p in points) / 3, max(p.flops for p in points) * 3, 50)
    best = np.array([fit.law.optimum(float(c))[:2] for c in budgets])
    axes.plot(best[:, 0], best[:, 1], color=PREDICTED, linewidth=2, label="optimum")
    _held_out(axes, [(p.point.parameters, p.point.tokens) for p in predictions])
    axes.set(xlabel=f"parameters N ({fit.law.count})", ylabel="tokens D")
    axes.set_title("Lines: predicted loss (nats); marks: runs")
    _logarithmic(axes, "both")
    axes.set_xlim(n[0], n[-1])
    axes.set_ylim(d[0], d[-1])
    axes.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def predictions(fit: Fit, held_out: Sequence[Prediction]) -> Figure:
    """Measured against predicted loss, and the misses."""
    figure, (left, right) = panels(2, 4)
    predicted = np.array([fit.law.loss(p.parameters, p.tokens) for p in fit.points])
    measured = np.array([p.loss for p in fit.points])
    both = [*predicted, *measured, *(value for p in held_out for value in (p.loss, p.point.loss))]
    margin = 0.05 * (max(both) - min(both))
    ends = [min(both) - margin, max(both) + margin]
    left.plot(ends, ends, color="#999999", linewidth=1)
    left.plot(predicted, measured, "o", color=COLOURS[0], label="fitted")
    left.set(xlabel="predicted loss (nats)", ylabel="measured loss (nats)", title="Measured against predicted")
    right.axhline(0, color="#999999", linewidth=1)
    right.plot([p.flops for p in fit.points], 100 * (measured / predicted - 1), "o", color=COLOURS[0])
    right.set(xlabel="training FLOPs", ylabel="measured − predicted (%)")
    right.set_title("Misses; bars: 95 % prediction interval")
    for p in held_out:
        low, high = (100 * (edge / p.loss - 1) for edge in p.interval)
        right.errorbar([p.point.flops], [0], yerr=[[-min(low, 0)], [max(high, 0)]], color=MEASURED, capsize=5)
    _held_out(left, [(p.loss, p.point.loss) for p in held_out])
    _held_out(right, [(p.point.flops, 100 * p.error) for p in held_out])
    _logarithmic(right, "x")
    left.legend()
    return figure


def _held_out(axes: Axes, places: list[tuple[float, float]]) -> None:
    for index, place in enumerate(places):
        label = None if index else "held out"
        axes.plot(*place, "*", color=PREDICTED, markersize=16, markeredgecolor="black", linestyle="none", label=label)


def _span(values: list[float]) -> Array:
    return np.geomspace(min(values) / 1.4, max(values) * 1.4, 80)


def _logarithmic(axes: Axes, which: str) -> None:
    for name in "xy" if which == "both" else which:
        getattr(axes, f"set_{name}scale")("log")
        axis = getattr(axes, f"{name}axis")
        low, high = axis.get_view_interval()
        if high / low < 30:  # powers of ten alone would be one label or none
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low > 4 else (1, 1.5, 2, 3, 4, 5, 7)))
        axis.set_major_formatter(EngFormatter(sep=""))
        axis.set_minor_formatter(NullFormatter())
