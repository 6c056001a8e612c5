"""`python evaluate.py`: loss, perplexity and bits per byte of a model on any text, and tasks."""

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from thunderhead import command_line, extras
from thunderhead.core import components
from thunderhead.core import config as configuration
from thunderhead.core.components import build
from thunderhead.core.config import Config, ConfigError, Problem, first_line
from thunderhead.core.trust import trust_typed
from thunderhead.core.types import NonNegativeInt, PathText, PositiveInt
from thunderhead.release.command import Loaded, load
from thunderhead.release.scoring import Score, score
from thunderhead.release.validation import can_be_repeated, validate
from thunderhead.terminal import Console
from thunderhead.training import loggers, record


def settings(
    *,
    run: PathText,
    checkpoint: Literal["last", "best"] = "last",
    averaged: bool = False,
    stride: PositiveInt | None = None,
    batch_size: PositiveInt = 8,
    tasks: Sequence[str] = (),
    tasks_path: PathText | None = None,
    num_fewshot: NonNegativeInt | None = None,
    limit: PositiveInt | None = None,
    json: bool = False,
    accelerator: str = "auto",
    trust: Sequence[str] = (),
) -> None:
    """The top-level settings, for the check; conf/evaluate.yaml says what each does."""


def evaluate(config: DictConfig) -> dict[str, dict[str, float]]:
    """Score each of `data.sources` by a model: what `Score.to_dict` says, by name, and of `all`; and each of `tasks`.

    Without either, a run of other data than text is validated as in training; `validation` is what that gave. What
    tasks gave is kept in the run's record, too. Raises ConfigError if the configuration is refused, there is no model,
    no text, or a task cannot be done.
    """
    resolved = configuration.plain(config)
    trust_typed(resolved)
    problems = components.check(resolved, settings)
    sources, tasks = resolved.get("data", {}).get("sources") or {}, resolved["tasks"]
    of_the_run = not sources and not tasks and not resolved.get("data") and not problems and can_be_repeated(resolved)
    if not sources and not tasks and not of_the_run:
        message = "has no sources of text: choose data=text data.path=…, or tasks=[…] of lm-evaluation-harness"
        problems.append(Problem("data", message))
    for key in sorted(command_line.chosen(command_line.invocation_overrides())):
        if key.startswith("data.") and not key.startswith(("data.sources", "data.path")):
            problems.append(Problem(key, "changes nothing here: all text of data.sources is scored"))
        elif key.startswith("data.sources.") and key.endswith((".weight", ".max_epochs")):
            problems.append(Problem(key, "is of training, and changes nothing here: all text is scored once"))
        elif key.partition(".")[0] in ("tokenizer", "curation"):
            problems.append(Problem(key, "changes nothing here: text is scored as it is, by the model's own tokenizer"))
    if of_the_run and resolved["stride"] is not None:
        problems.append(Problem("stride", "is of text, and changes nothing without: data=text data.path=…"))
    problems += [
        Problem(name, "is of tasks, and changes nothing without: tasks=[…]")
        for name in ("tasks_path", "num_fewshot", "limit")
        if resolved[name] is not None and not tasks
    ]
    if problems:
        raise ConfigError(problems)
    if of_the_run:
        results = {"validation": validate(resolved)}
        print(json.dumps(results, indent=2)) if resolved["json"] else _show_tasks(results)
        return results
    built = {name: build(node) for name, node in sources.items()}
    _ask(built, "check")
    evaluate_tasks = _harness(resolved) if tasks else None
    loaded = load(resolved)
    decoder = loaded.decoder.eval()
    if resolved["stride"] is not None and resolved["stride"] > decoder.context_length:
        limit = f"is longer than the model's context length: {decoder.context_length} at most, or tokens were left out"
        raise ConfigError([Problem("stride", limit)])
    _ask(built, "connect")  # it may download: only when all is well on this machine
    results = _score_sources(loaded, built, resolved)
    if results and not resolved["json"]:
        _show(results)
    if evaluate_tasks is not None:
        with loaded.autocast():
            found, examples = evaluate_tasks(loaded)
        _keep(resolved, found, examples)
        if not resolved["json"]:
            _show_tasks(found)
        results |= found
    if resolved["json"]:
        print(json.dumps(results, indent=2))
    return results


