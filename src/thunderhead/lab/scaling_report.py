"""The report of a scaling law: report.html, law.json, results.csv, PNG figures, the answer on the terminal."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from thunderhead.core.types import Count, counted
from thunderhead.lab import arms as grouping
from thunderhead.lab import page
from thunderhead.lab.arms import percent
from thunderhead.lab.jobs import Plan
from thunderhead.lab.page import NONE, Rows, interval, number
from thunderhead.lab.parabolas import SAME_BUDGET, Parabola, Point, by_budget
from thunderhead.lab.runs import Failure, Run
from thunderhead.lab.scaling import Fit, fit
from thunderhead.lab.scaling_figures import FIGURES
from thunderhead.lab.statistics import Interval
from thunderhead.terminal import Console, quantity, say
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
        forms=_forms(found) if found else Rows(),
        runs=_runs(found, list(points.values()), most),
        left_out=left_out,
        figures=FIGURES,
        of=found,
    )
    console = Console(highlight=False)
    console.print("\n[bold]Scaling law[/]")
    page.tell(console, [("cyan", answer) for answer in answers], warnings, left_out, how="fitted", report=path)
    return path


def tell_predictions(runs: Sequence[Run], planned: Mapping[str, Plan], *, count: Count) -> None:
    """Say what larger runs will come to, by name, and why, before they are trained."""
    finished = [run for run in runs if run.unfinished is None]
    try:
        _refuse_mixtures(finished)
        found = fit([_point(run, count) for run in finished], count=count)
    except ValueError as error:
        say(str(error))
        return
    if told := tell_forms(found):
        say(told)
    for name, plan in planned.items():
        parameters = float(counted(plan.parameters, count))
        p = found.predict(Point(name, parameters, plan.tokens, plan.flops, math.nan))
        say(f"Predicted for {name}: {p.loss:.3f} nats ({p.interval.low:.3f} … {p.interval.high:.3f})")


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
        "forms": [
            {"name": form.name, "formula": form.formula, "errors_on_largest_budget": form.errors}
            for form in found.candidates
        ],
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
    return found.loss(point.parameters, point.tokens) if found else math.nan


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
    predicted = found.predict(Point("", best.parameters, best.tokens, flops, math.nan))
    by_parabolas = ""
    if power := found.isoflop.powers.get("a"):
        by_parabolas = f"; N as C^{power.exponent:.2f} {_in_brackets(found.isoflop_intervals.get('a'))}, by parabolas"
    sentences = [
        f"At C = {flops:.3g} FLOPs the optimum is N = {quantity(best.parameters)} parameters "
        f"({quantity(sizes.low)} … {quantity(sizes.high)}), D = {quantity(best.tokens)} tokens "
        f"({best.tokens / best.parameters:.3g} per parameter), with a predicted loss of {predicted.loss:.3f} nats "
        f"({predicted.interval.low:.3f} … {predicted.interval.high:.3f}).",
        f"The optimal N grows as C^{law.exponents[0]:.2f} {_in_brackets(found.intervals['a'])}, D as "
        f"C^{law.exponents[1]:.2f} {_in_brackets(found.intervals['b'])}, by L(N, D){by_parabolas}.",
    ]
    if told := tell_forms(found):
        sentences.append(told)
    for p in found.predictions:
        inside = "inside" if p.interval.low <= p.point.loss <= p.interval.high else "outside of"
        sentences.append(
            f"The held-out run of {quantity(p.point.parameters)} parameters on {quantity(p.point.tokens)} tokens "
            f"({p.point.flops:.3g} FLOPs, {p.point.flops / law.flops[1]:.1f} × the largest fitted) was predicted "
            f"{p.loss:.3f}, measured {p.point.loss:.3f}: {percent(p.error)}, {inside} the 95 % prediction interval "
            f"{p.interval.low:.3f} … {p.interval.high:.3f}."
        )
    return sentences


def tell_forms(found: Fit) -> str:
    """How well each form predicted the largest budget from the others, and which one predicts from now on."""
    tried = [form for form in found.candidates if form.errors]
    if not tried:
        return ""
    misses = ", ".join(f"{form.name} {percent(form.mean_error)}" for form in tried)
    return (
        f"Fitted without the largest budget, its runs came out off by {misses}: losses are predicted by the form "
        f"{tried[0].name}."
    )


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


def _forms(found: Fit) -> Rows:
    """Of each form, how it did on the largest budget, and what it says of the held-out runs."""
    rows = []
    for form in found.candidates:
        mean = percent(form.mean_error, 2) if form.errors else NONE
        said = [f"{form.loss(p.parameters, p.tokens):.3f}" for p in found.held_out]
        rows.append([form.name, form.formula, mean, f"{form.miss:.2%}" if form.errors else NONE, *said])
    columns = ("form", "", "largest budget, left out: mean error", "root mean square")
    held_out = tuple(f"of the held-out run (measured {p.loss:.3f})" for p in found.held_out)
    return Rows((*columns, *held_out), rows, "The first predicts losses; all are in the prediction interval.")


def _optima(found: Fit) -> Rows:
    """At the budgets of the parabolas, and of what was held out, which has none."""
    budgets: dict[float, Parabola | None] = {p.flops: p for p in found.isoflop.parabolas}
    rows = []
    for flops, parabola in (budgets | dict.fromkeys(point.flops for point in found.held_out)).items():
        best, minimum = found.law.optimum(flops), [NONE] * 3
        if parabola and not parabola.problem:
            minimum = [quantity(parabola.parameters), quantity(parabola.tokens), f"{parabola.loss:.3f}"]
        shown = [quantity(best.parameters), quantity(best.tokens), f"{best.tokens / best.parameters:.3g}"]
        loss = found.loss(best.parameters, best.tokens)
        rows.append([f"{flops:.3g}", *shown, f"{loss:.3f}", *minimum])
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
