"""Finished and unfinished runs, read back from their records; nothing here trains or writes.

A run folder holds config.yaml, plan.json, environment.json, metrics.csv and, once finished, summary.json (see
`thunderhead.training.record`); a sweep that matched its arms adds match.json. A record may have been made with any
loggers and callbacks: what is not there was not measured.
"""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from thunderhead.core.config import Config, ConfigError, Problem, first_line, read_mapping
from thunderhead.training import record

Array = NDArray[np.float64]
COUNTERS = ("step", "tokens", "flops", "tokens_per_second")
BESIDE = TUNING, SPEED = "tuning", "speed"
"""Folders of a sweep with runs that choose values for others: they are no part of what is compared."""
SWEEP, TUNED, LOOKS = "sweep.json", "tuning.json", "looks.json"
"""A sweep's record, what it has tuned; and in a run's folder, at how many seeds looks at its sweeps were planned."""
SHOWN_ANYWAY = ("loss", "perplexity", "bits_per_byte")
"""Metrics of validation that have columns of their own wherever results are shown."""


class Failure(NamedTuple):
    """A run that has no result, for the report's list: which one, and why."""

    run: str  # its folder, or the overrides that name it
    reason: str  # one line


class Match(NamedTuple):
    """What a sweep made equal between its arms: the content of match.json."""

    by: str  # params | flops | time
    target: float
    reached: float
    set: dict[str, Any]  # config paths that were solved for, with their values: {"model.d_ff": 530}

    @property
    def missed(self) -> float:
        """Relative to the target; above 0 = more."""
        return self.reached / self.target - 1


class Curve(NamedTuple):
    """Values on the way, each at tokens, FLOPs and seconds of training (without validation) so far."""

    tokens: Array
    flops: Array
    seconds: Array
    loss: Array

    def cost_to_reach(self, loss: float) -> tuple[float, ...] | None:
        """Tokens, FLOPs and seconds when it first came down to a loss, between points by a straight line.

        None if it never did. The first point has none before it: what comes out there is at most.
        """
        below = np.flatnonzero(self.loss <= loss)
        if not below.size:
            return None
        ends = [below[0], max(below[0] - 1, 0)]
        return tuple(float(np.interp(loss, self.loss[ends], axis[ends])) for axis in self[:3])


@dataclass(frozen=True)
class Run:
    """One run's record; `broken` says why it could not be read, and all else is empty then."""

    folder: Path
    config: Config
    plan: dict[str, Any]
    environment: dict[str, Any]
    summary: dict[str, Any] | None
    match: Match | None
    rows: list[dict[str, float]]
    broken: str = ""

    @property
    def seed(self) -> int:
        """Runs of equal seed start from the same weights and see the same tokens: they are pairs."""
        return int(self.config["seed"])

    @cached_property
    def unfinished(self) -> str | None:
        """Why this run cannot be compared; None if it came to the end of its schedule, and its loss fell."""
        if self.broken:
            return self.broken
        if self.summary is not None and not math.isfinite(self.summary["val_loss"]):
            at = (self.summary.get("diverged") or {}).get("step")
            last = f"diverged: the final validation loss is {self.summary['val_loss']}"
            return last if at is None else f"diverged at step {at:,} of {self.plan['steps']:,}"
        if self.summary is None or self.summary["steps"] < self.plan["steps"]:
            step = int(self.rows[-1]["step"]) if self.rows else 0
            why = "stopped early by a callback" if (self.summary or {}).get("stopped_early") else "unfinished"
            return f"{why}: step {step:,} of {self.plan['steps']:,}"
        losses = self.curve("train/loss").loss
        if self.rows and self.rows[0]["step"] <= 1 and losses.size > 1 and losses[0] < losses[-1]:
            # one batch may be easier than the text that is validated on, but worse than chance is no text's fault
            start, end, chance = float(losses[0]), self.summary["val_loss"], math.log(max(self.plan["vocab_size"], 1))
            if end > max(start, chance):
                return f"diverged: it ends at a validation loss of {end:.4g}, and began at {start:.4g}"
        return None

    @property
    def diverged(self) -> bool:
        """Whether that is why."""
        return (self.unfinished or "").startswith("diverged")

    @property
    def git(self) -> dict[str, Any]:
        return self.environment.get("git") or {}

    @cached_property
    def _results(self) -> dict[str, Any]:
        summary = self.summary or {}
        return self.loss_terms | (summary.get("metrics") or {}) | summary

    def result(self, name: str) -> Any:
        """A value of the summary, a further validation metric or a loss term; None where it was not measured."""
        return self._results.get(name)

    def number(self, name: str) -> float | None:
        """The same, if it is a number."""
        value = self.result(name)
        return float(value) if isinstance(value, int | float) else None

    @property
    def metrics(self) -> list[str]:
        """Names of further validation metrics."""
        summary = self.summary or {}
        names = dict.fromkeys([*{"accuracy"}.intersection(summary), *(summary.get("metrics") or {})])
        return [name for name in names if name not in SHOWN_ANYWAY]

    @property
    def loss_terms(self) -> dict[str, float]:
        """Auxiliary terms of the training loss, as train/<name>: of the summary, else as they were logged last."""
        terms = (self.summary or {}).get("loss_terms")
        if isinstance(terms, dict):
            found = {f"train/{name}": value for name, value in terms.items()}
        else:
            found = {name: value for row in self.rows for name, value in row.items() if name.startswith("train/")}
        return {name: value for name, value in found.items() if name != "train/loss"}

    def curve(self, column: str) -> Curve:
        """A column of metrics.csv: train/loss at each logged step, val/loss at each validation.

        The seconds are those that the logged tokens took at their logged speeds.
        """
        points = []
        seconds = tokens_timed = 0.0
        for row in self.rows:
            tokens = row.get("tokens", row["step"] * self.plan.get("tokens_per_step", math.nan))
            flops = row.get("flops", tokens * self.plan.get("flops_per_token", math.nan))
            if row.get("tokens_per_second", 0) > 0:
                seconds += (tokens - tokens_timed) / row["tokens_per_second"]
                tokens_timed = tokens
            if math.isfinite(row.get(column, math.nan)):
                points.append((tokens, flops, seconds, row[column]))
        return Curve(*np.reshape(points, (-1, 4)).T)