def _score_sources(loaded: Loaded, sources: dict[str, Any], resolved: Config) -> dict[str, dict[str, float]]:
    scores, asked = {}, {name: resolved[name] for name in ("stride", "batch_size")}
    for name, source in sources.items():
        try:
            with loaded.autocast(), _progress(name, source) as texts:
                scores[name] = score(loaded.decoder, loaded.tokenizer, texts, **asked)
        except (ValueError, ConnectionError) as error:  # what cannot be read, or text that the tokenizer cannot write
            raise ConfigError([Problem(f"data.sources.{name}", first_line(error))]) from error
    if len(scores) > 1:
        parts = scores.values()
        sums = {
            field: sum(getattr(part, field) for part in parts) for field in ("documents", "bytes", "tokens", "nats")
        }
        scores["all"] = Score(**sums)
    return {name: found.to_dict() for name, found in scores.items()}


def _harness(resolved: Config) -> Callable[[Loaded], tuple[dict[str, dict[str, float]], dict[str, Any]]]:
    """Do the tasks, known to be there: before the model is loaded."""
    try:
        from thunderhead.release import harness
    except ImportError as error:
        message = f"are those of lm-evaluation-harness: {extras.install('eval')}"
        raise ConfigError([Problem("tasks", message)]) from error
    tasks, place = resolved["tasks"], resolved["tasks_path"]
    if place is not None and not Path(place).is_dir():
        raise ConfigError([Problem("tasks_path", f"{place} is no folder: give one that holds task files (.yaml)")])
    manager = harness.manager_of(tasks, None if place is None else Path(place))
    asked = {name: resolved[name] for name in ("batch_size", "num_fewshot", "limit")}
    return lambda loaded: harness.evaluate_tasks(loaded, tasks, manager, **asked)


def _keep(resolved: Config, found: dict[str, dict[str, float]], examples: dict[str, Any]) -> None:
    """Write what tasks and their examples gave into the record of a run that has ended, by checkpoint."""
    place = Path(resolved["run"])
    folder, checkpoint = (place.parents[1], place.stem) if place.is_file() else (place, resolved["checkpoint"])
    checkpoint += ", averaged" * resolved["averaged"]
    if (summary := record.read_summary(folder)) is not None:
        tasks = summary.get("tasks", {})
        summary["tasks"] = tasks | {checkpoint: tasks.get(checkpoint, {}) | found}
        record.write_json(folder / "summary.json", summary)
        loggers.show_tasks(folder, summary)
        record.keep_examples(folder, checkpoint, examples, summary["steps"])


def _ask(sources: dict[str, Any], what: Literal["check", "connect"]) -> None:
    """Call each source's `check` or `connect`; raises one ConfigError for all that fail."""
    problems = []
    for name, source in sources.items():
        try:
            getattr(source, what)()
        except (ValueError, ConnectionError) as error:
            problems.append(Problem(f"data.sources.{name}", first_line(error)))
    if problems:
        raise ConfigError(problems)


@contextlib.contextmanager
def _progress(name: str, source: Any) -> Iterator[Iterator[str]]:
    """Texts of a source, with a bar of its bytes on the terminal."""
    columns = TextColumn("[bold]{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(escape(name), total=source.disk_bytes())
        yield (document.text for document in source.documents(lambda n_bytes: bar.advance(task, n_bytes)))


def _show_tasks(results: dict[str, dict[str, float]]) -> None:
    table = Table("task", "metric", box=None, pad_edge=False, header_style="cyan")
    table.add_column("value", justify="right")
    for task, metrics in results.items():
        for name, value in metrics.items():
            if "_stderr" not in name and name not in ("sample_len", "sample_count"):
                error = metrics.get(name.partition(",")[0] + "_stderr" + "".join(name.partition(",")[1:]), math.nan)
                table.add_row(escape(task), escape(name), f"{value:.4f}" + (f" ± {error:.4f}" if error > 0 else ""))
    Console(highlight=False).print(table)


def _show(results: dict[str, dict[str, float]]) -> None:
    table = Table(box=None, pad_edge=False, header_style="cyan")
    for heading in ("source", "documents", "bytes", "tokens", "loss", "perplexity", "bits per byte"):
        table.add_column(heading, justify="left" if heading == "source" else "right")
    for name, found in results.items():
        counts = [f"{found[count]:,}" for count in ("documents", "bytes", "tokens")]
        table.add_row(
            escape(name), *counts, f"{found['loss']:.4f}", f"{found['perplexity']:.2f}", f"{found['bits_per_byte']:.4f}"
        )
    Console(highlight=False).print(table)
