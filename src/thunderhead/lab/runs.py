"""Finished and unfinished runs, read back from their records; nothing here trains or writes.

A run folder holds config.yaml, plan.json, environment.json, metrics.csv and, once finished, summary.json (see
`thunderhead.training.record`). A sweep that matched its arms adds match.json:

    {"by": "params", "target": 3196608, "reached": 3196416, "set": {"model.d_ff": 530}}
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray

from thunderhead.training.record import read_rows, read_summary

Array = NDArray[np.float64]


class Failure(NamedTuple):
    """A run that has no result, for the report's list: which one, and why."""

    run: str  # its folder, or the overrides that name it
    reason: str  # one line


class Match(NamedTuple):
    """What a sweep made equal between its arms: the content of match.json."""

    by: str  # params | flops | time
    target: float
    reached: float
    set: dict[str, Any]  # config paths that were solved for, with their values


class Curve(NamedTuple):
    """Losses on the way, each at tokens, FLOPs and seconds of training (without validation) so far."""

    tokens: Array
    flops: Array
    seconds: Array
    loss: Array


@dataclass(frozen=True)
class Run:
    """One run's record."""

    folder: Path
    config: dict[str, Any]
    plan: dict[str, Any]
    environment: dict[str, Any]
    summary: dict[str, Any] | None
    match: Match | None

    @property
    def seed(self) -> int:
        """Runs of equal seed start from the same weights and see the same tokens: they are pairs."""
        return int(self.config["seed"])

    @property
    def overrides(self) -> list[str]:
        """What was typed behind `python train.py`."""
        return list(self.environment.get("overrides") or [])

    @cached_property
    def unfinished(self) -> str | None:
        """Why this run cannot be compared; None if it came to the end of its schedule with a finite loss."""
        if self.summary is None or self.summary["steps"] < self.plan["steps"]:
            rows = self._rows
            step = int(rows[-1]["step"]) if rows else 0
            why = "stopped early by a callback" if (self.summary or {}).get("stopped_early") else "unfinished"
            return f"{why}: step {step:,} of {self.plan['steps']:,}"
        if not math.isfinite(self.summary["val_loss"]):
            return f"diverged: the final validation loss is {self.summary['val_loss']}"
        return None

    @property
    def results(self) -> dict[str, Any]:
        """The summary of a finished run."""
        assert self.summary is not None
        return self.summary

    @cached_property
    def training_curve(self) -> Curve:
        """The training loss at each logged step."""
        return self._curve("train/loss")

    @cached_property
    def validation_curve(self) -> Curve:
        """The validation loss at each validation, the last one included."""
        return self._curve("val/loss")

    @cached_property
    def bits_per_byte_curve(self) -> Curve:
        """Bits per byte at each validation."""
        return self._curve("val/bits_per_byte")

    @cached_property
    def _rows(self) -> list[dict[str, str]]:
        path = self.folder / "metrics.csv"
        return read_rows(path)[1] if path.is_file() else []

    def _curve(self, column: str) -> Curve:
        """A column of metrics.csv; the seconds are those that the logged tokens took at their logged speeds."""
        points: list[tuple[float, float, float, float]] = []
        seconds = tokens_before = 0.0
        for row in self._rows:
            tokens = float(row["tokens"])
            if row.get("tokens_per_second"):
                seconds += (tokens - tokens_before) / float(row["tokens_per_second"])
                tokens_before = tokens
            if row.get(column):
                points.append((tokens, float(row["flops"]), seconds, float(row[column])))
        return Curve(*np.array(points, dtype=np.float64).reshape(-1, 4).T)


def read_runs(folders: Iterable[Path | str]) -> list[Run]:
    """The runs in these folders: run folders, or folders above them such as a sweep's; unfinished ones too.

    Args:
        folders: in this order; runs below one folder by name, numbers as numbers. A run found twice counts once.

    Raises:
        ValueError: a folder is not there or holds no run, or a record cannot be read; names all such folders.
    """
    found: dict[Path, Run] = {}
    problems = []
    for folder in map(Path, folders):
        records = sorted((path.parent for path in folder.rglob("plan.json")), key=_by_number)
        records = [record for record in records if (record / "config.yaml").is_file()]
        if not records:
            problems.append(f"{folder} holds no run (a run has config.yaml and plan.json): give logs/runs/… or a sweep")
        for record in records:
            try:
                found.setdefault(record.resolve(), _read(record))
            except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
                problems.append(f"{record} cannot be read: {type(error).__name__} {str(error).strip().splitlines()[0]}")
    if problems:
        raise ValueError("\n".join(problems))
    return list(found.values())


def _by_number(path: Path) -> list[tuple[bool, int, str]]:
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in path.parts]


def _read(folder: Path) -> Run:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    plan = json.loads((folder / "plan.json").read_text())
    environment, match = (
        {} if not (folder / n).exists() else json.loads((folder / n).read_text())
        for n in ("environment.json", "match.json")
    )
    run = Run(folder, config, plan, environment, read_summary(folder), Match(**match) if match else None)
    _ = run.seed, run.plan["steps"], run.summary is None or run.summary["val_loss"]
    return run