def read_runs(folders: Iterable[Path | str]) -> list[Run]:
    """The runs in these folders: run folders, or folders above them such as a sweep's; unfinished and broken ones too.

    In the order of the folders; runs below one by name, numbers as numbers. A run found twice counts once. ConfigError
    with all folders that are not there or hold no run.
    """
    found: dict[Path, Run] = {}
    problems = []
    for folder in map(Path, folders):
        places = {Path(place) for place, _, files in os.walk(folder) if len({*PARTS} & {*files}) > 1}
        records = sorted((place for place in places if not _is_beside(place, folder)), key=_by_number)
        if not records:
            message = f"{folder} holds no run (a run has config.yaml and plan.json): give logs/runs/… or a sweep"
            problems.append(Problem("runs", message))
        found |= {place.resolve(): _read(place) for place in records if place.resolve() not in found}
    if problems:
        raise ConfigError(problems)
    return list(found.values())


PARTS = ("config.yaml", "plan.json", "environment.json")
"""Of the record of every run: where one is missing, it is damaged."""


def _is_beside(run: Path, above: Path) -> bool:
    """Whether a run below `above` is one of those that a sweep has beside what it compares."""
    sweep = run.parent.parent
    return run.parent.name in BESIDE and run.parent != above != run and (sweep / SWEEP).is_file()


def looks_of(runs: Iterable[Path]) -> set[int]:
    """Numbers of seeds at which sweeps of these runs were planned to be looked at, by records of both."""
    folders = [run.resolve() for run in runs]
    files = {*(run / LOOKS for run in folders), *(run.parent / SWEEP for run in folders)}
    return {n for file in files for n in _looks(file)}


def _sweep_of(run: Path) -> Path | None:
    """The folder of the sweep that a run lies in."""
    return next((folder for folder in run.parents if (folder / SWEEP).is_file()), None)


def recorded_names(runs: Iterable[Run]) -> dict[Path, str]:
    """What a sweep called the arms of its runs, by folder; nothing unless all are of one sweep that says so."""
    folders = {run.folder: _sweep_of(run.folder) for run in runs}
    if len({*folders.values()}) != 1 or None in folders.values():
        return {}
    (sweep,) = {*folders.values()}
    assert sweep is not None
    jobs = read_mapping(sweep / SWEEP, "runs").get("jobs")
    known = jobs if isinstance(jobs, dict) else {}
    found = {folder: known.get(str(folder.relative_to(sweep))) for folder in folders}
    return {folder: str(job["arm"]) for folder, job in found.items() if isinstance(job, dict) and job.get("arm")}


