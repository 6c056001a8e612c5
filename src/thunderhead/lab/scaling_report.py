"""The report of a scaling law: report.html, law.json, results.csv, PNG figures, the answer on the terminal."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter
from rich.console import Console

from thunderhead.core.types import Count, counted
from thunderhead.lab import arms as grouping
from thunderhead.lab import page
from thunderhead.lab.arms import percent
from thunderhead.lab.looks import COLOURS, look, panels
from thunderhead.lab.page import NONE, Rows, interval, number
from thunderhead.lab.runs import Failure, Run
from thunderhead.lab.scaling import SAME_BUDGET, Fit, Parabola, Point, by_budget, fit
from thunderhead.lab.statistics import Interval
from thunderhead.terminal import quantity
from thunderhead.training import record

SCALED = ("model", "budget", "optimizer.lr", "batch", "scheduler", "validation", "trainer", "data.path")
"""What may differ between the runs of a law: size, budget, and what is chosen for them."""
MEASURED, PREDICTED = "#000000", "#D55E00"
LEVELS = 12
"""Contour lines of the loss."""


def write_law_report(
    folder: Path,
    runs: Sequence[Run],
    *,
    count: Count,
    fit_up_to: float | None = None,
    failures: Sequence[Failure] = (),
    notes: Sequence[str] = (),
) -> Path:
    """Fit a scaling law to runs and write what was found into a folder, replacing an earlier report there.

    The folder gets report.html, whose path is returned, results.csv, and with a law law.json and figures/*.png. Where
    the runs cannot tell a law, the report says why and lists them. Unfinished runs are listed, not fitted.

    N counts the parameters of `count`. Runs with more training FLOPs than `fit_up_to` are held out: predicted by the
    law, and not fitted. `failures` and `notes` are those of `thunderhead.lab.report.write_report`.
    """
    left_out = [*failures, *(Failure(run.folder.name, run.unfinished) for run in runs if run.unfinished is not None)]
    finished = [run for run in runs if run.unfinished is None]
    most = math.inf if fit_up_to is None else fit_up_to * SAME_BUDGET
    points = {run.folder: _point(run, count) for run in finished}
    held_out = [point for point in points.values() if point.flops > most]
    found, answers = None, []
    try:
        _refuse_mixtures(finished)
        found = fit([p for p in points.values() if p not in held_out], count=count, held_out=held_out)
    except ValueError as error:
        answers = [str(error)]
    warnings = [*notes, *(found.warnings if found else []), *_differences(finished)]

    (folder / "law.json").unlink(missing_ok=True)  # an earlier report's
    if found:
        answers = _answers(found)
        record.write_json(folder / "law.json", to_json(found, warnings))
    rows = [
        point._asdict() | {"predicted": _predicted(found, point), "held_out": point.flops > most, "folder": place}
        for place, point in points.items()
    ]
    record.write_rows(folder / "results.csv", [*Point._fields, "predicted", "held_out", "folder"], rows)
    path = page.write(
        folder,
        "scaling.html.jinja",
        title="Scaling law" if found else "No scaling law",
        subtitle=f"{len(finished)} finished runs, {len(held_out)} of them held out",
        answers=[("open", "", answer) for answer in answers],
        no_answer="",
        warnings=warnings,
        parameters=_parameters(found) if found else Rows(),
        optima=_optima(found) if found else Rows(),
        runs=_runs(found, list(points.values()), most),
        left_out=left_out,
        figures=FIGURES,
        of=found,
    )
    console = Console(highlight=False)
    console.print("\n[bold]Scaling law[/]")
    page.tell(console, [("cyan", answer) for answer in answers], warnings, left_out, how="fitted", report=path)
    return path


def to_json(found: Fit, warnings: Sequence[str]) -> dict[str, Any]:
    """The content of law.json: the law, which budgets read, and what else was found."""
    minima = [
        {"flops": p.flops, "problem": p.problem}
        if p.problem
        else {name: getattr(p, name) for name in ("flops", "parameters", "tokens", "loss")}
        for p in found.isoflop.parabolas
    ]
    return {
        "law": asdict(found.law),
        "intervals": found.intervals,
        "exponents": dict(zip("ab", found.law.exponents, strict=True)),
        "approach_2": {
            "exponents": {name: power.exponent for name, power in found.isoflop.powers.items()},
            "intervals": found.isoflop_intervals,
            "minima": minima,
        },
        "held_out": [
            p.point._asdict() | {"predicted": p.loss, "interval": p.interval, "error": p.error}
            for p in found.predictions
        ],
        "fitted": [point._asdict() for point in found.points],
        "warnings": list(warnings),
    }


# --- runs -------------------------------------------------------------------------------------------------------------


def _point(run: Run, count: Count) -> Point:
    """Of a finished run, which has all of these numbers."""
    tokens, flops, loss = (float(run.result(name)) for name in ("tokens", "flops", "val_loss"))
    return Point(run.folder.name, float(counted(run.plan["parameters"], count)), tokens, flops, loss)


def _predicted(found: Fit | None, point: Point) -> float:
    return found.law.loss(point.parameters, point.tokens) if found else np.nan


def _refuse_mixtures(runs: Sequence[Run]) -> None:
    """Losses on other data, or of other tokenizers, do not follow one law."""
    n = len({grouping.validation_data(run) for run in runs})
    if n > 1:
        raise ValueError(
            f"no scaling law: the runs were validated on {n} different token sequences (data, tokenizer or context)"
        )


def _differences(runs: Sequence[Run]) -> list[str]:
    different = grouping.differences(run.config for run in runs)
    others = [path for path in different if not grouping.is_in(path, SCALED)]
    return [f"The runs differ in more than size and budget: {', '.join(others)}."] if others else []


# --- words and tables -------------------------------------------------------------------------------------------------


def _answers(found: Fit) -> list[str]:
    law = found.law
    flops = max((point.flops for point in found.held_out), default=law.flops[1])
    best = law.optimum(flops)
    sizes = found.interval(lambda resampled: resampled.optimum(flops).parameters)
    by_parabolas = ""
    if power := found.isoflop.powers.get("a"):
        by_parabolas = f"; N as C^{power.exponent:.2f} {_in_brackets(found.isoflop_intervals.get('a'))}, by parabolas"
    sentences = [
        f"At C = {flops:.3g} FLOPs the optimum is N = {quantity(best.parameters)} parameters "
        f"({quantity(sizes.low)} … {quantity(sizes.high)}), D = {quantity(best.tokens)} tokens "
        f"({best.tokens / best.parameters:.3g} per parameter), with a predicted loss of {best.loss:.3f} nats.",
        f"The optimal N grows as C^{law.exponents[0]:.2f} {_in_brackets(found.intervals['a'])}, D as "
        f"C^{law.exponents[1]:.2f} {_in_brackets(found.intervals['b'])}, by L(N, D){by_parabolas}.",
    ]
    for p in found.predictions:
        inside = "inside" if p.interval.low <= p.point.loss <= p.interval.high else "outside of"
        sentences.append(
            f"The held-out run of {quantity(p.point.parameters)} parameters on {quantity(p.point.tokens)} tokens "
            f"({p.point.flops:.3g} FLOPs, {p.point.flops / law.flops[1]:.1f} × the largest fitted) was predicted "
            f"{p.loss:.3f}, measured {p.point.loss:.3f}: {percent(p.error)}, {inside} the 95 % prediction interval "
            f"{p.interval.low:.3f} … {p.interval.high:.3f}."
        )
    return sentences


def _in_brackets(found: Interval | None) -> str:
    return f"({interval(found, '.2f')})" if found else "(no interval)"


def _parameters(found: Fit) -> Rows:
    law = found.law
    names = {
        "E": ("E: loss that remains", law.E),
        "A": ("A: of A / N^α", law.A),
        "B": ("B: of B / D^β", law.B),
        "alpha": ("α", law.alpha),
        "beta": ("β", law.beta),
        "a": ("a: optimal N ∝ C^a", law.exponents[0]),
        "b": ("b: optimal D ∝ C^b", law.exponents[1]),
    }
    powers, intervals = found.isoflop.powers, found.isoflop_intervals
    rows = [
        (
            *(what, f"{value:.4g}", interval(found.intervals[name], ".4g")),
            *(number(powers[name].exponent if name in powers else None, ".4g"), interval(intervals.get(name), ".4g")),
        )
        for name, (what, value) in names.items()
    ]
    columns = ("", "approach 3: L(N, D)", "95 % CI", "approach 2: parabolas", "95 % CI")
    caption = (
        f"N counts {law.count} parameters; training FLOPs per token = {law.flops_coefficient:.3g} · "
        f"N^{law.flops_exponent:.3f}, fitted to the runs."
    )
    return Rows(columns, rows, caption)


def _optima(found: Fit) -> Rows:
    """At the budgets of the parabolas, and of what was held out, which has none."""
    budgets: dict[float, Parabola | None] = {p.flops: p for p in found.isoflop.parabolas}
    rows = []
    for flops, parabola in (budgets | dict.fromkeys(point.flops for point in found.held_out)).items():
        best, minimum = found.law.optimum(flops), [NONE] * 3
        if parabola and not parabola.problem:
            minimum = [quantity(parabola.parameters), quantity(parabola.tokens), f"{parabola.loss:.3f}"]
        shown = [quantity(best.parameters), quantity(best.tokens), f"{best.tokens / best.parameters:.3g}"]
        rows.append([f"{flops:.3g}", *shown, f"{best.loss:.3f}", *minimum])
    columns = ("training FLOPs", "N", "D", "D / N", "loss", "N by parabola", "D by parabola", "loss by parabola")
    return Rows(columns, rows, "The best use of each budget.")


def _runs(found: Fit | None, points: Sequence[Point], most: float) -> Rows:
    columns: dict[str, Callable[[Point], str]] = {
        "run": lambda p: p.name + " (held out)" * (p.flops > most),
        "N": lambda p: f"{p.parameters:,.0f}",
        "D": lambda p: f"{p.tokens:,.0f}",
        "D / N": lambda p: f"{p.tokens / p.parameters:.3g}",
        "training FLOPs": lambda p: f"{p.flops:.3g}",
        "measured loss": lambda p: f"{p.loss:.4f}",
        "predicted": lambda p: f"{_predicted(found, p):.4f}" if found else NONE,
        "measured − predicted": lambda p: percent(p.loss / _predicted(found, p) - 1, 2) if found else NONE,
    }
    return page.table([point for group in by_budget(points) for point in group], columns)


# --- pictures ---------------------------------------------------------------------------------------------------------


def _draw_isoflop(fit: Fit) -> Figure:
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


def _draw_contours(fit: Fit) -> Figure:
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


def _draw_predictions(fit: Fit) -> Figure:
    """Measured against predicted loss, and the misses."""
    figure, (left, right) = panels(2, 4)
    predicted = np.array([fit.law.loss(p.parameters, p.tokens) for p in fit.points])
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
    "isoflop": ("Loss against size at equal compute, and the optima", _draw_isoflop),
    "law": ("Predicted loss over N and D", _draw_contours),
    "predictions": ("Measured against predicted loss", _draw_predictions),
}
