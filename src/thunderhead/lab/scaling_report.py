"""The report of a scaling law: report.html, law.json, results.csv, PNG figures, the answer on the terminal."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
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
from thunderhead.lab import looks, page, scaling_figures
from thunderhead.lab.arms import percent
from thunderhead.lab.page import NONE, Rows, interval, number
from thunderhead.lab.parabolas import SAME_BUDGET, Point, by_budget
from thunderhead.lab.runs import Failure, Run
from thunderhead.lab.scaling import Fit, Prediction, fit
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
    left_out = [*failures, *(Failure(run.folder.name, run.unfinished) for run in runs if run.unfinished is not None)]
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

    (folder / "law.json").unlink(missing_ok=True)  # an earlier report's
    if found is not None:
        record.write_json(folder / "law.json", to_json(found, predictions, warnings))
    rows = [
        point._asdict() | {"predicted": _predicted(found, point), "held_out": point.flops > most, "folder": place}
        for place, point in points.items()
    ]
    page.write_csv(folder / "results.csv", [*Point._fields, "predicted", "held_out", "folder"], rows)
    path = page.write(
        folder,
        "scaling.html.jinja",
        title="Scaling law" if found is not None else "No scaling law",
        subtitle=f"{len(finished)} finished runs, {len(held_out)} of them held out",
        answers=answers,
        warnings=warnings,
        parameters=_parameters(found) if found is not None else Rows(),
        optima=_optima(found, predictions) if found is not None else Rows(),
        runs=_runs(found, list(points.values()), most),
        left_out=left_out,
        drawn=_draw(found, predictions),
    )
    if not quiet:
        console = Console(highlight=False)
        console.print("\n[bold]Scaling law[/]")
        page.tell(console, [("cyan", answer) for answer in answers], warnings, left_out, "fitted")
        console.print(f"[cyan]report[/] {escape(str(path))}", soft_wrap=True)
    return path


def to_json(found: Fit, predictions: Sequence[Prediction], warnings: Sequence[str]) -> dict[str, Any]:
    """The content of law.json: the law, which budgets read, and what else was found."""
    powers = {"a": found.isoflop.parameters, "b": found.isoflop.tokens}
    return {
        "law": asdict(found.law),
        "intervals": {name: list(interval) for name, interval in found.intervals.items()},
        "exponents": dict(zip("ab", found.law.exponents, strict=True)),
        "approach_2": {
            "exponents": {name: power.exponent for name, power in powers.items() if power is not None},
            "intervals": {name: list(interval) for name, interval in found.isoflop_intervals.items()},
            "minima": [
                {"flops": p.flops, "parameters": p.parameters, "tokens": p.tokens, "loss": p.loss}
                if not p.problem
                else {"flops": p.flops, "problem": p.problem}
                for p in found.isoflop.parabolas
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
    size = float(counted(run.plan["parameters"], count))
    tokens, flops, loss = (run.number(name) for name in ("tokens", "flops", "val_loss"))
    assert tokens is not None
    assert flops is not None
    assert loss is not None
    return Point(run.folder.name, size, tokens, flops, loss)


def _predicted(found: Fit | None, point: Point) -> float:
    return found.law.loss(point.parameters, point.tokens) if found is not None else np.nan


def _refuse_mixtures(runs: Sequence[Run]) -> None:
    """Losses on other data, or of other tokenizers, do not follow one law."""
    validated = {grouping.validation_data(run) for run in runs}
    if len(validated) > 1:
        raise ValueError(
            f"no scaling law: the runs were validated on {len(validated)} different token sequences (data or tokenizer)"
        )


def _differences(runs: Sequence[Run]) -> list[str]:
    """What else differs between the runs than size and budget."""
    different = grouping.differences(run.config for run in runs)
    others = [path for path in different if not any(path == s or path.startswith(f"{s}.") for s in SCALED)]
    return [f"The runs differ in more than size and budget: {', '.join(others)}."] if others else []


# --------------------------------------------------------------------------------------------------------------------
# Words, tables, figures


def _answers(found: Fit, predictions: Sequence[Prediction]) -> list[str]:
    law = found.law
    flops = max((p.point.flops for p in predictions), default=law.flops[1])
    best = law.optimum(flops)
    sizes = found.interval(lambda resampled: resampled.optimum(flops).parameters)
    by_parabolas = ""
    if found.isoflop.parameters is not None:
        power = f"C^{found.isoflop.parameters.exponent:.2f} {_in_brackets(found.isoflop_intervals.get('a'))}"
        by_parabolas = f"; N as {power}, by parabolas"
    sentences = [
        f"At C = {flops:.3g} FLOPs the optimum is N = {quantity(best.parameters)} parameters "
        f"({quantity(sizes.low)} … {quantity(sizes.high)}), D = {quantity(best.tokens)} tokens "
        f"({best.tokens / best.parameters:.3g} per parameter), with a predicted loss of {best.loss:.3f} nats.",
        f"The optimal N grows as C^{law.exponents[0]:.2f} {_in_brackets(found.intervals['a'])}, D as "
        f"C^{law.exponents[1]:.2f} {_in_brackets(found.intervals['b'])}, by L(N, D){by_parabolas}.",
    ]
    for p in predictions:
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
    powers = {"a": found.isoflop.parameters, "b": found.isoflop.tokens}
    rows = [
        (
            what,
            f"{value:.4g}",
            interval(found.intervals[name], ".4g"),
            f"{power.exponent:.4g}" if (power := powers.get(name)) is not None else NONE,
            interval(found.isoflop_intervals.get(name), ".4g"),
        )
        for name, (what, value) in names.items()
    ]
    columns = ("", "approach 3: L(N, D)", "95 % CI", "approach 2: parabolas", "95 % CI")
    caption = (
        f"N counts {law.count} parameters; training FLOPs per token = {law.flops_coefficient:.3g} · "
        f"N^{law.flops_exponent:.3f}, fitted to the runs."
    )
    return Rows(columns, rows, caption)


def _optima(found: Fit, predictions: Sequence[Prediction]) -> Rows:
    minima: dict[float, list[str]] = dict.fromkeys((p.point.flops for p in predictions), [NONE] * 3)
    by_parabola = {
        p.flops: [NONE] * 3 if p.problem else [quantity(p.parameters), quantity(p.tokens), f"{p.loss:.3f}"]
        for p in found.isoflop.parabolas
    }
    rows = []
    for flops, minimum in (by_parabola | minima).items():
        best = found.law.optimum(flops)
        shown = [quantity(best.parameters), quantity(best.tokens), f"{best.tokens / best.parameters:.3g}"]
        rows.append([f"{flops:.3g}", *shown, f"{best.loss:.3f}", *minimum])
    columns = ("training FLOPs", "N", "D", "D / N", "loss", "N by parabola", "D by parabola", "loss by parabola")
    return Rows(columns, rows, "The best use of each budget.")


def _runs(found: Fit | None, points: Sequence[Point], most: float) -> Rows:
    rows = []
    for p in (point for group in by_budget(points) for point in group):
        predicted = _predicted(found, p) if found is not None else None
        rows.append(
            [
                p.name + " (held out)" * (p.flops > most),
                f"{p.parameters:,.0f}",
                f"{p.tokens:,.0f}",
                f"{p.tokens / p.parameters:.3g}",
                f"{p.flops:.3g}",
                f"{p.loss:.4f}",
                number(predicted, ".4f"),
                NONE if predicted is None else percent(p.loss / predicted - 1, 2),
            ]
        )
    columns = ("run", "N", "D", "D / N", "training FLOPs", "measured loss", "predicted", "measured − predicted")
    return Rows(columns, rows)


def _draw(found: Fit | None, predictions: Sequence[Prediction]) -> dict[str, tuple[str, Figure | None]]:
    drawn: dict[str, tuple[str, Callable[[Fit], Figure]]] = {
        "isoflop": ("Loss against size at equal compute, and the optima", scaling_figures.isoflop),
        "law": ("Predicted loss over N and D", lambda fit: scaling_figures.contours(fit, predictions)),
        "predictions": ("Measured against predicted loss", lambda fit: scaling_figures.predictions(fit, predictions)),
    }
    with mpl.rc_context(looks.style()):
        return {name: (caption, draw(found) if found else None) for name, (caption, draw) in drawn.items()}
