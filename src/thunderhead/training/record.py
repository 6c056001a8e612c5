"""A run leaves a record: its configuration, plan, surroundings, metrics and results, as files in its folder."""

import csv
import functools
import io
import json
import os
import platform
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, NotRequired

import numpy as np
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import TypedDict

from thunderhead import disk
from thunderhead.core.config import Config, ConfigError, damaged, read_mapping, set_value

REPOSITORY = Path(__file__).resolve().parents[3]
STAGED = ".resuming"  # in a run's folder
SPIKE, FEWEST = 7, 30


class Steps(TypedDict):
    """What is read of plan.json where the way of a run is looked at."""

    steps: int


class _Parameters(TypedDict):
    total: int


class Planned(Steps):
    """What is read of plan.json where its model is."""

    tokens: int
    tokens_per_step: int
    sequences_per_step: int
    micro_batch_size: int
    context_length: int
    flops: float
    precision: str
    parameters: _Parameters


class _Git(TypedDict, total=False):
    commit: str | None
    changed_files: list[str]


class _Kind(TypedDict):
    name: str


class Data(TypedDict, total=False):
    """What is read of data.json, if the data have it."""

    key: str
    tokenizer: _Kind


class Surroundings(TypedDict, total=False):
    """What is read of environment.json."""

    command: list[str]
    overrides: list[str]
    packages: dict[str, Any]
    git: _Git | None


class _Share(TypedDict):
    tokens: int
    val_loss: float


class _Results(TypedDict):
    steps: int
    val_loss: float
    perplexity: NotRequired[float]
    bits_per_byte: NotRequired[float | None]
    tokens: NotRequired[int]
    ledger: NotRequired[dict[str, _Share]]
    diverged: NotRequired[dict[str, Any] | None]


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically, indented for readers."""
    disk.write_text(path, to_json(content))


def _write_compact(path: Path, content: Any) -> None:
    """The same for long lists, which nobody reads."""
    disk.write_text(path, json.dumps(content, separators=(",", ":")) + "\n")


def to_json(content: Any) -> str:
    """JSON, indented for readers."""
    return json.dumps(content, indent=2) + "\n"


def stage(run_dir: Path, files: Mapping[str, str]) -> None:
    """Keep new texts of files of a run beside them, until `take_over` or `discard`."""
    for name, text in files.items():
        disk.write_text(run_dir / STAGED / name, text)


def take_over(run_dir: Path) -> None:
    """Put staged files in their places, if there are any."""
    staged = run_dir / STAGED
    for file in sorted(found for found in staged.rglob("[!.]*") if found.is_file()):
        place = run_dir / file.relative_to(staged)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, place)
    discard(run_dir)


def discard(run_dir: Path) -> None:
    """Forget staged files."""
    staged = run_dir / STAGED
    if staged.is_symlink():  # somebody else's: what it leads to stays
        staged.unlink()
    shutil.rmtree(staged, ignore_errors=True)


def keep_examples(run_dir: Path, checkpoint: str, found: Mapping[str, Any], steps: int) -> None:
    """Write what each example of tasks gave into task_examples.json, beside that of other checkpoints and tasks.

    There stands by checkpoint ("last", "best, averaged") and task: `steps` of the run when it was measured; `examples`,
    a hash of what was asked, in its order, and the right answers; `scores`, by metric a list of one number an example.
    """
    path = run_dir / "task_examples.json"
    known = read_mapping(path) if path.exists() else {}
    measured = {task: {"steps": steps, **scores} for task, scores in found.items()}
    known[checkpoint] = known.get(checkpoint, {}) | measured
    _write_compact(path, known)


def scores_of(tasks: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """What lm-evaluation-harness says of tasks as metrics, <task>_<metric>: no standard errors, no counts."""
    return {
        f"{task}_{name}": value
        for task, numbers in tasks.items()
        for name, value in numbers.items()
        if "stderr" not in name and not name.startswith("sample_")
    }


def keep_documents(run_dir: str | Path, sources: Mapping[str, Any], steps: int) -> None:
    """Write the loss by document, measured after `steps`, into document_losses.json.

    Of each source there stand `nats` and `targets`, lists of one number a document or for several in a row, and the
    `bytes` of all of its text.
    """
    _write_compact(Path(run_dir) / "document_losses.json", {"steps": steps, "sources": sources})


def with_its_shards(config: Config, run_dir: Path, where: str = "resume") -> Config:
    """The configuration of a run, with its data from the shards that it began with, whatever became of their text.

    Raises ConfigError for the setting `where` if the record is damaged.
    """
    if "shards_key" not in config["data"]:
        return config
    return set_value(config, "data.shards_key", read_mapping(run_dir / "data.json", where, Data).get("key"))


CHANGES = "changes.json"


class _Changes(TypedDict):
    changes: list[str]


def changes(run_dir: Path, where: str = "") -> list[str]:
    """What a run was resumed with that it had not begun with, in words."""
    file = run_dir / CHANGES
    return list(read_mapping(file, where, _Changes)["changes"]) if file.exists() else []


def surroundings() -> dict[str, Any]:
    """Command line, machine, package versions and git state of this process."""
    return {
        "command": sys.argv,
        "python": sys.version,
        "platform": platform.platform(),
        "packages": dict(_packages()),
        "git": git_state(),
    }


@functools.cache  # reading hundreds of files takes a moment
def _packages() -> list[tuple[str, str]]:
    files = (distribution.metadata for distribution in distributions())  # each read anew whenever it is asked for
    return sorted((metadata["Name"], metadata["Version"]) for metadata in files)


def git_state() -> dict[str, Any] | None:
    """Commit and uncommitted changes of the checkout; None outside of one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(REPOSITORY), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed_files": git("status", "--porcelain").splitlines()}
    except (OSError, subprocess.CalledProcessError):
        return None


