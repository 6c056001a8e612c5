"""Arms on tasks, paired by example and seed."""

import re
from pathlib import Path

import numpy as np
import pytest
from simulated import write_arms

from thunderhead.core.config import ConfigError
from thunderhead.lab import tasks
from thunderhead.lab.analysis import analyse
from thunderhead.lab.report import write_report
from thunderhead.lab.runs import read_runs
from thunderhead.lab.statistics import crossed_interval
from thunderhead.training.record import keep_examples

RIGHT_RSE = np.random.default_rng(0).random((2, 3, 40)) < np.array([0.5, 0.8])[:, None, None]  # R arms


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two arms of three seeds that have done 40 examples of a task."""
    folder = write_arms(tmp_path / "runs", {"attention=mha": [3.0, 3.1, 3.2], "attention=mqa": [3.1, 3.2, 3.25]})
    for number, right_E in enumerate(RIGHT_RSE.reshape(6, 40)):
        keep(folder / str(number), right_E.astype(int).tolist())
    return folder


def keep(run: Path, values: list[int], task: str = "read", examples: str = "a", steps: int = 100) -> None:
    keep_examples(run, "last", {task: {"examples": examples, "scores": {"acc": values}}}, steps)


def rows(folder: Path) -> list[list[str]]:
    return [list(row) for row in tasks.table(analyse(read_runs([folder]))).rows]


def test_the_difference_is_of_the_same_examples_and_seeds(runs: Path, tmp_path: Path) -> None:
    differences_SE = RIGHT_RSE[1].astype(float) - RIGHT_RSE[0]
    found = crossed_interval(differences_SE)
    assert found is not None
    shown = [f"{RIGHT_RSE[1].mean():.4f} / {RIGHT_RSE[0].mean():.4f}", f"+{differences_SE.mean():.4f}"]
    assert rows(runs) == [["read acc", "mqa − mha", *shown, f"−{-found.low:.4f} … +{found.high:.4f}", "3", "40"]]
    html = write_report(tmp_path / "out", read_runs([runs])).read_text()
    assert "<td>mqa − mha</td><td>" + "</td><td>".join(shown) in re.sub(r' data-column=".*?"', "", html)
    keep(runs / "5", [1] * 40, task="other")  # of one arm only: nothing to compare, and no reason for wider intervals
    assert len(rows(runs)) == 1
    keep(runs / "2", [0] * 40, task="other")  # of another row, intervals are wider
    again, other = rows(runs)
    assert float(again[4].partition(" … ")[2]) > found.high + 0.1
    assert other[0] == "other acc"
    assert other[3:] == ["+1.0000", "–", "1", "40"]


def test_other_examples_are_not_compared(runs: Path) -> None:
    keep(runs / "4", [1] * 40, examples="b")
    assert rows(runs)[0][3:] == ["–", "not compared: other examples", "3", "40"]
    keep(runs / "4", [1] * 10)
    assert rows(runs)[0][3:] == ["–", "not compared: other examples", "3", "40 / 10"]


def test_what_was_measured_before_a_run_went_on_does_not_count(runs: Path) -> None:
    keep(runs / "4", [1] * 10, steps=50)
    assert rows(runs)[0][-2:] == ["2", "40"]


def test_a_damaged_file_is_named(runs: Path) -> None:
    (runs / "4" / "task_examples.json").write_text('{"last": {"read": {"scores": 3}}}')
    with pytest.raises(ConfigError, match=r"4/task_examples\.json is damaged"):
        rows(runs)
