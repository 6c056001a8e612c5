"""Runs are read back from their records."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from simulated import FLOPS_PER_TOKEN, SPEED, TOKENS_PER_STEP, write_arms, write_run

from thunderhead.core.config import ConfigError
from thunderhead.lab.analysis import analyse
from thunderhead.lab.runs import Curve, Match, Run, looks_of, read_runs, recorded_names
from thunderhead.training.record import write_json


def test_a_finished_run(tmp_path: Path) -> None:
    match = {"by": "params", "target": 100, "reached": 99, "set": {"model.d_ff": 30}}
    write_run(tmp_path / "run", ["attention=mqa"], seed=7, loss=2.5, match=match)
    (run,) = read_runs([tmp_path / "run"])
    assert (run.seed, run.unfinished, run.result("val_loss")) == (7, None, 2.5)
    assert run.match == Match("params", 100, 99, {"model.d_ff": 30})
    assert run.environment["overrides"] == ["attention=mqa"]


def test_seconds_follow_from_the_logged_speeds(tmp_path: Path) -> None:
    (run,) = read_runs([write_run(tmp_path / "run")])
    for curve, points in ((run.curve("train/loss"), 10), (run.curve("val/loss"), 5)):
        assert len(curve.loss) == points
        assert np.allclose(curve.seconds, curve.tokens / SPEED)
        assert np.allclose(curve.flops, curve.tokens * FLOPS_PER_TOKEN)
    assert run.curve("val/loss").loss[-1] == pytest.approx(run.result("val_loss"))


def test_a_run_without_metrics_has_empty_curves(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "metrics.csv").unlink()
    (run,) = read_runs([folder])
    assert run.curve("train/loss").tokens.shape == run.curve("val/loss").loss.shape == (0,)


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
    nan = float("nan")
    write_run(tmp_path / "4", summary={"val_loss": nan, "steps": 40, "diverged": {"step": 37, "what": "the loss"}})
    assert [run.unfinished for run in read_runs([tmp_path])] == [
        "unfinished: step 40 of 100",
        "diverged: the final validation loss is nan",
        "unfinished: step 100 of 200",
        "diverged at step 37 of 100",
    ]


@pytest.mark.parametrize(("losses", "val_loss", "diverged"), [
    ((9.0, 6.0, 9.7), 9.6, True),
    ((9.0, 6.0, 9.7), 8.9, False),  # the last batch was a hard one
    ((9.0, 6.0, 5.0), 9.6, False),  # validated on other text
    ((5.0, 5.1), 4.9, False),
    ((2.1, 2.6, 2.4), 2.3, False),  # it begins with an easy batch, as weights of init_from may, and is below chance
])  # fmt: skip
def test_a_loss_that_ends_above_its_start_is_diverged(
    losses: tuple[float, ...], val_loss: float, diverged: bool, tmp_path: Path
) -> None:
    write_run(tmp_path / "run", summary={"val_loss": val_loss})
    rows = [f"{step},{loss}" for step, loss in zip((1, 50, 100), losses, strict=False)]
    (tmp_path / "run" / "metrics.csv").write_text("\n".join(["step,train/loss", *rows, ""]))
    (run,) = read_runs([tmp_path])
    assert run.diverged == diverged
    assert run.unfinished == ("diverged: it ends at a validation loss of 9.6, and began at 9" if diverged else None)


def test_all_folders_without_a_run_are_named_at_once(tmp_path: Path) -> None:
    write_arms(tmp_path / "good", {"attention=mha": [3.0]})
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no run") as caught:
        read_runs([tmp_path / "good", tmp_path / "empty", tmp_path / "missing"])
    assert [Path(problem.message.split()[0]).name for problem in caught.value.problems] == ["empty", "missing"]


# --- records of any loggers and callbacks ---------------------------------------------------------------------------


def with_rows(folder: Path, *lines: str) -> Run:
    write_run(folder)
    (folder / "metrics.csv").write_text("\n".join([*lines, ""]))
    return read_runs([folder])[0]


def test_what_is_not_in_a_row_was_not_measured(tmp_path: Path) -> None:
    """One row a step with all values, rows of others alone, in columns of their own, with blanks, without tokens."""
    run = with_rows(
        tmp_path / "run",
        "step,lr-AdamW,tokens,flops,train/loss,tokens_per_second,val/loss,mine,train/balance,val/accuracy",
        "9,0.1,,,,,,text,,",
        "10,,10000,5e8,4.0,5000,3.9,,0.02,0.5",
        ",,,,,,,,,",
        "20,0.2,20000,1e9,3.5,5000,,,0.01,",
        "30,,,,,,3.4,,,",
        "40,0.1,40000,2e9,nan,5000,3.3",
    )
    assert run.unfinished is None
    assert list(run.curve("train/loss").loss) == [4.0, 3.5]
    validated = run.curve("val/loss")
    assert list(validated.loss) == [3.9, 3.4]  # the last row was cut off
    assert list(validated.tokens) == [10_000, 30 * TOKENS_PER_STEP]
    assert list(validated.flops) == [5e8, 30 * TOKENS_PER_STEP * FLOPS_PER_TOKEN]
    assert list(run.curve("val/accuracy").loss) == [0.5]
    assert run.loss_terms == {"train/balance": 0.01}
    assert run.curve("val/nothing").loss.size == 0


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("metrics.csv", "", "metrics.csv: is empty"),
        ("metrics.csv", "1,2,3\n4,5,6\n", "metrics.csv: has no column `step`"),
        ("metrics.csv", "step,train/loss\n10,4.0\n20,much\n", "metrics.csv: could not convert string to float: 'much'"),
        (
            "metrics.csv",
            "step,step,train/loss\n1,1,4.0\n",
            "metrics.csv is damaged (line 1: two columns are called step)",
        ),
        ("metrics.csv", "step,train/loss\n1,4.0\n".encode("utf-16"), "metrics.csv is damaged (line 1: "),
        ("summary.json", '{"val_loss": 3.0, "st', "summary.json is damaged ("),
        ("summary.json", '{"steps": 100}', "summary.json: val_loss is None"),
        ("summary.json", "[" * 100_000, "summary.json is damaged ("),
        ("plan.json", "[]", "plan.json is damaged (it is no mapping)"),
        ("config.yaml", "a: [", "config.yaml is damaged ("),
        ("config.yaml", "name: x", "config.yaml: seed"),
        ("changes.json", '{"changes": null}', "changes.json is damaged (changes: "),
        ("changes.json", '{"changes": 3}', "changes.json is damaged (changes: "),
        ("changes.json", '{"changes": [3]}', "changes.json is damaged (changes.0: "),
        ("changes.json", "[1]", "changes.json is damaged (it is no mapping)"),
        ("changes.json", b"\x80", "changes.json is damaged ("),
    ],
)
def test_a_broken_record_is_told_and_the_others_are_compared(
    tmp_path: Path, file: str, content: str | bytes, reason: str
) -> None:
    write_arms(tmp_path, {"attention=mha": [3.0, 3.1], "attention=mqa": [3.1, 3.3, 3.4]})
    (tmp_path / "4" / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    runs = read_runs([tmp_path])
    assert len(runs) == 5
    found = analyse(runs, baseline="mha")
    assert [arm.name for arm in found.arms] == ["mha", "mqa"]
    assert found.comparisons[0].n == 2
    (left,) = found.left_out
    assert left.run == str(tmp_path / "4")
    assert reason in left.reason


@pytest.mark.parametrize("file", ["plan.json", "environment.json", "summary.json"])
def test_a_named_pipe_is_not_waited_for(file: str, tmp_path: Path) -> None:
    (place := write_run(tmp_path / "run") / file).unlink()
    os.mkfifo(place)
    write_run(tmp_path / "whole", seed=2)
    broken, whole = read_runs([tmp_path])
    assert "is damaged (it is no file)" in broken.broken
    assert whole.unfinished is None


# --- what training cost until it reached a loss ---------------------------------------------------------------------

CURVE = Curve(*(np.array(v, float) for v in ([10, 20, 30], [100, 200, 300], [1, 2, 3], [5.0, 3.0, 2.0])))


def test_between_validations_the_loss_is_a_line() -> None:
    assert CURVE.cost_to_reach(4.0) == (15, 150, 1.5)
    assert CURVE.cost_to_reach(2.0) == (30, 300, 3)


def test_the_first_validation_is_the_earliest_answer_and_never_is_none() -> None:
    assert CURVE.cost_to_reach(6.0) == (10, 100, 1)
    assert CURVE.cost_to_reach(1.9) is None


def test_the_first_time_counts() -> None:
    loss = np.array([5.0, 3.0, 4.0, 2.0])
    curve = Curve(np.arange(1.0, 5.0), np.arange(1.0, 5.0), np.arange(1.0, 5.0), loss)
    assert curve.cost_to_reach(3.0) == (2, 2, 2)


def test_trials_and_measured_speeds_of_a_sweep_are_no_part_of_it(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    for place in ("tuning/a", "speed/a", "b", "deeper/tuning"):
        write_run(sweep / place)
    write_run(tmp_path / "no_sweep" / "tuning" / "c")
    write_json(sweep / "sweep.json", {"arguments": []})
    found = [run.folder.relative_to(tmp_path) for run in read_runs([tmp_path])]
    assert [str(place) for place in found] == ["no_sweep/tuning/c", "sweep/b", "sweep/deeper/tuning"]
    for asked in (sweep / "tuning", sweep / "tuning" / "a"):
        assert len(read_runs([asked])) == 1


@pytest.mark.parametrize("name", ["config.yaml", "plan.json", "environment.json"])
def test_a_run_that_lacks_a_part_is_listed(name: str, tmp_path: Path) -> None:
    write_run(tmp_path / "whole")
    (write_run(tmp_path / "cut") / name).unlink()
    cut, whole = read_runs([tmp_path])
    assert whole.unfinished is None
    assert name == "environment.json" or f"{name} is damaged" in str(cut.unfinished)


@pytest.mark.parametrize(
    ("file", "changed"),
    [
        *(("environment.json", {"git": git}) for git in ("x", [1], {"commit": 5}, {"changed_files": [1]})),
        *(("environment.json", {"packages": value}) for value in (None, "x", [1])),
        ("environment.json", {"overrides": [1]}),
        *(("summary.json", {"metrics": value}) for value in ("x", -1, [1], True)),
        ("summary.json", {"loss_terms": 3}),
    ],
)
def test_records_of_wrong_types_are_told(file: str, changed: dict[str, object], tmp_path: Path) -> None:
    write_run(tmp_path / "1")
    broken = write_run(tmp_path / "2", seed=2)
    write_json(broken / file, json.loads((broken / file).read_text()) | changed)
    runs = read_runs([tmp_path])
    assert f"cannot be read: {file}" in str(runs[1].unfinished)
    assert analyse(runs).left_out


def test_looks_are_those_of_the_run_and_of_its_sweep(tmp_path: Path) -> None:
    write_json(write_run(tmp_path / "sweep" / "1") / "looks.json", {"looks": [2, 3]})
    assert looks_of([tmp_path / "sweep" / "1"]) == {2, 3}
    write_json(tmp_path / "sweep" / "sweep.json", {"looks": [3, 4]})
    assert looks_of([tmp_path / "sweep" / "1"]) == {2, 3, 4}


def test_a_sweep_names_its_arms(tmp_path: Path) -> None:
    folders = write_run(tmp_path / "one" / "a"), write_run(tmp_path / "one" / "b", seed=2)
    write_json(tmp_path / "one" / "sweep.json", {"jobs": {"a": {"arm": "mine"}, "b": {"arm": "mine"}}})
    assert recorded_names(read_runs([tmp_path])) == dict.fromkeys(folders, "mine")
    other = write_run(tmp_path / "two" / "a")
    assert recorded_names(read_runs([tmp_path])) == {}  # the same name may be of another arm there
    assert recorded_names(read_runs([other])) == {}
