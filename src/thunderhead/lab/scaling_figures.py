"""The pictures of a scaling law."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from thunderhead.lab.looks import COLOURS, look, panels
from thunderhead.lab.parabolas import Parabola, by_budget
from thunderhead.lab.scaling import Fit

MEASURED, PREDICTED = "#000000", "#D55E00"
LEVELS = 12
"""Contour lines of the loss."""


def isoflop(fit: Fit) -> Figure:
    """Approach 2: loss against size at each budget, and the optimal size and tokens against the budget."""
    figure, (left, *others) = panels(3, 4.2, width_ratios=(1.5, 1, 1))
    for index, parabola in enumerate(fit.isoflop.parabolas):
        _draw_budget(left, parabola, index)
    left.set(xlabel=f"parameters N ({fit.law.count})", ylabel="validation loss (nats)", title="Loss at equal compute")
    left.legend(title="training FLOPs", fontsize=9)
    _logarithmic(left, "x")

    budgets = np.geomspace(fit.law.flops[0] / 1.5, fit.law.flops[1] * 1.5, 50)
    optima = np.array([fit.law.optimum(float(c))[:2] for c in budgets])
    good = [p for p in fit.isoflop.parabolas if not p.problem]
    labels = {"a": ("parameters", "optimal N"), "b": ("tokens", "optimal D (tokens)")}
    for axes, line, (exponent, (name, label)) in zip(others, optima.T, labels.items(), strict=True):
        axes.plot(budgets, line, color=PREDICTED, label="approach 3: L(N, D)")
        if power := fit.isoflop.powers.get(exponent):
            by_parabolas = power.coefficient * budgets**power.exponent
            axes.plot(budgets, by_parabolas, "--", color=COLOURS[0], label="approach 2: parabolas")
        axes.plot(
            [p.flops for p in good],
            [getattr(p, name) for p in good],
            "*",
            color=COLOURS[0],
            markersize=11,
            label="_lowest",
        )
        axes.set(xlabel="training FLOPs C", ylabel=label)
        _logarithmic(axes, "both")
    others[0].legend(fontsize=9)
    figure.suptitle("Marks: runs, lines: parabolas, stars: their lowest points")
    return figure


def _draw_budget(axes: Axes, parabola: Parabola, index: int) -> None:
    its = look(index)
    sizes, losses = np.array([(p.parameters, p.loss) for p in parabola.points]).T
    axes.plot(sizes, losses, ls="", **its.of_marks, label=f"{parabola.flops:.2g}", markersize=6)
    if parabola.coefficients:
        line = np.geomspace(sizes.min(), sizes.max(), 60)
        style = ":" if parabola.problem else "-"
        axes.plot(
            line,
            np.polyval(parabola.coefficients, np.log(line)),
            style,
            color=its.colour,
            linewidth=1.3,
            label=f"_{parabola.flops:.2g}: parabola",
        )
    if not parabola.problem:
        star: Any = {"color": its.colour, "markersize": 14, "markeredgecolor": "black"}
        axes.plot([parabola.parameters], [parabola.loss], "*", **star, label=f"_{parabola.flops:.2g}: lowest")


def contours(fit: Fit) -> Figure:
    """Approach 3: the loss over N and D, the runs in it, and the best N and D at each budget."""
    figure, (axes,) = panels(1, 4.8, 7.5)
    points = [*fit.points, *fit.held_out]
    values = ([p.parameters for p in points], [p.tokens for p in points])
    n, d = (np.geomspace(min(found) / 1.4, max(found) * 1.4, 80) for found in values)
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
    _draw_held_out(axes, [(p.parameters, p.tokens) for p in fit.held_out])
    axes.set(xlabel=f"parameters N ({fit.law.count})", ylabel="tokens D")
    axes.set_title("Lines: predicted loss (nats); marks: runs")
    _logarithmic(axes, "both")
    axes.set_xlim(n[0], n[-1])
    axes.set_ylim(d[0], d[-1])
    axes.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def predictions(fit: Fit) -> Figure:
    """Measured against predicted loss, and the misses."""
    figure, (left, right) = panels(2, 4)
    predicted = np.array([fit.loss(p.parameters, p.tokens) for p in fit.points])
    measured = np.array([p.loss for p in fit.points])
    both = [*predicted, *measured, *(value for p in fit.predictions for value in (p.loss, p.point.loss))]
    margin = 0.05 * (max(both) - min(both))
    ends = [min(both) - margin, max(both) + margin]
    left.plot(ends, ends, color="#999999", linewidth=1)
    left.plot(predicted, measured, "o", color=COLOURS[0], label="fitted")
    left.set(xlabel="predicted loss (nats)", ylabel="measured loss (nats)", title="Measured against predicted")
    right.axhline(0, color="#999999", linewidth=1)
    right.plot([p.flops for p in fit.points], 100 * (measured / predicted - 1), "o", color=COLOURS[0], label="_fitted")
    right.set(xlabel="training FLOPs", ylabel="measured − predicted (%)")
    right.set_title("Misses; bars: 95 % prediction interval")
    for p in fit.predictions:
        low, high = (100 * (edge / p.loss - 1) for edge in p.interval)
        right.errorbar(
            [p.point.flops], [0], yerr=[[-min(low, 0)], [max(high, 0)]], color=MEASURED, capsize=5, label="_held out"
        )
    _draw_held_out(left, [(p.loss, p.point.loss) for p in fit.predictions])
    _draw_held_out(right, [(p.point.flops, 100 * p.error) for p in fit.predictions])
    _logarithmic(right, "x")
    left.legend()
    return figure


def _draw_held_out(axes: Axes, places: list[tuple[float, float]]) -> None:
    for index, place in enumerate(places):
        label = "_held out" if index else "held out"
        axes.plot(*place, "*", color=PREDICTED, markersize=16, markeredgecolor="black", linestyle="none", label=label)


def _logarithmic(axes: Axes, which: str) -> None:
    for name in "xy" if which == "both" else which:
        getattr(axes, f"set_{name}scale")("log")
        axis = getattr(axes, f"{name}axis")
        low, high = axis.get_view_interval()
        if high / low < 30:  # powers of ten alone would be one label or none
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low > 4 else (1, 1.5, 2, 3, 4, 5, 7)))
        axis.set_major_formatter(EngFormatter(sep=""))
        axis.set_minor_formatter(NullFormatter())


FIGURES = {
    "isoflop": ("Loss against size at equal compute, and the optima", isoflop),
    "law": ("Predicted loss over N and D", contours),
    "predictions": ("Measured against predicted loss", predictions),
}
