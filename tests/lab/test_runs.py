"""Runs are read back from their records."""

import json
from pathlib import Path

import numpy as np
import pytest
from simulated import FLOPS_PER_TOKEN, SPEED, write_arms, write_run

from thunderhead.lab.runs import Match, read_runs
from thunderhead.training.record import write_json


def test_a_finished_run(tmp_path: Path) -> None:
    match = {"by": "params", "target": 100, "reached": 99, "set": {"model.d_ff": 30}}
    write_run(tmp_path / "run", ["attention=mqa"], seed=7, loss=2.5, match=match)
    (run,) = read_runs([tmp_path / "run"])
    assert (run.seed, run.unfinished, run.results["val_loss"]) == (7, None, 2.5)
    assert run.match == Match("params", 100, 99, {"model.d_ff": 30})
    assert run.overrides == ["attention=mqa"]


def test_seconds_follow_from_the_logged_speeds(tmp_path: Path) -> None:
    (run,) = read_runs([write_run(tmp_path / "run")])
    for curve, points in ((run.training_curve, 10), (run.validation_curve, 5)):
        assert len(curve.loss) == points
        assert np.allclose(curve.seconds, curve.tokens / SPEED)
        assert np.allclose(curve.flops, curve.tokens * FLOPS_PER_TOKEN)
    assert run.validation_curve.loss[-1] == pytest.approx(run.results["val_loss"])


def test_a_run_without_metrics_has_empty_curves(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "metrics.csv").unlink()
    (run,) = read_runs([folder])
    assert run.training_curve.tokens.shape == run.validation_curve.loss.shape == (0,)


def test_runs_below_a_folder_come_by_number_and_once(tmp_path: Path) -> None:
    for number in (10, 9, 1):
        write_run(tmp_path / "sweep" / str(number), seed=number)
    runs = read_runs([tmp_path / "sweep" / "9", tmp_path / "sweep"])
    assert [run.seed for run in runs] == [9, 1, 10]


def test_what_did_not_come_to_its_end_says_why(tmp_path: Path) -> None:
    write_run(tmp_path / "1", steps=40)
    write_run(tmp_path / "2", summary={"val_loss": float("nan")})
    raised = write_run(tmp_path / "3")  # its budget was raised, and it has not been resumed to the end
    write_json(raised / "plan.json", json.loads((raised / "plan.json").read_text()) | {"steps": 200})
    assert [run.unfinished for run in read_runs([tmp_path])] == [
        "unfinished: step 40 of 100",
        "diverged: the final validation loss is nan",
        "unfinished: step 100 of 200",
    ]


def test_all_bad_folders_are_named_at_once(tmp_path: Path) -> None:
    write_arms(tmp_path / "good", {"attention=mha": [3.0]})
    (tmp_path / "empty").mkdir()
    broken = write_run(tmp_path / "broken")
    (broken / "plan.json").write_text("{")
    with pytest.raises(ValueError, match="holds no run") as caught:
        read_runs([tmp_path / "good", tmp_path / "empty", tmp_path / "missing", broken])
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert "empty holds no run" in lines[0]
    assert "missing holds no run" in lines[1]
    assert "broken cannot be read: JSONDecodeError" in lines[2]
