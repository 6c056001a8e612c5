"""The report of a scaling law: report.html, law.json, results.csv, PNG figures, the answer on the terminal."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape

from thunderhead.core.terminal import quantity
from thunderhead.core.types import Count, counted
from thunderhead.lab import arms as grouping
from thunderhead.lab import figures, scaling_figures
from thunderhead.lab.report import NONE, Rows, render, save_figure
from thunderhead.lab.runs import Failure, Run
from thunderhead.lab.scaling import SAME_BUDGET, Fit, Point, Prediction, by_budget, fit
from thunderhead.lab.statistics import Interval
from thunderhead.training import record

SCALED = ("model", "budget", "optimizer.lr", "batch", "scheduler", "validation", "trainer", "data.path")
"""What may differ between the runs of a law: size, budget, and what is chosen for them."""


def write_law_report(
    folder: Path,
    runs: Sequence[Run],
    *,
    count: Count,
    fit_up_to: float | None = None,
    failures: Sequence[Failure] = (),
    notes: Sequence[str] = (),
    quiet: bool = False,
) -> Path:
    """Fit a scaling law to runs and write what was found into a folder, replacing an earlier report there.

    Where the runs cannot tell a law, the report says why and lists them.

    Args:
        folder: gets report.html, results.csv, and with a law law.json and figures/*.png.
        runs: from `thunderhead.lab.runs.read_runs`; unfinished ones are listed, not fitted.
        count: which parameters N counts.
        fit_up_to: training FLOPs; runs with more are held out: predicted by the law, and not fitted. None = all are
            fitted.
        failures: runs without a result and without a record that says so.
        notes: sentences of the caller's for the top of the report.
        quiet: say nothing on the terminal.

    Returns:
        The path of report.html.
    """
    left_out = [*failures, *(Failure(_name(run), str(run.unfinished)) for run in runs if run.unfinished is not None)]
    finished = [run for run in runs if run.unfinished is None]
    most = math.inf if fit_up_to is None else fit_up_to * SAME_BUDGET
    points = {run.folder: _point(run, count) for run in finished}
    held_out = [point for point in points.values() if point.flops > most]
    found, why_not = None, ""
    try:
        _refuse_mixtures(finished)
        found = fit([point for point in points.values() if point.flops <= most], count=count)
    except ValueError as error:
        why_not = str(error)
    predictions = [found.predict(point) for point in held_out] if found is not None else []
    answers = _answers(found, predictions) if found is not None else [why_not]
    warnings = [*notes, *(found.warnings if found is not None else []), *_differences(finished)]

    pictures = _write_figures(folder / "figures", found, predictions)
    _write_csv(folder / "results.csv", found, points, most)
    (folder / "law.json").unlink(missing_ok=True)  # an earlier report's
    if found is not None:
        record.write_json(folder / "law.json", to_json(found, predictions, warnings))
    page = render(
        "scaling.html.jinja",
        title="Scaling law" if found is not None else "No scaling law",
        subtitle=f"{len(finished)} finished runs, {len(held_out)} of them held out · "
        f"{datetime.now():%Y-%m-%d %H:%M} · Thunderhead",
        answers=answers,
        warnings=warnings,
        figures=pictures,
        parameters=_parameters(found) if found is not None else Rows((), []),
        optima=_optima(found, predictions) if found is not None else Rows((), []),
        runs=_runs(found, points, most),
        failures=Rows(("run", "why"), [(failure.run, failure.reason) for failure in left_out]),
    )
    path = folder / "report.html"
    record.write_text(path, page)
    if not quiet:
        _show(answers, warnings, left_out, path)
    return path


def to_json(found: Fit, predictions: Sequence[Prediction], warnings: Sequence[str]) -> dict[str, Any]:
    """The content of law.json: the law, which budgets read, and what else was found."""
    isoflop = found.isoflop
    return {
        "law": asdict(found.law),
        "intervals": {name: list(interval) for name, interval in found.intervals.items()},
        "exponents": dict(zip("ab", found.law.exponents, strict=True)),
        "approach_2": {
            "exponents": {
                name: power.exponent
                for name, power in (("a", isoflop.parameters), ("b", isoflop.tokens))
                if power is not None
            },
            "intervals": {name: list(interval) for name, interval in found.isoflop_intervals.items()},
            "minima": [
                {"flops": p.flops, "parameters": p.parameters, "tokens": p.tokens, "loss": p.loss}
                if not p.problem
                else {"flops": p.flops, "problem": p.problem}
                for p in isoflop.parabolas
            ],
        },
        "held_out": [
            p.point._asdict() | {"predicted": p.loss, "interval": list(p.interval), "error": p.error}
            for p in predictions
        ],
        "fitted": [point._asdict() for point in found.points],
        "warnings": list(warnings),
    }


# --------------------------------------------------------------------------------------------------------------------
# Runs


def _point(run: Run, count: Count) -> Point:
    results = run.results
    return Point(
        _name(run),
        float(counted(run.plan["parameters"], count)),
        float(results["tokens"]),
        float(results["flops"]),
        float(results["val_loss"]),
    )


def _name(run: Run) -> str:
    return run.folder.name


def _refuse_mixtures(runs: Sequence[Run]) -> None:
    """Losses on other data, or of other tokenizers, do not follow one law."""
    validated = {grouping.validation_data(run) for run in runs}
    if len(validated) > 1:
        raise ValueError(
            f"no scaling law: the runs were validated on {len(validated)} different token sequences (data or tokenizer)"
        )


def _differences(runs: Sequence[Run]) -> list[str]:
    """What else differs between the runs than size and budget."""
    different = grouping.differences([run.config for run in runs]) if runs else {}
    others = [path for path in different if not any(path == s or path.startswith(f"{s}.") for s in SCALED)]
    return [f"The runs differ in more than size and budget: {', '.join(others)}."] if others else []


# --------------------------------------------------------------------------------------------------------------------
# Words and tables


def _answers(found: Fit, predictions: Sequence[Prediction]) -> list[str]:
    law = found.law
    flops = max((p.point.flops for p in predictions), default=law.flops[1])
    best = law.optimum(flops)
    sizes = found.interval(lambda resampled: resampled.optimum(flops).parameters)
    sentences = [
        f"At C = {flops:.3g} FLOPs the optimum is N = {quantity(best.parameters)} parameters "
        f"({quantity(sizes.low)} … {quantity(sizes.high)}), D = {quantity(best.tokens)} tokens "
        f"({best.tokens / best.parameters:.3g} per parameter), with a predicted loss of {best.loss:.3f} nats.",
        f"The optimal N grows as C^{law.exponents[0]:.2f} {_in_brackets(found.intervals['a'])}, D as "
        f"C^{law.exponents[1]:.2f} {_in_brackets(found.intervals['b'])}, by L(N, D)"
        + (
            f"; N as C^{found.isoflop.parameters.exponent:.2f} "
            f"{_in_brackets(found.isoflop_intervals.get('a'))}, by parabolas."
            if found.isoflop.parameters is not None
            else "."
        ),
    ]
    for p in predictions:
        percent = f"{100 * p.error:+.1f} %".replace("-", "−")
        inside = "inside" if p.interval.low <= p.point.loss <= p.interval.high else "outside of"
        sentences.append(
            f"The held-out run of {quantity(p.point.parameters)} parameters on {quantity(p.point.tokens)} tokens "
            f"({p.point.flops:.3g} FLOPs, {p.point.flops / law.flops[1]:.1f} × the largest fitted) was predicted "
            f"{p.loss:.3f}, measured {p.point.loss:.3f}: {percent}, {inside} the 95 % prediction interval "
            f"{p.interval.low:.3f} … {p.interval.high:.3f}."
        )
    return sentences


def _in_brackets(interval: Interval | None) -> str:
    return f"({interval.low:.2f} … {interval.high:.2f})" if interval else "(no interval)"


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
    rows = [[what, f"{value:.4g}", _shown(found.intervals[name])] for name, (what, value) in names.items()]
    powers = {"a": found.isoflop.parameters, "b": found.isoflop.tokens}
    for row, name in zip(rows, names, strict=True):
        power = powers.get(name)
        row.append(f"{power.exponent:.4g}" if power is not None else NONE)
        row.append(_shown(found.isoflop_intervals.get(name)))
    columns = ("", "approach 3: L(N, D)", "95 % CI", "approach 2: parabolas", "95 % CI")
    caption = (
        f"N counts {law.count} parameters; training FLOPs per token = {law.flops_coefficient:.3g} · "
        f"N^{law.flops_exponent:.3f}, fitted to the runs."
    )
    return Rows(columns, rows, caption)


def _shown(interval: Interval | None) -> str:
    return f"{interval.low:.4g} … {interval.high:.4g}" if interval else NONE


def _optima(found: Fit, predictions: Sequence[Prediction]) -> Rows:
    rows = []
    for parabola in found.isoflop.parabolas:
        best = found.law.optimum(parabola.flops)
        rows.append(
            [
                f"{parabola.flops:.3g}",
                *(quantity(value) for value in best[:2]),
                f"{best.tokens / best.parameters:.3g}",
                f"{best.loss:.3f}",
                *([NONE] * 3 if parabola.problem else [quantity(parabola.parameters), quantity(parabola.tokens)]),
                *([] if parabola.problem else [f"{parabola.loss:.3f}"]),
            ]
        )
    for flops in dict.fromkeys(p.point.flops for p in predictions):
        best = found.law.optimum(flops)
        shown = [quantity(best.parameters), quantity(best.tokens), f"{best.tokens / best.parameters:.3g}"]
        rows.append([f"{flops:.3g}", *shown, f"{best.loss:.3f}", NONE, NONE, NONE])
    columns = ("training FLOPs", "N", "D", "D / N", "loss", "N by parabola", "D by parabola", "loss by parabola")
    return Rows(columns, rows, "The best use of each budget.")


def _runs(found: Fit | None, points: dict[Path, Point], most: float) -> Rows:
    rows = []
    for group in by_budget(list(points.values())):
        for p in group:
            predicted = found.law.loss(p.parameters, p.tokens) if found is not None else None
            rows.append(
                [
                    p.name + " (held out)" * (p.flops > most),
                    f"{p.parameters:,.0f}",
                    f"{p.tokens:,.0f}",
                    f"{p.tokens / p.parameters:.3g}",
                    f"{p.flops:.3g}",
                    f"{p.loss:.4f}",
                    NONE if predicted is None else f"{predicted:.4f}",
                    NONE if predicted is None else f"{100 * (p.loss / predicted - 1):+.2f} %".replace("-", "−"),
                ]
            )
    columns = ("run", "N", "D", "D / N", "training FLOPs", "measured loss", "predicted", "measured − predicted")
    return Rows(columns, rows)


# --------------------------------------------------------------------------------------------------------------------
# Files and terminal


def _write_figures(folder: Path, found: Fit | None, predictions: list[Prediction]) -> dict[str, dict[str, str]]:
    drawn: dict[str, tuple[str, Figure]] = {}
    with mpl.rc_context(figures.style()):
        if found is not None:
            drawn["isoflop"] = "Loss against size at equal compute, and the optima", scaling_figures.isoflop(found)
            drawn["law"] = "Predicted loss over N and D", scaling_figures.contours(found, predictions)
            drawn["predictions"] = (
                "Measured against predicted loss",
                scaling_figures.predictions(found, predictions),
            )
        pictures: dict[str, dict[str, str]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("isoflop", "law", "predictions"):
            path = folder / f"{name}.png"
            path.unlink(missing_ok=True)  # an earlier report's
            if name in drawn:
                caption, figure = drawn[name]
                pictures[name] = save_figure(figure, path, caption)
    return pictures


def _write_csv(path: Path, found: Fit | None, points: dict[Path, Point], most: float) -> None:
    """A row a finished run."""
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*Point._fields, "predicted", "held_out", "folder"])
    for folder, p in points.items():
        predicted = found.law.loss(p.parameters, p.tokens) if found is not None else np.nan
        writer.writerow([*p, predicted, p.flops > most, folder])
    record.write_text(path, buffer.getvalue())


def _show(answers: Sequence[str], warnings: Sequence[str], left_out: Sequence[Failure], report: Path) -> None:
    console = Console(highlight=False)
    console.print()
    console.print("[bold]Scaling law[/]")
    for sentence in answers:
        console.print(f"[cyan]•[/] {escape(sentence)}", soft_wrap=True)
    for warning in warnings:
        console.print(f"[yellow]read with care:[/] {escape(warning)}", soft_wrap=True)
    for failure in left_out:
        console.print(f"[red]not fitted:[/] {escape(failure.run)}: {escape(failure.reason)}", soft_wrap=True)
    console.print(f"[cyan]report[/] {escape(str(report))}", soft_wrap=True)
