"""The report of an ablation: report.html, results.csv, PNG figures, TensorBoard HParams, a ranking on the terminal."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from thunderhead.core.config import show
from thunderhead.lab import documents, figures, page, reach, statistics, tasks
from thunderhead.lab.analysis import Analysis, Metric, analyse
from thunderhead.lab.arms import Arm, percent
from thunderhead.lab.page import NONE, Rows, interval, number
from thunderhead.lab.runs import Failure, Run
from thunderhead.lab.statistics import Comparison, signed
from thunderhead.terminal import Console, quantity, size
from thunderhead.training import record

CACHE = "cache_bytes_per_token"
RESULTS = (
    *("val_loss", "perplexity", "bits_per_byte", "tokens", "steps", "flops", "parameters", "seconds"),
    *("tokens_per_second", "peak_memory_bytes", "decode_tokens_per_second", "precision", "device"),
)
"""Keys of the summary that results.csv has a column for."""
Cell = Callable[[Arm], str]
"""What a column says about an arm."""


def write_report(
    folder: Path,
    runs: Sequence[Run],
    *,
    baseline: str | None = None,
    failures: Sequence[Failure] = (),
    notes: Sequence[str] = (),
    names: Mapping[Path, str] | None = None,
    metric: Metric = "auto",
    smallest_effect: float = statistics.SMALLEST_EFFECT,
) -> Path:
    """Compare runs and write what was found into a folder, replacing an earlier report there; return its report.html.

        write_report(folder, read_runs(["logs/sweeps/pretrain/2026-11-24_01-00-00"]), baseline="mha")

    Runs with equal configuration but for the seed are an arm. Only runs that came to the end of their schedule are
    compared; the others are listed. It works with any number of runs, none included.

    Args:
        folder: gets report.html, results.csv, figures/*.png and hparams/.
        runs: from `thunderhead.lab.runs.read_runs`.
        baseline: name of the arm that others are compared with ("mha", or "attention=mha"); None = all pairs of up to
            four arms, and the first arm where there are more. ConfigError if no arm has it; nothing is written.
        failures: runs without a result and without a record that says so.
        notes: sentences of the caller's for the top of the report, as a warning of the tuning.
        names: an arm's name by the folders of its runs; None = from what their configurations differ in.
        metric: what is compared; auto = the validation loss, or bits per byte where only tokenizers or contexts differ.
        smallest_effect: arms whose difference is surely smaller are called practically equal; in the metric's unit.
    """
    analysis = analyse(
        runs,
        baseline=baseline,
        failures=failures,
        notes=notes,
        names=names,
        metric=metric,
        smallest_effect=smallest_effect,
    )
    _write_csv(folder / "results.csv", analysis)
    _write_hparams(folder / "hparams", analysis)
    arms = [arm.name for arm in analysis.arms]
    what = ", ".join(arms) if len(arms) <= 8 else f"{len(arms)} arms"
    path = page.write(
        folder,
        "report.html.jinja",
        title=f"Comparison of {what}" if len(arms) > 1 else f"Result of {what}" if arms else "No finished run",
        subtitle=f"{sum(len(arm.runs) for arm in analysis.arms)} finished runs of {len(arms)} arms",
        answers=[(*_verdict(c), s) for c, s in zip(analysis.comparisons, analysis.sentences, strict=True)],
        no_answer="There is nothing to compare: " + ("one arm has finished." if arms else "no run has finished."),
        warnings=analysis.warnings,
        reference=analysis.reference.name if analysis.reference else "",
        left_out=analysis.left_out,
        smallest_effect=f"{smallest_effect:g}",
        unit=analysis.unit,
        figures=FIGURES,
        of=analysis if arms else None,
        **{name: rows(analysis) for name, rows in TABLES.items()},
    )
    show_ranking(analysis, path)
    return path


# --- files beside the page, and the terminal --------------------------------------------------------------------------


def _result_names(analysis: Analysis) -> list[str]:
    return [*RESULTS, *analysis.names(lambda run: run.metrics), *analysis.names(lambda run: run.loss_terms)]


def _cells(analysis: Analysis) -> Iterator[tuple[Arm, Run, dict[str, Any], dict[str, Any]]]:
    """For each compared run its arm's settings that differ, and its results."""
    names = _result_names(analysis)
    for index, arm in enumerate(analysis.arms):
        settings = {path: show(values[index]) for path, values in analysis.different.items()}
        for run in arm.runs.values():
            yield arm, run, settings, {name: run.result(name) for name in names}


def _write_csv(path: Path, analysis: Analysis) -> None:
    """A row a compared run."""
    rows = [
        {"arm": arm.name, "seed": run.seed, **results, "kv_cache_bytes_per_token": run.result(CACHE)}
        | {**settings, "commit": run.git.get("commit"), "folder": run.folder}
        for arm, run, settings, results in _cells(analysis)
    ]
    columns = ["arm", "seed", *_result_names(analysis), "kv_cache_bytes_per_token", *analysis.different]
    record.write_rows(path, [*columns, "commit", "folder"], rows)


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


def show_ranking(analysis: Analysis, report: Path | None = None, console: Console | None = None) -> None:
    """The arms by their loss, the answer in words, and what to beware of."""
    console = console or Console(highlight=False)
    columns = _loss_columns(analysis) | {"tokens/s": _mean("tokens_per_second", ",.0f")}
    table = Table(title="Ranking", title_justify="left", title_style="bold", box=None, pad_edge=False)
    for heading in ("", "arm", *columns):
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    for place, arm in enumerate(analysis.ranking, 1):
        table.add_row(str(place), escape(arm.name), *(cell(arm) for cell in columns.values()))
    console.print()
    if analysis.arms:
        console.print(table)
    colours = {"worse": "red", "better": "green", "equal": "cyan", "open": "yellow"}
    answers = [(colours[_verdict(c)[0]], s) for c, s in zip(analysis.comparisons, analysis.sentences, strict=True)]
    page.tell(console, answers, analysis.warnings, analysis.left_out, how="compared", report=report)


# --- tables -----------------------------------------------------------------------------------------------------------


def _of_arms(arms: Sequence[Arm], columns: Mapping[str, Cell], caption: str) -> Rows:
    name: dict[str, Cell] = {"arm": lambda arm: arm.name}
    return page.table(arms, name | dict(columns), caption)


def _mean(name: str, form: str) -> Cell:
    """The mean of a value over an arm's seeds."""
    return lambda arm: number(arm.mean(name), form)


def _verdict(comparison: Comparison) -> tuple[str, str]:
    """A class for the colour, and words: the colour says nothing that the words do not."""
    words = {"worse": "▲ worse", "better": "▼ better", "equal": "≈ practically equal", "open": "? not resolved"}
    if comparison.diverged:
        return comparison.verdict, "? seeds diverged"
    return comparison.verdict, "? one seed" if comparison.n == 1 else words[comparison.verdict]


def _missed(value: float, target: float) -> str:
    return "=" if value == target else percent(value / target - 1, 2)


def _loss_columns(analysis: Analysis) -> dict[str, Cell]:
    def seeds(arm: Arm) -> str:
        return f"{len(arm.runs)} of {len(arm.runs) + arm.n_diverged}" if arm.n_diverged else str(len(arm.runs))

    return {
        "seeds": seeds,
        f"final loss ({analysis.unit})": lambda arm: f"{analysis.mean(arm):.4f}",
        "95 % CI": lambda arm: interval(analysis.interval(arm)),
    }


def _ranking(analysis: Analysis) -> Rows:
    def difference(arm: Arm) -> str:
        against = analysis.against_reference(arm)
        return signed(against.mean) if against and against.n else NONE

    columns: dict[str, Cell] = {
        **_loss_columns(analysis),
        f"Δ to {analysis.reference.name}" if analysis.reference else "Δ": difference,
        "95 % CI of Δ": lambda arm: interval(c.interval if (c := analysis.against_reference(arm)) else None, "signed"),
        "perplexity": _mean("perplexity", ".2f"),
        "bits a byte": _mean("bits_per_byte", ".4f"),
        **{name: _mean(name, ".4f") for name in analysis.names(lambda run: run.metrics)},
    }
    return _of_arms(
        analysis.ranking,
        columns,
        "Arms by their final validation loss on equal seeds, the lowest first; last those of which seeds diverged.",
    )


def _comparisons(analysis: Analysis) -> Rows:
    over_text = documents.intervals(analysis)
    columns: dict[str, Callable[[Comparison], str]] = {
        "comparison": lambda c: f"{c.arm} − {c.against}",
        "verdict": lambda c: _verdict(c)[1],
        "seeds": lambda c: str(c.n),
        f"Δ ({analysis.unit})": lambda c: signed(c.mean) if c.n else NONE,
        "95 % CI": lambda c: interval(c.interval, "signed"),
        "p": lambda c: number(c.p, ".2g"),
    }
    caption = "Paired differences of the final loss; below 0 the first arm is better."
    if len(analysis.comparisons) > 1:
        caption += " Intervals and p hold for all comparisons together."
    if over_text:
        columns["over other text"] = lambda c: interval(over_text.get((c.arm, c.against)), "signed")
        caption += " Over other text: the interval if validation's documents are drawn, too, not the seeds alone."
    return page.table(analysis.comparisons, columns, caption)


def _different(analysis: Analysis) -> Rows:
    rows = [(path, *map(show, values)) for path, values in analysis.different.items()]
    columns = ("setting", *(arm.name for arm in analysis.arms))
    return Rows(columns, rows, "Every setting in which they differ, and no other.")


def _matching(analysis: Analysis) -> Rows:
    reference = analysis.reference

    def of_reference(name: str) -> Cell:
        def cell(arm: Arm) -> str:
            value, base = arm.mean(name), reference.mean(name) if reference else None
            missed = f" ({_missed(value, base)})" if arm is not reference and value is not None and base else ""
            return NONE if value is None else f"{quantity(value)}{missed}"

        return cell

    def by_sweep(arm: Arm) -> str:
        match = arm.first.match
        if match is None:
            return "nothing was solved for"
        solved = ", ".join(f"{path}={show(value)}" for path, value in match.set.items()) or "nothing changed"
        missed = _missed(match.reached, match.target) if match.target else NONE
        return f"{match.by}: {quantity(match.reached)} of {quantity(match.target)} ({missed}) by {solved}"

    names = {"parameters": "parameters", "tokens": "tokens", "training FLOPs": "flops", "seconds": "seconds"}
    columns = {label: of_reference(name) for label, name in names.items()} | {"matched by the sweep": by_sweep}
    return _of_arms(analysis.arms, columns, f"In brackets: against {reference.name}." if reference else "")


def _inference(analysis: Analysis) -> Rows:
    columns: dict[str, Cell] = {
        "cache, bytes per token": _mean(CACHE, ",.0f"),
        "parameters": _mean("parameters", ",.0f"),
        "forward FLOPs per token": lambda arm: quantity(arm.first.plan.get("flops_per_token", 0) / 3),
        "measured decoding, tokens/s": _mean("decode_tokens_per_second", ",.0f"),
        "final loss": lambda arm: f"{analysis.mean(arm):.4f}",
    }
    caption = "Cache: what all layers keep of a full context (keys and values), for each of its tokens."
    return _of_arms(analysis.ranking, columns, caption)


def _training(analysis: Analysis) -> Rows:
    reference = analysis.reference

    def ratio(arm: Arm) -> str:
        speeds = arm.mean("tokens_per_second"), reference.mean("tokens_per_second") if reference else None
        return f"{speeds[0] / speeds[1]:.2f} ×" if speeds[0] and speeds[1] else NONE

    def planned(arm: Arm) -> str:
        estimate = sum((arm.first.plan.get("memory") or {}).values())
        return size(estimate) if estimate else NONE

    columns: dict[str, Cell] = {
        "tokens/s": _mean("tokens_per_second", ",.0f"),
        "× reference": ratio,
        "seconds": _mean("seconds", ",.0f"),
        "peak memory": lambda arm: size(int(max(m))) if (m := arm.values("peak_memory_bytes")) else NONE,
        "planned": planned,
        "precision": lambda arm: str(arm.first.result("precision") or NONE),
        "device": lambda arm: str(arm.first.result("device") or NONE),
    }
    caption = "Mean over seeds, without validation; peak memory: the highest seed, on a CPU of the whole process."
    return _of_arms(analysis.arms, columns, caption)


def _terms(analysis: Analysis) -> Rows:
    """Of the runs that have any; an arm without a term has none of it."""
    columns = {name.removeprefix("train/"): _mean(name, ".4g") for name in analysis.names(lambda run: run.loss_terms)}
    caption = "Terms of the training loss beside the cross-entropy, as they are added to it; mean over seeds."
    return _of_arms(analysis.arms, columns, caption) if columns else Rows()


def _runs(analysis: Analysis) -> Rows:
    rows = [
        (
            *(arm.name, str(seed), f"{analysis.losses[arm.name][seed]:.4f}"),
            *(number(run.number("tokens"), ",.0f"), number(run.number("seconds"), ",.0f")),
            *(str(run.git.get("commit", NONE))[:8], str(run.folder)),
        )
        for arm in analysis.arms
        for seed, run in arm.runs.items()
    ]
    return Rows(("arm", "seed", "final loss", "tokens", "seconds", "commit", "folder"), rows)


# By the names that report.html.jinja has for them.
TABLES = {
    **{"ranking": _ranking, "comparisons": _comparisons, "tasks": tasks.table, "different": _different},
    **{"matching": _matching, "reach": reach.table, "inference": _inference, "training": _training, "terms": _terms},
    "runs": _runs,
}
FIGURES = {
    "results": ("Final loss of each arm, and its difference to the reference", figures.results),
    "learning_rates": ("Final loss against the learning rate", figures.learning_rates),
    "curves": ("Loss against tokens, FLOPs and seconds", figures.curves),
    "differences": ("Training loss minus the reference's", figures.differences),
    "pareto": ("Final loss against the cost of inference", figures.pareto),
}
