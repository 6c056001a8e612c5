"""The report of an ablation: report.html, results.csv, PNG figures, TensorBoard HParams, a ranking on the terminal."""

import base64
import csv
import io
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import matplotlib as mpl
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.table import Table as TerminalTable
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from thunderhead.core.terminal import quantity, size
from thunderhead.lab import figures, statistics
from thunderhead.lab.analysis import Analysis, Metric, analyse
from thunderhead.lab.arms import Arm, show_value
from thunderhead.lab.costs import CACHE_BYTES, cost_to_reach, kv_cache_bytes_per_token
from thunderhead.lab.runs import Failure, Run
from thunderhead.lab.statistics import ALPHA, Comparison, Interval, signed
from thunderhead.training import record

RESULTS = (
    *("val_loss", "perplexity", "bits_per_byte", "tokens", "steps", "flops", "parameters", "seconds"),
    *("tokens_per_second", "peak_memory_bytes", "decode_tokens_per_second", "precision", "device"),
)
"""Keys of the summary that results.csv has a column for."""
NONE = "–"


class Rows(NamedTuple):
    """A table of the report, as text."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


def write_report(
    folder: Path,
    runs: Sequence[Run],
    *,
    baseline: str | None = None,
    failures: Sequence[Failure] = (),
    notes: Sequence[str] = (),
    names: Mapping[Path, str] | None = None,
    metric: Metric = "auto",
    quiet: bool = False,
) -> Path:
    """Compare runs and write what was found into a folder, replacing an earlier report there.

        runs = read_runs(["logs/sweeps/pretrain/2026-11-24_01-00-00"])
        write_report(folder, runs, baseline="mha", failures=[Failure("mla seed=2", "exit status 1: out of memory")])

    Runs with equal configuration but for the seed are an arm. Only runs that came to the end of their schedule are
    compared; the others are listed. It works with any number of runs, none included.

    Args:
        folder: gets report.html, results.csv, figures/*.png and hparams/.
        runs: from `thunderhead.lab.runs.read_runs`.
        baseline: name of the arm that others are compared with ("mha", or "attention=mha"); None = all pairs of up to
            four arms, and the first arm where there are more.
        failures: runs without a result and without a record that says so.
        notes: sentences of the caller's for the top of the report, as a warning of the tuning.
        names: an arm's name by the folders of its runs; None = from what their configurations differ in.
        metric: what is compared; auto = the validation loss, or bits per byte where tokenizers differ.
        quiet: print no ranking.

    Returns:
        The path of report.html.

    Raises:
        ValueError: no arm is called `baseline`; names those that there are. Nothing was written.
    """
    analysis = analyse(runs, baseline=baseline, failures=failures, notes=notes, names=names, metric=metric)
    caches = {a.name: found for a in analysis.arms if (found := kv_cache_bytes_per_token(a.first)) is not None}
    pictures = _write_figures(folder / "figures", analysis, caches)
    _write_csv(folder / "results.csv", analysis, caches)
    _write_hparams(folder / "hparams", analysis)
    path = folder / "report.html"
    record.write_text(path, _html(analysis, caches, pictures))
    if not quiet:
        show_ranking(analysis, path)
    return path


# --------------------------------------------------------------------------------------------------------------------
# The page


def _html(analysis: Analysis, caches: dict[str, float], pictures: dict[str, dict[str, str]]) -> str:
    names = [arm.name for arm in analysis.arms]
    what = ", ".join(names) if len(names) <= 8 else f"{len(names)} arms"
    n_runs = sum(len(arm.runs) for arm in analysis.arms)
    return render(
        "report.html.jinja",
        title=f"Comparison of {what}" if len(names) > 1 else f"Result of {what}" if names else "No finished run",
        subtitle=f"{n_runs} finished runs of {len(names)} arms · {datetime.now():%Y-%m-%d %H:%M} · Thunderhead",
        answers=[(*_verdict(c), s) for c, s in zip(analysis.comparisons, analysis.sentences, strict=True)],
        no_answer="There is nothing to compare: " + ("one arm has finished." if names else "no run has finished."),
        warnings=analysis.warnings,
        reference=analysis.reference.name if analysis.reference else "",
        ranking=_ranking(analysis),
        comparisons=_comparisons(analysis),
        different=_different(analysis),
        matching=_matching(analysis),
        reach=_reach(analysis),
        inference=_inference(analysis, caches),
        training=_training(analysis),
        failures=Rows(("run", "why"), [(failure.run, failure.reason) for failure in analysis.left_out]),
        runs=_runs(analysis),
        figures=pictures,
        alpha=ALPHA,
    )


def _verdict(comparison: Comparison) -> tuple[str, str]:
    """A class for the colour, and words: the colour says nothing that the words do not."""
    if not comparison.resolved:
        return "open", "? one seed" if comparison.n == 1 else "? not resolved"
    return ("worse", "▲ worse") if comparison.mean > 0 else ("better", "▼ better")


def _ranking(analysis: Analysis) -> Rows:
    rows = []
    for arm in analysis.ranking:
        losses = list(analysis.losses[arm.name].values())
        against = analysis.against_reference(arm)
        rows.append(
            (
                arm.name,
                str(len(losses)),
                f"{analysis.mean(arm):.4f}",
                _interval(statistics.mean_interval(losses)),
                signed(against.mean) if against and against.n else NONE,
                _interval(against.t if against else None, signed),
                _number(arm.mean("perplexity"), "{:.2f}"),
                _number(arm.mean("bits_per_byte"), "{:.4f}"),
            )
        )
    to = f"Δ to {analysis.reference.name}" if analysis.reference else "Δ"
    columns = (
        "arm",
        "seeds",
        f"final loss ({analysis.unit})",
        "95 % CI",
        to,
        "95 % CI of Δ",
        "perplexity",
        "bits a byte",
    )
    return Rows(columns, rows, "Arms by their mean final validation loss, the lowest first.")


def _comparisons(analysis: Analysis) -> Rows:
    rows = [
        (
            f"{c.arm} − {c.against}",
            _verdict(c)[1],
            str(c.n),
            signed(c.mean) if c.n else NONE,
            _interval(c.t, signed),
            _interval(c.bootstrap, signed),
            _number(c.p, "{:.2g}"),
            _number(c.p_holm, "{:.2g}"),
            _number(c.minimum_detectable, "{:.4f}"),
            NONE if c.p is None else f"{c.seeds_needed:,}" if c.seeds_needed else f"> {statistics.MOST_SEEDS:,}",
        )
        for c in analysis.comparisons
    ]
    columns = (
        *("comparison", "verdict", "seeds", f"Δ ({analysis.unit})", "95 % CI (t)", "95 % CI (bootstrap)"),
        *("p", "p (Holm)", "smallest Δ these seeds show", "seeds to show this Δ"),
    )
    return Rows(columns, rows, "Paired differences of the final loss; below 0 the first arm is better.")


def _different(analysis: Analysis) -> Rows:
    rows = [(path, *map(show_value, values)) for path, values in analysis.different.items()]
    return Rows(
        ("setting", *(arm.name for arm in analysis.arms)), rows, "Every setting in which they differ, and no other."
    )


def _matching(analysis: Analysis) -> Rows:
    reference = analysis.reference
    quantities = {"parameters": "parameters", "tokens": "tokens", "training FLOPs": "flops", "seconds": "seconds"}
    rows = []
    for arm in analysis.arms:
        row = [arm.name]
        for name in quantities.values():
            value, base = arm.mean(name), reference.mean(name) if reference else None
            missed = f" ({_missed(value, base)})" if arm is not reference and value is not None and base else ""
            row.append(NONE if value is None else f"{quantity(value)}{missed}")
        match = arm.first.match
        if match is None:
            row.append("nothing was solved for")
        else:
            solved = ", ".join(f"{path}={show_value(value)}" for path, value in match.set.items()) or "nothing changed"
            missed = _missed(match.reached, match.target) if match.target else NONE
            row.append(f"{match.by}: {quantity(match.reached)} of {quantity(match.target)} ({missed}) by {solved}")
        rows.append(row)
    to = f"In brackets: against {reference.name}." if reference else ""
    return Rows(("arm", *quantities, "matched by the sweep"), rows, to)


def _reach(analysis: Analysis) -> Rows:
    reference = analysis.reference
    if reference is None or len(analysis.arms) < 2:
        return Rows((), [])
    targets = analysis.losses[reference.name]
    totals = [reference.mean(name) for name in ("tokens", "flops", "seconds")]
    rows = []
    for arm in analysis.arms:
        costs = [
            cost_to_reach(analysis.validation_curve(run), targets.get(seed, analysis.mean(reference)))
            for seed, run in arm.runs.items()
        ]
        reached = [cost for cost in costs if cost is not None]
        row = [arm.name, f"{len(reached)} of {len(costs)}"]
        for index, total in enumerate(totals):
            mean = sum(cost[index] for cost in reached) / len(reached) if reached else None
            row.append(f"{quantity(mean)} ({mean / total:.2f} ×)" if mean is not None and total else NONE)
        rows.append(row)
    columns = ("arm", "seeds that reach it", "tokens", "training FLOPs", "seconds")
    caption = (
        f"Cost to reach the final loss of {reference.name} of the same seed: the mean of the seeds that do, and its "
        f"ratio to all that {reference.name} took."
    )
    return Rows(columns, rows, caption)


def _inference(analysis: Analysis, caches: dict[str, float]) -> Rows:
    rows = [
        (
            arm.name,
            _number(caches.get(arm.name), "{:,.0f}"),
            f"{arm.first.results['parameters']:,}",
            quantity(arm.first.plan["flops_per_token"] / 3),
            _number(arm.mean("decode_tokens_per_second"), "{:,.0f}"),
            f"{analysis.mean(arm):.4f}",
        )
        for arm in analysis.ranking
    ]
    columns = (
        "arm",
        "KV cache, bytes per token",
        "parameters",
        "forward FLOPs per token",
        "measured decoding, tokens/s",
        "final loss",
    )
    return Rows(
        columns, rows, f"KV cache of all layers at {CACHE_BYTES} bytes an element, for each token of a full context."
    )


def _training(analysis: Analysis) -> Rows:
    rows = []
    for arm in analysis.arms:
        memory = arm.values("peak_memory_bytes")
        estimate = sum(arm.first.plan.get("memory", {}).values())
        rows.append(
            (
                arm.name,
                _number(arm.mean("tokens_per_second"), "{:,.0f}"),
                _ratio(arm, analysis.reference, "tokens_per_second"),
                _number(arm.mean("seconds"), "{:,.0f}"),
                size(int(max(memory))) if memory else NONE,
                size(estimate) if estimate else NONE,
                str(arm.first.results.get("precision", NONE)),
                str(arm.first.results.get("device", NONE)),
            )
        )
    columns = ("arm", "tokens/s", "× reference", "seconds", "peak memory", "planned", "precision", "device")
    return Rows(
        columns,
        rows,
        "Mean over seeds, without validation; peak memory: the highest seed, on a CPU of the whole process.",
    )


def _runs(analysis: Analysis) -> Rows:
    rows = [
        (
            arm.name,
            str(seed),
            f"{analysis.losses[arm.name][seed]:.4f}",
            _number(run.results.get("tokens"), "{:,.0f}"),
            _number(run.results.get("seconds"), "{:,.0f}"),
            str((run.environment.get("git") or {}).get("commit", NONE))[:8],
            str(run.folder),
        )
        for arm in analysis.arms
        for seed, run in arm.runs.items()
    ]
    return Rows(("arm", "seed", "final loss", "tokens", "seconds", "commit", "folder"), rows)


def _missed(value: float, target: float) -> str:
    return "=" if value == target else f"{value / target - 1:+.2%}".replace("-", "−").replace("%", " %")


def _interval(interval: Interval | None, show: Callable[[float], str] = "{:.4f}".format) -> str:
    return f"{show(interval.low)} … {show(interval.high)}" if interval else NONE


def _number(value: Any, form: str) -> str:
    return NONE if value is None else form.format(value)


def _ratio(arm: Arm, reference: Arm | None, name: str) -> str:
    value, base = arm.mean(name), reference.mean(name) if reference else None
    return f"{value / base:.2f} ×" if value and base else NONE


# --------------------------------------------------------------------------------------------------------------------
# Files beside the page


def _write_figures(folder: Path, analysis: Analysis, caches: dict[str, float]) -> dict[str, dict[str, str]]:
    """PNG files, and SVG for the page, where it stays sharp on paper."""
    parameters = {arm.name: float(arm.first.results["parameters"]) for arm in analysis.arms}
    speeds = {arm.name: mean for arm in analysis.arms if (mean := arm.mean("decode_tokens_per_second"))}
    costs = [
        ("KV cache (bytes per token)", caches),
        ("parameters", parameters),
        ("decoding (ms per token)", {name: 1000 / speed for name, speed in speeds.items()}),
    ]
    drawn: dict[str, tuple[str, Figure | None]] = {}
    with mpl.rc_context(figures.style()):
        if analysis.arms:
            drawn["results"] = "Final loss of each arm, and its difference to the reference", figures.results(analysis)
            drawn["curves"] = "Loss against tokens, FLOPs and seconds", figures.curves(analysis)
            drawn["differences"] = "Training loss minus the reference's", figures.differences(analysis)
            drawn["learning_rates"] = "Final loss against the learning rate", figures.learning_rates(analysis)
            drawn["pareto"] = "Final loss against the cost of inference", figures.pareto(analysis, costs)
        folder.mkdir(parents=True, exist_ok=True)
        pictures = {}
        for name in ("results", "learning_rates", "curves", "differences", "pareto"):
            caption, figure = drawn.get(name, ("", None))
            path = folder / f"{name}.png"
            path.unlink(missing_ok=True)  # an earlier report's
            if figure is None:
                continue
            pictures[name] = save_figure(figure, path, caption)
    return pictures


def save_figure(figure: Figure, path: Path, caption: str) -> dict[str, str]:
    """Write a PNG file, and give what the page's `picture` macro takes."""
    figure.savefig(path, dpi=150)
    svg = io.BytesIO()
    figure.savefig(svg, format="svg", metadata={"Date": None})
    source = f"data:image/svg+xml;base64,{base64.b64encode(svg.getvalue()).decode()}"
    return {"source": source, "caption": caption, "width": f"{100 * figure.get_figwidth() / figures.WIDTH:.0f}"}


def render(template: str, **content: Any) -> str:
    """A page of this folder's templates."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("thunderhead.lab", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template(template).render(**content)


def _write_csv(path: Path, analysis: Analysis, caches: dict[str, float]) -> None:
    """A row a compared run."""
    columns = ["arm", "seed", *RESULTS, "kv_cache_bytes_per_token", *analysis.different, "commit", "folder"]
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    for index, arm in enumerate(analysis.arms):
        settings = {setting: show_value(values[index]) for setting, values in analysis.different.items()}
        for seed, run in arm.runs.items():
            known = {key: run.results.get(key) for key in RESULTS} | settings | {"arm": arm.name, "seed": seed}
            commit = (run.environment.get("git") or {}).get("commit")
            cache = caches.get(arm.name)
            writer.writerow(known | {"kv_cache_bytes_per_token": cache, "commit": commit, "folder": run.folder})
    record.write_text(path, buffer.getvalue())


def _write_hparams(folder: Path, analysis: Analysis) -> None:
    """A session a run for TensorBoard's HParams: the settings that differ, and the results."""
    for old in folder.glob("*/events.out.tfevents.*"):
        old.unlink()
    for index, arm in enumerate(analysis.arms):
        settings = {path: show_value(values[index]) for path, values in analysis.different.items()}
        for seed, run in arm.runs.items():
            found = {name: run.results.get(name) for name in RESULTS}
            metrics = {f"final/{name}": float(value) for name, value in found.items() if isinstance(value, int | float)}
            session = re.sub(r"[^\w.=-]+", "_", f"{arm.name}-seed={seed}")
            with SummaryWriter(str(folder / session)) as writer:
                for summary in hparams({"arm": arm.name, "seed": seed} | settings, metrics):  # type: ignore[no-untyped-call]
                    writer._get_file_writer().add_summary(summary)
                for name, value in metrics.items():
                    writer.add_scalar(name, value)


