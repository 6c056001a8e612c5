"""The pictures of the report, in colours that the colour-blind tell apart (Okabe & Ito), with a marker for each arm."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from scipy.stats import binned_statistic

from thunderhead.lab import statistics
from thunderhead.lab.analysis import Analysis
from thunderhead.lab.arms import option_of, show_value
from thunderhead.lab.runs import Array, Curve
from thunderhead.lab.statistics import Interval

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
LINES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))
WIDTH = 11.0
"""Inches of the widest figure."""
BINS = 40
"""Points of a training curve: what lies between two is averaged."""
WARM_UP = 0.15
"""Share of a run whose steep beginning may leave the picture, so that the differences at its end can be seen."""


class _Look:
    """How an arm is drawn in all pictures."""

    def __init__(self, index: int):
        self.colour = COLOURS[index % len(COLOURS)]
        self.marker = MARKERS[index % len(MARKERS)]
        self.line = LINES[index // len(COLOURS) % len(LINES)]


def _looks(analysis: Analysis) -> dict[str, _Look]:
    return {arm.name: _Look(index) for index, arm in enumerate(analysis.arms)}


def results(analysis: Analysis) -> Figure:
    """Final loss of each arm with every seed and the interval of the mean; differences to the reference beside it."""
    arms, looks = analysis.ranking, _looks(analysis)
    compared = [(arm, c) for arm in arms if (c := analysis.against_reference(arm)) is not None and c.n]
    figure = _figure(WIDTH, 1.3 + 0.5 * len(arms))
    left, *right = figure.subplots(1, 2 if compared else 1, sharey=bool(compared), squeeze=False)[0]
    heights = {arm.name: len(arms) - 1 - rank for rank, arm in enumerate(arms)}
    for arm in arms:
        losses, y, look = list(analysis.losses[arm.name].values()), heights[arm.name], looks[arm.name]
        left.plot(losses, [y - 0.18] * len(losses), look.marker, color=look.colour, alpha=0.45, markersize=4.5)
        _whisker(left, analysis.mean(arm), statistics.mean_interval(losses), y, look)
    left.set_yticks(list(heights.values()), list(heights))
    left.set_ylim(-0.6, len(arms) - 0.4)
    left.set(
        xlabel=f"final validation loss ({analysis.unit}); small marks: seeds", title="Final loss, mean and 95 % CI"
    )
    if compared:
        assert analysis.reference is not None
        right[0].axvline(0, color="#444444", linewidth=1)
        for arm, comparison in compared:
            look, y = looks[arm.name], heights[arm.name]
            values = list(comparison.differences.values())
            right[0].plot(values, [y - 0.18] * len(values), look.marker, color=look.colour, alpha=0.45, markersize=4.5)
            _whisker(right[0], comparison.mean, comparison.t, y, look)
        right[0].set(
            xlabel=f"difference to {analysis.reference.name} ({analysis.unit}), paired by seed; ← better",
            title=f"Difference to {analysis.reference.name}, mean and 95 % CI",
        )
        right[0].tick_params(labelleft=False)
    return figure


def _whisker(axes: Axes, mean: float, interval: Interval | None, y: float, look: _Look) -> None:
    errors = [[mean - interval.low], [interval.high - mean]] if interval else None
    axes.errorbar(
        [mean], [y], xerr=errors, fmt=look.marker, color=look.colour, capsize=4, markersize=8, elinewidth=2, capthick=2
    )


def curves(analysis: Analysis) -> Figure:
    """Loss against tokens, FLOPs and seconds: lines for training, marks for validation, bands from seed to seed."""
    figure = _figure(WIDTH, 4.2)
    panels = figure.subplots(1, 3, sharey=True)
    lowest, highest = [], []
    for axes, axis, label in zip(
        panels, ("tokens", "flops", "seconds"), ("tokens", "FLOPs", "seconds of training"), strict=True
    ):
        end = max(
            (
                float(getattr(r.training_curve, axis)[-1])
                for a in analysis.arms
                for r in a.runs.values()
                if r.training_curve.tokens.size
            ),
            default=0.0,
        )
        for arm in analysis.arms:
            look = _looks(analysis)[arm.name]
            trained = [run.training_curve for run in arm.runs.values() if run.training_curve.tokens.size]
            if trained and analysis.metric == "val_loss":
                x, mean, low, high = band(trained, axis, end)
                axes.plot(x, mean, linestyle=look.line, color=look.colour, linewidth=1.5)
                axes.fill_between(x, low, high, color=look.colour, alpha=0.15, linewidth=0)
                late = x >= WARM_UP * end
                lowest += list(low[late])
                highest += list(high[late])
            validated = [curve for run in arm.runs.values() if (curve := analysis.validation_curve(run)).tokens.size]
            if validated and len({len(curve.loss) for curve in validated}) == 1:
                at, loss = (np.mean([getattr(curve, name) for curve in validated], axis=0) for name in (axis, "loss"))
                line = "none" if analysis.metric == "val_loss" else look.line
                axes.plot(
                    at,
                    loss,
                    marker=look.marker,
                    linestyle=line,
                    color=look.colour,
                    markersize=7,
                    markeredgecolor="white",
                )
                lowest += list(loss[at >= WARM_UP * end])
                highest += list(loss[at >= WARM_UP * end])
            axes.plot([], [], marker=look.marker, linestyle=look.line, color=look.colour, label=arm.name)
        axes.set_xlabel(label)
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.set_xlim(0, 1.02 * end or None)
    if lowest:
        margin = 0.05 * (max(highest) - min(lowest)) or 0.01
        panels[0].set_ylim(min(lowest) - margin, max(highest) + margin)
    panels[0].set_ylabel(f"loss ({analysis.unit})")
    figure.suptitle(
        "Lines: training loss, band from the lowest to the highest seed; marks: validation loss"
        if analysis.metric == "val_loss"
        else "Validation, mean over seeds"
    )
    _legend(panels[-1], "upper right")
    return figure


def differences(analysis: Analysis) -> Figure | None:
    """Training loss minus the reference's at the same tokens, paired by seed; None where nothing can be paired."""
    reference = analysis.reference
    if reference is None or analysis.metric != "val_loss":
        return None
    figure = _figure(WIDTH, 3.6)
    axes = figure.subplots()
    axes.axhline(0, color="#444444", linewidth=1)
    drawn: list[float] = []
    for arm in analysis.arms:
        pairs = [
            (run.training_curve, reference.runs[seed].training_curve)
            for seed, run in arm.runs.items()
            if seed in reference.runs and arm is not reference
        ]
        paired = [_difference(a, b) for a, b in pairs if a.tokens.size and b.tokens.size]
        if not paired:
            continue
        look = _looks(analysis)[arm.name]
        end = max(float(curve.tokens[-1]) for curve in paired)
        x, mean, low, high = band(paired, "tokens", end)
        axes.plot(
            x,
            mean,
            linestyle=look.line,
            color=look.colour,
            marker=look.marker,
            markevery=max(1, len(x) // 8),
            label=arm.name,
        )
        axes.fill_between(x, low, high, color=look.colour, alpha=0.18, linewidth=0)
        late = x >= WARM_UP * end
        drawn += [*low[late], *high[late]]
    if not drawn:
        return None
    margin = 0.1 * (max(*drawn, 0) - min(*drawn, 0)) or 0.01
    axes.set_ylim(min(*drawn, 0) - margin, max(*drawn, 0) + margin)
    axes.set_xlim(0, None)
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.set(
        xlabel="tokens",
        ylabel=f"training loss − {reference.name} ({analysis.unit})",
        title=f"Training loss minus that of {reference.name} on the same tokens; band: seeds; below 0 is better",
    )
    _legend(axes, "best")
    return figure


def _difference(a: Curve, b: Curve) -> Curve:
    """One curve minus another where both have a point at the same tokens."""
    tokens, in_a, in_b = np.intersect1d(a.tokens, b.tokens, return_indices=True)
    return Curve(tokens, a.flops[in_a], a.seconds[in_a], a.loss[in_a] - b.loss[in_b])


def band(curves: Sequence[Curve], axis: str, end: float) -> tuple[Array, Array, Array, Array]:
    """Means of curves in equal bins from 0 to `end`: centres, and the mean, lowest and highest curve in each bin."""
    n_bins = max(1, min(BINS, *(len(curve.loss) for curve in curves)))
    edges = np.linspace(0, end, n_bins + 1)
    binned = np.array([binned_statistic(getattr(c, axis), c.loss, "mean", edges).statistic for c in curves])
    full = np.isfinite(binned).all(axis=0)
    centres = (edges[:-1] + edges[1:])[full] / 2
    return centres, binned[:, full].mean(axis=0), binned[:, full].min(axis=0), binned[:, full].max(axis=0)


LR = "optimizer.lr"


def learning_rates(analysis: Analysis) -> Figure | None:
    """Final loss against the peak learning rate: a line for arms that differ in nothing else, its best marked.

    A panel for each parametrization, so that one sees whether the best rate stays. None if the rate alone never varies.
    """
    if LR not in analysis.different:
        return None
    others = {path: values for path, values in analysis.different.items() if path != LR}
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for index, arm in enumerate(analysis.arms):
        values = {path: column[index] for path, column in others.items()}
        panel = option_of("parametrization", arm.first.config) if _is_parametrized(others) else ""
        line = " ".join(_telling(values, others))
        rate = float(analysis.different[LR][index])
        panels.setdefault(panel, {}).setdefault(line, []).append((rate, analysis.mean(arm)))
    panels = {panel: {k: sorted(v) for k, v in lines.items() if len(v) > 1} for panel, lines in panels.items()}
    panels = {panel: lines for panel, lines in panels.items() if lines}
    if not panels:
        return None
    drawn = {line: _Look(index) for index, line in enumerate(dict.fromkeys(k for p in panels.values() for k in p))}
    figure = _figure(WIDTH if len(panels) > 1 else 6.5, 4.2)
    for axes, (panel, lines) in zip(
        figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels.items(), strict=True
    ):
        for line, points in lines.items():
            look, best = drawn[line], min(points, key=lambda point: point[1])
            axes.plot(
                *zip(*points, strict=True),
                marker=look.marker,
                linestyle=look.line,
                color=look.colour,
                markersize=5,
                label=f"{line or 'loss'}: best {best[0]:.2g}",
            )
            axes.plot(*best, look.marker, color=look.colour, markersize=12, markeredgecolor="#000000")
        axes.set_xscale("log", base=2)
        rates = sorted({rate for points in lines.values() for rate, _ in points})
        axes.set_xticks(rates, [f"{rate:.2g}" for rate in rates])
        axes.set_xlabel("peak learning rate")
        axes.set_title(f"{panel}: final loss by learning rate" if panel else "Final loss by learning rate")
        _legend(axes, "best")
    losses = [[loss for _, loss in points] for lines in panels.values() for points in lines.values()]
    lowest, highest = min(map(min, losses)), max(map(min, losses))
    margin = max(highest - lowest, 0.1)
    figure.axes[0].set_ylim(lowest - 0.15 * margin, min(max(map(max, losses)), highest + 2 * margin) + 0.15 * margin)
    figure.axes[0].set_ylabel(f"final loss ({analysis.unit}), mean over seeds")
    return figure


def _is_parametrized(different: Mapping[str, Any]) -> bool:
    return any(path.startswith("parametrization.") for path in different)


def _telling(values: Mapping[str, Any], columns: Mapping[str, Sequence[Any]]) -> list[str]:
    """As many of the settings as it takes to tell what the columns tell, without the parametrization's."""
    kept: list[str] = []
    told = 1
    for path in columns:
        if path.startswith("parametrization."):
            continue
        rows = {str(row) for row in zip(*(columns[name] for name in [*kept, path]), strict=True)}
        if len(rows) > told:
            kept.append(path)
            told = len(rows)
    return [f"{path.rpartition('.')[2]}={show_value(values[path])}" for path in kept]


def pareto(analysis: Analysis, costs: Sequence[tuple[str, dict[str, float]]]) -> Figure | None:
    """Final loss against costs of inference; the line joins the arms that no other beats in both.

    Args:
        analysis: for the losses.
        costs: a label, and the cost by arm, lower is better; those in which arms differ by less than 1 % are left out.
    """
    shown = [(label, cost) for label, cost in costs if len(cost) > 1 and max(cost.values()) > 1.01 * min(cost.values())]
    if not shown:
        return None
    figure = _figure(WIDTH if len(shown) > 1 else 6.5, 4)
    for axes, (label, cost) in zip(figure.subplots(1, len(shown), sharey=True, squeeze=False)[0], shown, strict=True):
        arms = [arm for arm in analysis.ranking if arm.name in cost]
        points = [(cost[arm.name], analysis.mean(arm)) for arm in arms]
        front = pareto_front(points)
        axes.plot(*zip(*front, strict=True), color="#999999", linewidth=1.2, zorder=0, drawstyle="steps-post")
        for arm, (x, y) in zip(arms, points, strict=True):
            look = _looks(analysis)[arm.name]
            interval = statistics.mean_interval(list(analysis.losses[arm.name].values()))
            errors = [[y - interval.low], [interval.high - y]] if interval else None
            axes.errorbar(
                [x], [y], yerr=errors, fmt=look.marker, color=look.colour, markersize=9, capsize=4, label=arm.name
            )
        axes.set_xlabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.margins(x=0.15)
        _legend(axes, "best")
        axes.set_ylabel(f"final loss ({analysis.unit}), 95 % CI over seeds")
        axes.label_outer()
    figure.suptitle("Lower left is better; the line is the Pareto front")
    return figure


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats in both coordinates, from left to right."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front


def _legend(axes: Axes, where: Literal["upper right", "best"]) -> None:
    """In columns where there are many arms; it gets no room of its own, which would leave the axes none."""
    n = len(axes.get_legend_handles_labels()[1])
    legend = axes.legend(loc=where, ncols=1 + n // 12, fontsize="xx-small" if n > 12 else None)
    legend.set_in_layout(False)


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def style() -> Any:
    """Settings of matplotlib for the report: for `matplotlib.rc_context`."""
    return {
        **{"axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False},
        **{"font.size": 10, "axes.titlesize": 10.5, "figure.titlesize": 10.5, "legend.frameon": False},
        **{"svg.hashsalt": "thunderhead", "axes.formatter.useoffset": False, "axes.unicode_minus": True},
    }
