"""The report of an ablation: report.html, results.csv, PNG figures, TensorBoard HParams, a ranking on the terminal."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from thunderhead.core.config import show
from thunderhead.lab import figures, looks, page
from thunderhead.lab import report_tables as tables
from thunderhead.lab.analysis import Analysis, Metric, analyse
from thunderhead.lab.arms import Arm
from thunderhead.lab.page import Rows
from thunderhead.lab.runs import Failure, Run
from thunderhead.lab.statistics import ALPHA

RESULTS = (
    *("val_loss", "perplexity", "bits_per_byte", "tokens", "steps", "flops", "parameters", "seconds"),
    *("tokens_per_second", "peak_memory_bytes", "decode_tokens_per_second", "precision", "device"),
)
"""Keys of the summary that results.csv has a column for."""
CACHE = "cache_bytes_per_token"


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
        UnknownArmError: no arm is called `baseline`; names those that there are. Nothing was written.
    """
    analysis = analyse(runs, baseline=baseline, failures=failures, notes=notes, names=names, metric=metric)
    _write_csv(folder / "results.csv", analysis)
    _write_hparams(folder / "hparams", analysis)
    arms = [arm.name for arm in analysis.arms]
    what = ", ".join(arms) if len(arms) <= 8 else f"{len(arms)} arms"
    path = page.write(
        folder,
        "report.html.jinja",
        title=f"Comparison of {what}" if len(arms) > 1 else f"Result of {what}" if arms else "No finished run",
        subtitle=f"{sum(len(arm.runs) for arm in analysis.arms)} finished runs of {len(arms)} arms",
        answers=[(*tables.verdict(c), s) for c, s in zip(analysis.comparisons, analysis.sentences, strict=True)],
        no_answer="There is nothing to compare: " + ("one arm has finished." if arms else "no run has finished."),
        warnings=analysis.warnings,
        reference=analysis.reference.name if analysis.reference else "",
        ranking=tables.ranking(analysis),
        comparisons=tables.comparisons(analysis),
        different=Rows(
            ("setting", *arms),
            [(path, *map(show, values)) for path, values in analysis.different.items()],
            "Every setting in which they differ, and no other.",
        ),
        matching=tables.matching(analysis),
        reach=tables.reach(analysis),
        inference=tables.inference(analysis),
        training=tables.training(analysis),
        terms=tables.loss_terms(analysis),
        left_out=analysis.left_out,
        runs=tables.runs(analysis),
        drawn=_draw(analysis),
        alpha=ALPHA,
    )
    if not quiet:
        show_ranking(analysis, path)
    return path


# --------------------------------------------------------------------------------------------------------------------
# Files beside the page


def _draw(analysis: Analysis) -> dict[str, tuple[str, Figure | None]]:
    means = {
        name: {arm.name: mean for arm in analysis.arms if (mean := arm.mean(name))}
        for name in (CACHE, "parameters", "decode_tokens_per_second")
    }
    costs = [
        ("cache (bytes per token)", means[CACHE]),
        ("parameters", means["parameters"]),
        ("decoding (ms per token)", {arm: 1000 / v for arm, v in means["decode_tokens_per_second"].items()}),
    ]
    shown: dict[str, tuple[str, Callable[[Analysis], Figure | None]]] = {
        "results": ("Final loss of each arm, and its difference to the reference", figures.results),
        "learning_rates": ("Final loss against the learning rate", figures.learning_rates),
        "curves": ("Loss against tokens, FLOPs and seconds", figures.curves),
        "differences": ("Training loss minus the reference's", figures.differences),
        "pareto": ("Final loss against the cost of inference", lambda found: figures.pareto(found, costs)),
    }
    with mpl.rc_context(looks.style()):
        return {name: (caption, draw(analysis) if analysis.arms else None) for name, (caption, draw) in shown.items()}


def _cells(analysis: Analysis) -> Iterator[tuple[Arm, Run, dict[str, Any], dict[str, Any]]]:
    """For each compared run its arm's settings that differ, and its results."""
    metrics = analysis.names(lambda run: run.metrics)
    for index, arm in enumerate(analysis.arms):
        settings = {path: show(values[index]) for path, values in analysis.different.items()}
        for run in arm.runs.values():
            results = {name: run.result(name) for name in (*RESULTS, *metrics)}
            yield arm, run, settings, results | {f"train/{name}": value for name, value in run.loss_terms.items()}


def _write_csv(path: Path, analysis: Analysis) -> None:
    """A row a compared run."""
    terms = [f"train/{name}" for name in analysis.names(lambda run: run.loss_terms)]
    columns = [*RESULTS, *analysis.names(lambda run: run.metrics), *terms, "kv_cache_bytes_per_token"]
    rows = [
        {"arm": arm.name, "seed": run.seed, **results, "kv_cache_bytes_per_token": run.result(CACHE)}
        | {**settings, "commit": run.git.get("commit"), "folder": run.folder}
        for arm, run, settings, results in _cells(analysis)
    ]
    page.write_csv(path, ["arm", "seed", *columns, *analysis.different, "commit", "folder"], rows)


def _write_hparams(folder: Path, analysis: Analysis) -> None:
    """A session a run for TensorBoard's HParams: the settings that differ, and the results."""
    for old in folder.glob("*/events.out.tfevents.*"):
        old.unlink()
    for arm, run, settings, results in _cells(analysis):
        metrics = {f"final/{name}": float(value) for name, value in results.items() if isinstance(value, int | float)}
        session = re.sub(r"[^\w.=-]+", "_", f"{arm.name}-seed={run.seed}")
        with SummaryWriter(str(folder / session)) as writer:
            for summary in hparams({"arm": arm.name, "seed": run.seed} | settings, metrics):  # type: ignore[no-untyped-call]
                writer._get_file_writer().add_summary(summary)
            for name, value in metrics.items():
                writer.add_scalar(name, value)


# --------------------------------------------------------------------------------------------------------------------
# The terminal


def show_ranking(analysis: Analysis, report: Path | None = None, console: Console | None = None) -> None:
    """The arms by their loss, the answer in words, and what to beware of."""
    console = console or Console(highlight=False)
    columns = tables.loss_columns(analysis) | {"tokens/s": tables.mean("tokens_per_second", ",.0f")}
    table = Table(title="Ranking", title_justify="left", title_style="bold", box=None, pad_edge=False)
    for heading in ("", "arm", *columns):
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    for place, arm in enumerate(analysis.ranking, 1):
        table.add_row(str(place), escape(arm.name), *(cell(arm) for cell in columns.values()))
    console.print()
    if analysis.arms:
        console.print(table)
    colours = {"worse": "red", "better": "green", "open": "yellow"}
    verdicts = [colours[tables.verdict(comparison)[0]] for comparison in analysis.comparisons]
    answers = list(zip(verdicts, analysis.sentences, strict=True))
    page.tell(console, answers, analysis.warnings, analysis.left_out, "compared")
    if report is not None:
        console.print(f"[cyan]report[/] {escape(str(report))}", soft_wrap=True)