class MetricsCsv(Logger):
    """metrics.csv in `save_dir`, the run's folder: a row a logged step.

    Lightning's CSVLogger deletes what it finds on resuming; this one goes on.
    """

    name = version = save_dir = ""  # Lightning would make folders of the former two

    def __init__(self, save_dir: str):
        super().__init__()
        self.save_dir, self.path = save_dir, Path(save_dir) / "metrics.csv"
        self._columns: list[str] = []

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the record holds the configuration."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append a row; a new column rewrites the file."""
        row = {"step": step, **metrics}
        if not row.keys() <= {*self._columns} or not self.path.exists():  # removed meanwhile
            columns = columns_of(self.path) if self.path.exists() else []
            self._columns = list(dict.fromkeys([*columns, *self._columns, *row]))
            if self._columns != columns:
                write_rows(self.path, self._columns, rows_of(self.path) if columns else [])
        with disk.naming(self.path), self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns, lineterminator="\n").writerow(row)

    @rank_zero_only
    def forget_from(self, step: int) -> dict[str, float]:
        """Drop the rows from `step` on, which a resumed run writes again; returns what was measured in that step."""
        if not self.path.exists():
            return {}
        kept, measured = [], dict[str, float]()
        for line, row in _rows(self.path):
            at = _number(self.path, line, row.get("step", ""), int)
            read = [name for name in row if row[name] and name != "step" and (at == step or name == "train/loss")]
            numbers = {name: _number(self.path, line, row[name]) for name in read}
            if at == step:
                measured = numbers
            elif at < step:
                kept.append(row)
        write_rows(self.path, columns_of(self.path), kept)
        return measured


def _without_rows(path: Path, why: str) -> ConfigError:
    return damaged(path, why, remedy="move it away to go on without its rows")


def columns_of(path: Path) -> list[str]:
    """Columns of a metrics.csv; ConfigError if they cannot be read, or two have one name."""
    with path.open(newline="", encoding="utf-8") as file:
        return _columns(path, csv.DictReader(file))


def _columns(path: Path, reader: "csv.DictReader[str]") -> list[str]:
    try:
        columns = list(reader.fieldnames or [])
    except (csv.Error, UnicodeDecodeError) as error:
        raise _without_rows(path, f"line 1: {error}") from None
    if twice := [name for name in columns if columns.count(name) > 1]:
        raise _without_rows(path, f"line 1: two columns are called {twice[0]}")
    return columns


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows of a metrics.csv, each with the number of its line."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        _columns(path, reader)
        try:
            for row in reader:
                if None in row:
                    raise csv.Error("it has more cells than there are columns")
                if None not in row.values():
                    yield reader.line_num, row
        except (csv.Error, UnicodeDecodeError) as error:
            raise _without_rows(path, f"line {reader.reader.line_num}, or after it: {error}") from None


def rows_of(path: Path) -> Iterator[dict[str, str]]:
    """Rows of a metrics.csv, one after the other; a last one that was cut off by a crash is left out.

    ConfigError if the file is damaged.
    """
    yield from (row for _, row in _rows(path))


def _number(path: Path, line: int, text: str, kind: Callable[[str], float] = float) -> float:
    """A cell of metrics.csv; ConfigError if it is no number."""
    try:
        return kind(text)
    except ValueError:
        what = "number" if kind is float else "step"
        raise _without_rows(path, f"line {line}: {text!r} is no {what}") from None


def points_of(path: Path, *columns: str) -> Iterator[list[float]]:
    """The numbers in these columns of a metrics.csv, of the rows that have all of them; ConfigError for other text."""
    for line, row in _rows(path):
        if all(row.get(column) for column in columns):
            yield [_number(path, line, row[column]) for column in columns]


def read_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and all rows of a metrics.csv."""
    return columns_of(path), [*rows_of(path)]


def loss_spikes(run_dir: Path) -> list[int]:
    """Logged steps whose training loss lies SPIKE standard deviations above the mean of those before it, or further.

    OLMo 2 (2501.00656) scores runs so, with 7 standard deviations of the last 1,000 values.
    """
    path = run_dir / "metrics.csv"
    found = [*points_of(path, "step", "train/loss")] if path.exists() else []
    losses = np.array([loss for _, loss in found])
    before = ((step, loss, losses[max(0, i - 1000) : i]) for i, (step, loss) in enumerate(found) if i >= FEWEST)
    return [int(step) for step, loss, window in before if loss - window.mean() >= SPIKE * window.std() > 0]


def write_rows(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a CSV file atomically; ValueError for a row with what is no column."""
    with disk.replacing(path) as file:
        lines = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
        writer = csv.DictWriter(lines, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        lines.detach()


def read_summary(run_dir: Path) -> dict[str, Any] | None:
    """The results of a finished run, or None."""
    path = run_dir / "summary.json"
    return read_mapping(path, shape=_Results) if path.exists() else None