# --------------------------------------------------------------------------------------------------------------------
# The terminal


def show_ranking(analysis: Analysis, report: Path | None = None, console: Console | None = None) -> None:
    """The arms by their loss, the answer in words, and what to beware of."""
    console = console or Console(highlight=False)
    table = TerminalTable(title="Ranking", title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column, justify in (("", "right"), ("arm", "left"), (f"final loss ({analysis.unit})", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for column in ("95 % CI", "seeds", "tokens/s"):
        table.add_column(column, justify="right")
    for place, arm in enumerate(analysis.ranking, 1):
        losses = list(analysis.losses[arm.name].values())
        interval = _interval(statistics.mean_interval(losses))
        speed = _number(arm.mean("tokens_per_second"), "{:,.0f}")
        table.add_row(str(place), escape(arm.name), f"{analysis.mean(arm):.4f}", interval, str(len(losses)), speed)
    console.print()
    if analysis.arms:
        console.print(table)
    colours = {"worse": "red", "better": "green", "open": "yellow"}
    for comparison, sentence in zip(analysis.comparisons, analysis.sentences, strict=True):
        console.print(f"[{colours[_verdict(comparison)[0]]}]•[/] {escape(sentence)}", soft_wrap=True)
    for warning in analysis.warnings:
        console.print(f"[yellow]read with care:[/] {escape(warning)}", soft_wrap=True)
    for failure in analysis.left_out:
        console.print(f"[red]not compared:[/] {escape(failure.run)}: {escape(failure.reason)}", soft_wrap=True)
    if report is not None:
        console.print(f"[cyan]report[/] {escape(str(report))}", soft_wrap=True)
