"""The pictures of a comparison."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from scipy.stats import binned_statistic

from thunderhead.lab.analysis import Analysis
from thunderhead.lab.arms import option_of, setting
from thunderhead.lab.looks import WIDTH, Look, legend, look, panels
from thunderhead.lab.runs import Array, Curve
from thunderhead.lab.statistics import Interval

BINS = 40
"""Points of a training curve: what lies between two is averaged."""
WARM_UP = 0.15
"""Share of a run whose steep beginning may leave the picture, so that the differences at its end can be seen."""
LR = "optimizer.lr"


def _looks(analysis: Analysis) -> dict[str, Look]:
    return {arm.name: look(index) for index, arm in enumerate(analysis.arms)}


def results(analysis: Analysis) -> Figure:
    """Final loss of each arm with every seed and the interval of the mean; differences to the reference beside it."""
    arms, looks = analysis.ranking, _looks(analysis)
    heights = {arm.name: len(arms) - 1 - rank for rank, arm in enumerate(arms)}
    compared = [c for arm in arms if (c := analysis.against_reference(arm)) is not None and c.n]
    figure, (left, *right) = panels(2 if compared else 1, 1.3 + 0.5 * len(arms), sharey=bool(compared))

    def row(axes: Axes, name: str, values: list[float], mean: float, interval: Interval | None) -> None:
        y = heights[name]
        marks: Any = {"ls": "", **looks[name].of_marks}
        seeds: Any = {"alpha": 0.45, "markersize": 4.5, "label": f"_{name}: seeds"}
        axes.plot(values, [y - 0.18] * len(values), **marks, **seeds)
        bars: Any = {"xerr": _bars(mean, interval), "elinewidth": 2, "capsize": 4, "capthick": 2}
        axes.errorbar([mean], [y], **marks, markersize=8, **bars, label=f"_{name}: mean")

    for arm in arms:
        row(left, arm.name, list(analysis.losses[arm.name].values()), analysis.mean(arm), analysis.interval(arm))
    left.set_yticks(list(heights.values()), list(heights))
    left.set_ylim(-0.6, len(arms) - 0.4)
    left.set_xlabel(f"final validation loss ({analysis.unit}); small marks: seeds")
    left.set_title("Final loss, mean and 95 % CI")
    if compared:
        reference = compared[0].against
        right[0].axvline(0, color="#444444", linewidth=1)
        for c in compared:
            row(right[0], c.arm, list(c.differences.values()), c.mean, c.interval)
        right[0].set_xlabel(f"difference to {reference} ({analysis.unit}), paired by seed; ← better")
        right[0].set_title(f"Difference to {reference}, mean and 95 % CI")
    return figure


def _bars(mean: float, interval: Interval | None) -> list[list[float]] | None:
    return [[mean - interval.low], [interval.high - mean]] if interval else None


def _draw_band(
    axes: Axes, its: Look, curves: Sequence[Curve], axis: str, end: float, *, name: str, alpha: float, **line: Any
) -> list[float]:
    """Draw the mean of curves, and a band from the lowest to the highest; gives the heights after the warm-up."""
    x, mean, low, high = band(curves, axis, end)
    axes.plot(x, mean, **its.of_line, markevery=max(1, len(x) // 8), **{"label": f"_{name}", **line})
    axes.fill_between(x, low, high, color=its.colour, alpha=alpha, linewidth=0, label=f"_{name}: lowest to highest")
    return [*low[x >= WARM_UP * end], *high[x >= WARM_UP * end]]


def curves(analysis: Analysis) -> Figure:
    """Loss against tokens, FLOPs and seconds: lines for training, marks for validation, bands from seed to seed."""
    by_tokens = analysis.metric == "val_loss"  # per token, so that training and validation share an axis
    figure, axes_of = panels(3, 4.2, sharey=True)
    drawn: list[float] = []
    trained = {
        arm.name: [c for run in arm.runs.values() if (c := run.curve("train/loss")).tokens.size]
        for arm in analysis.arms
    }
    labels = {"tokens": "tokens", "flops": "FLOPs", "seconds": "seconds of training"}
    for axes, (axis, label) in zip(axes_of, labels.items(), strict=True):
        end = max((float(getattr(curve, axis)[-1]) for found in trained.values() for curve in found), default=0.0)
        for arm in analysis.arms:
            its = _looks(analysis)[arm.name]
            if trained[arm.name] and by_tokens:
                drawn += _draw_band(axes, its, trained[arm.name], axis, end, name=arm.name, alpha=0.15)
            validated = [c for run in arm.runs.values() if (c := analysis.validation_curve(run)).tokens.size]
            if validated and len({len(curve.loss) for curve in validated}) == 1:
                at, loss = (np.mean([getattr(curve, name) for curve in validated], axis=0) for name in (axis, "loss"))
                line = "none" if by_tokens else its.line
                style: Any = {"linestyle": line, "markersize": 7, "markeredgecolor": "white"}
                axes.plot(at, loss, **its.of_marks, **style, label=f"_{arm.name}: validation")
                drawn += list(loss[at >= WARM_UP * end])
            axes.plot([], [], **its.of_line, marker=its.marker, label=arm.name)
        axes.set_xlabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.set_xlim(0, 1.02 * end or None)
    if drawn:
        margin = 0.05 * (max(drawn) - min(drawn)) or 0.01
        axes_of[0].set_ylim(min(drawn) - margin, max(drawn) + margin)
    axes_of[0].set_ylabel(f"loss ({analysis.unit})")
    lines = "Lines: training loss, band from the lowest to the highest seed; marks: validation loss"
    figure.suptitle(lines if by_tokens else "Validation, mean over seeds")
    legend(axes_of[-1], where="upper right")
    return figure


def differences(analysis: Analysis) -> Figure | None:
    """Training loss minus the reference's at the same tokens, paired by seed; None where nothing can be paired."""
    reference = analysis.reference
    if reference is None or analysis.metric != "val_loss":
        return None
    figure, (axes,) = panels(1, 3.6)
    axes.axhline(0, color="#444444", linewidth=1)
    drawn: list[float] = []
    for arm in analysis.arms:
        seeds = [seed for seed in arm.runs if seed in reference.runs and arm is not reference]
        curves = [[runs[seed].curve("train/loss") for runs in (arm.runs, reference.runs)] for seed in seeds]
        paired = [found for ours, theirs in curves if (found := _difference(ours, theirs)).tokens.size]
        if paired:
            its, end = _looks(analysis)[arm.name], max(float(curve.tokens[-1]) for curve in paired)
            style: Any = {"name": arm.name, "alpha": 0.18, "marker": its.marker, "label": arm.name}
            drawn += _draw_band(axes, its, paired, "tokens", end, **style)
    if not drawn:
        return None
    margin = 0.1 * (max(*drawn, 0) - min(*drawn, 0)) or 0.01
    axes.set_ylim(min(*drawn, 0) - margin, max(*drawn, 0) + margin)
    axes.set_xlim(0, None)
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.set(xlabel="tokens", ylabel=f"training loss − {reference.name} ({analysis.unit})")
    axes.set_title(f"Training loss minus that of {reference.name} on the same tokens; band: seeds; below 0 is better")
    legend(axes)
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