def tuned_settings(run: Path) -> set[str]:
    """Config paths that the sweep of a run has tuned for each arm by itself."""
    if (sweep := _sweep_of(run)) is None or not (sweep / TUNED).is_file():
        return set()
    tables = read_mapping(sweep / TUNED, "runs").values()
    return {path for table in tables if isinstance(table, dict) for path in table.get("best") or ()}


def planned_looks(folder: Path) -> tuple[int, ...]:
    """Numbers of seeds at which a sweep was planned to be looked at; none where it was in the end only, or is none.

    ConfigError if its record is damaged: without them, intervals would be too narrow.
    """
    return _looks(folder / SWEEP)


def _looks(file: Path) -> tuple[int, ...]:
    if not file.is_file():
        return ()
    looks = read_mapping(file, "runs").get("looks", [])
    if not (isinstance(looks, list) and all(type(n) is int for n in looks)):
        raise ConfigError([Problem("runs", f"{file} is damaged: looks are no numbers of seeds; copy it from a backup")])
    return tuple(looks)


def _by_number(path: Path) -> list[tuple[bool, int, str]]:
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in path.parts]


def _read(folder: Path) -> Run:
    needed = {"environment": (), "match": ("target", "reached"), "summary": ("steps", "val_loss")}
    try:
        config, plan = _load(folder / "config.yaml", "seed"), _load(folder / "plan.json", "steps", "vocab_size")
        environment, match, summary = (
            _load(folder / f"{name}.json", *numbers) if (folder / f"{name}.json").exists() else None
            for name, numbers in needed.items()
        )
        solved = Match(*(match[name] for name in Match._fields)) if match is not None else None
        _check_types(environment or {}, summary or {})
        record.changes(folder)  # which the report tells
        return Run(folder, config, plan, environment or {}, summary, solved, read_metrics(folder))
    except (ValueError, KeyError, ConfigError) as error:
        return Run(folder, {}, {}, {}, None, None, [], broken=f"cannot be read: {error}")


def _check_types(environment: dict[str, Any], summary: dict[str, Any]) -> None:
    """ValueError for what is no mapping, or no text, where all that reads a record takes it for one."""
    git = environment.get("git") or {}
    for name, value in {"git": git, "packages": environment.get("packages", {})}.items():
        if not isinstance(value, dict):
            raise ValueError(f"environment.json: {name} is {value!r}, not a mapping")
    changed = git.get("changed_files") or []
    texts = [git.get("commit") or "", *(changed if isinstance(changed, list) else [changed])]
    overrides = environment.get("overrides") or []
    texts += overrides if isinstance(overrides, list) else [overrides]
    if other := [value for value in texts if not isinstance(value, str)]:
        raise ValueError(f"environment.json: {other[0]!r} is no text")
    for name in ("metrics", "loss_terms", "diverged"):
        if not isinstance(value := summary.get(name) or {}, dict):
            raise ValueError(f"summary.json: {name} is {value!r}, not a mapping")


def _load(file: Path, *numbers: str) -> dict[str, Any]:
    """The mapping in a file; ConfigError if there is none, ValueError if it lacks one of these numbers."""
    content = read_mapping(file)
    for name in numbers:
        if not isinstance(content.get(name), int | float):
            raise ValueError(f"{file.name}: {name} is {content.get(name)!r}, not a number")
    return content


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The numbers of metrics.csv, a mapping for each row with a step; no rows where there is no such file.

    Columns that neither count nor are of training or validation are other callbacks', and left out. ValueError if the
    file has no header, or holds what is no number.
    """
    file = folder / "metrics.csv"
    if not file.is_file():
        return []
    try:
        if not file.stat().st_size:
            raise ValueError("is empty")
        columns, rows = record.read_rows(file)
        if "step" not in columns:
            raise ValueError("has no column `step`")
        known = [name for name in columns if name in COUNTERS or name.startswith(("train/", "val/"))]
        found = [{name: float(row[name]) for name in known if row[name]} for row in rows]
    except (OSError, ValueError) as error:
        raise ValueError(f"{file.name}: {first_line(error)}") from error
    return [row for row in found if "step" in row]


def last_metrics(folder: Path) -> list[dict[str, float]]:
    """The same of a run under way, for a look at it: nothing while the file cannot be read."""
    try:
        return read_metrics(folder)
    except (ValueError, ConfigError):
        return []