def learning_rates(analysis: Analysis) -> Figure | None:
    """Final loss against the peak learning rate: a line for arms that differ in nothing else, its best marked.

    A panel for each parametrization, so that one sees whether the best rate stays. None if the rate alone never varies.
    """
    if LR not in analysis.different:
        return None
    others = {path: values for path, values in analysis.different.items() if path != LR}
    is_parametrized = any(path.startswith("parametrization.") for path in others)
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for index, arm in enumerate(analysis.arms):
        panel = option_of("parametrization", arm.first.config) if is_parametrized else ""
        line = " ".join(_telling({path: column[index] for path, column in others.items()}, others))
        if isinstance(rate := arm.first.config.get("optimizer", {}).get("lr"), int | float):
            found.setdefault(panel, {}).setdefault(line, []).append((float(rate), analysis.mean(arm)))
    found = {panel: {k: sorted(v) for k, v in lines.items() if len(v) > 1} for panel, lines in found.items()}
    found = {panel: lines for panel, lines in found.items() if lines}
    if not found:
        return None
    looks = {line: look(index) for index, line in enumerate(dict.fromkeys(k for p in found.values() for k in p))}
    figure, axes_of = panels(len(found), 4.2, WIDTH if len(found) > 1 else 6.5, sharey=True)
    for axes, (panel, lines) in zip(axes_of, found.items(), strict=True):
        for line, points in lines.items():
            its, best = looks[line], min(points, key=lambda point: point[1])
            label = f"{line or 'loss'}: best {best[0]:.2g}"
            axes.plot(*zip(*points, strict=True), **its.of_line, marker=its.marker, markersize=5, label=label)
            star: Any = {"markersize": 12, "markeredgecolor": "#000000", "label": f"_{line or 'loss'}: best"}
            axes.plot(*best, ls="", **its.of_marks, **star)
        axes.set_xscale("log", base=2)
        rates = sorted({rate for points in lines.values() for rate, _ in points})
        axes.set_xticks(rates, [f"{rate:.2g}" for rate in rates])
        axes.set_xlabel("peak learning rate")
        axes.set_title(f"{panel}: final loss by learning rate" if panel else "Final loss by learning rate")
    legend(*axes_of)
    losses = [[loss for _, loss in points] for lines in found.values() for points in lines.values()]
    lowest, highest = min(map(min, losses)), max(map(min, losses))
    top = min(max(map(max, losses)), highest + max(2 * (highest - lowest), 1.0))  # rates far too high are cut off
    margin = 0.08 * (top - lowest) or 0.1
    axes_of[0].set_ylim(lowest - margin, top + margin)
    axes_of[0].set_ylabel(f"final loss ({analysis.unit}), mean over seeds")
    return figure


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
    return [setting(path, values[path]) for path in kept]


def pareto(analysis: Analysis) -> Figure | None:
    """Final loss against costs of inference, lower is better; the line joins the arms that no other beats in both.

    Costs in which the arms differ by less than 1 % are left out; None if all are.
    """
    labels = {"cache_bytes_per_token": "cache (bytes per token)", "parameters": "parameters"}
    costs = {label: _means(analysis, name) for name, label in labels.items()}
    speeds = _means(analysis, "decode_tokens_per_second")
    costs["decoding (ms per token)"] = {arm: 1000 / speed for arm, speed in speeds.items()}
    shown = {k: cost for k, cost in costs.items() if len(cost) > 1 and max(cost.values()) > 1.01 * min(cost.values())}
    if not shown:
        return None
    figure, axes_of = panels(len(shown), 4, WIDTH if len(shown) > 1 else 6.5, sharey=True)
    for axes, (label, cost) in zip(axes_of, shown.items(), strict=True):
        arms = [arm for arm in analysis.ranking if arm.name in cost]
        points = [(cost[arm.name], analysis.mean(arm)) for arm in arms]
        line: Any = {"color": "#999999", "linewidth": 1.2, "zorder": 0, "drawstyle": "steps-post", "label": "_front"}
        axes.plot(*zip(*pareto_front(points), strict=True), **line)
        for arm, (x, y) in zip(arms, points, strict=True):
            its = _looks(analysis)[arm.name]
            bars: Any = {"yerr": _bars(y, analysis.interval(arm)), "capsize": 4, "label": arm.name}
            axes.errorbar([x], [y], ls="", **its.of_marks, markersize=9, **bars)
        axes.set_xlabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.margins(x=0.15)
    legend(*axes_of)
    axes_of[0].set_ylabel(f"final loss ({analysis.unit}), 95 % CI over seeds")
    figure.suptitle("Lower left is better; the line is the Pareto front")
    return figure


def _means(analysis: Analysis, name: str) -> dict[str, float]:
    return {arm.name: mean for arm in analysis.arms if (mean := arm.mean(name))}


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats in both coordinates, from left to right."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front
