"""The files of a run: appended, rewritten and never half there."""

import csv
import json
import os
import re
import statistics
from pathlib import Path

import numpy as np
import pytest

from thunderhead import disk
from thunderhead.core.config import ConfigError
from thunderhead.training import record
from thunderhead.training.record import MetricsCsv, read_rows, read_summary


def rows(path: Path) -> list[dict[str, str]]:
    return read_rows(path)[1]


def test_rows_are_appended(tmp_path: Path) -> None:
    logger = MetricsCsv(str(tmp_path))
    logger.log_metrics({"loss": 3.5}, step=1)
    logger.log_metrics({"loss": 2.5}, step=2)
    assert logger.path.read_text() == "step,loss\n1,3.5\n2,2.5\n"


def test_a_new_column_keeps_the_rows(tmp_path: Path) -> None:
    logger = MetricsCsv(str(tmp_path))
    logger.log_metrics({"loss": 3.5}, step=1)
    logger.log_metrics({"val": 1.0}, step=2)
    logger.log_metrics({"loss": 2.5, "val": 0.5}, step=3)
    assert logger.path.read_text() == "step,loss,val\n1,3.5,\n2,,1.0\n3,2.5,0.5\n"


def test_a_second_logger_goes_on(tmp_path: Path) -> None:
    MetricsCsv(str(tmp_path)).log_metrics({"loss": 3.5}, step=1)
    MetricsCsv(str(tmp_path)).log_metrics({"loss": 2.5, "lr": 0.1}, step=2)
    assert rows(tmp_path / "metrics.csv") == [
        {"step": "1", "loss": "3.5", "lr": ""},
        {"step": "2", "loss": "2.5", "lr": "0.1"},
    ]


def test_forget_from(tmp_path: Path) -> None:
    logger = MetricsCsv(str(tmp_path))
    assert logger.forget_from(3) == {}  # nothing there yet
    for step in range(1, 6):
        logger.log_metrics({"loss": float(step), "val": float(step)} if step == 4 else {"loss": float(step)}, step=step)
    assert logger.forget_from(4) == {"loss": 4.0, "val": 4.0}
    logger.log_metrics({"loss": 40.0}, step=4)
    assert [row["step"] for row in rows(logger.path)] == ["1", "2", "3", "4"]
    assert rows(logger.path)[-1]["loss"] == "40.0"


def test_a_row_cut_off_by_a_crash_is_left_out(tmp_path: Path) -> None:
    logger = MetricsCsv(str(tmp_path))
    logger.log_metrics({"loss": 1.0, "lr": 0.5}, step=1)
    with logger.path.open("a") as file:
        file.write("2,0.")  # the kill came here
    assert [row["step"] for row in rows(logger.path)] == ["1"]
    MetricsCsv(str(tmp_path)).forget_from(2)
    MetricsCsv(str(tmp_path)).log_metrics({"loss": 0.9, "lr": 0.5}, step=2)
    assert [row["loss"] for row in rows(logger.path)] == ["1.0", "0.9"]


def test_write_text_replaces_or_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "new" / "file.txt"
    disk.write_text(file, "old")
    assert file.read_text() == "old"
    assert file.stat().st_mode & 0o777 == 0o644

    def crash(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", crash)
        with pytest.raises(OSError, match="disk full"):
            disk.write_text(file, "new")
    assert file.read_text() == "old"
    assert list(file.parent.iterdir()) == [file]  # no litter


def test_json_and_summary(tmp_path: Path) -> None:
    assert read_summary(tmp_path) is None
    record.write_json(tmp_path / "summary.json", results := {"steps": 2, "val_loss": 1.5})
    assert read_summary(tmp_path) == results


def test_surroundings_can_be_written_as_json() -> None:
    found = json.loads(json.dumps(record.surroundings()))
    assert {"command", "python", "platform", "packages", "git"} <= found.keys()
    assert "torch" in found["packages"]


def test_no_git_is_no_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(record, "REPOSITORY", tmp_path)
    assert record.git_state() is None


def test_spikes_of_the_loss_are_found(tmp_path: Path) -> None:
    """Against the definition, step by step; a run's own beginning, where the loss falls, is none."""
    noise = np.random.default_rng(0).normal(0, 0.01, 2000)
    losses = 3 + 7 * np.exp(-np.arange(2000) / 30) + noise
    losses[[1200, 1700]] += 0.5
    losses[1800] -= 0.5  # a fall is none
    rows = [{"step": 10 * (i + 1), "train/loss": repr(float(loss))} for i, loss in enumerate(losses)]
    rows += [{"step": 20_001, "train/loss": ""}]  # a row of validation alone
    record.write_rows(tmp_path / "metrics.csv", ["step", "train/loss"], rows)
    expected = []
    for i in range(30, 2000):
        before = [float(loss) for loss in losses[max(0, i - 1000) : i]]
        if losses[i] - statistics.fmean(before) >= 7 * statistics.pstdev(before):
            expected.append(10 * (i + 1))
    assert record.loss_spikes(tmp_path) == expected == [12_010, 17_010]
    assert record.loss_spikes(tmp_path / "nowhere") == []


def test_a_link_in_the_place_of_staged_files_leads_nowhere(tmp_path: Path) -> None:
    """As a run's folder of somebody else may hold it."""
    run, others = tmp_path / "run", tmp_path / "others"
    others.mkdir()
    (others / "letter.txt").write_text("dear")
    run.mkdir()
    (run / record.STAGED).symlink_to(others)
    record.discard(run)
    record.stage(run, {"plan.json": "{}"})
    record.take_over(run)
    assert (others / "letter.txt").read_text() == "dear"
    assert sorted(file.name for file in run.iterdir()) == ["plan.json"]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("step,train/loss\n1,2.0\n2,abc\n3,2.0\n", "line 3: 'abc' is no number"),
        ("step,train/loss\n1,2.0\n,1.0\n", "line 3: '' is no step"),
        ("step,train/loss\n1.5,2.0\n", "line 2: '1.5' is no step"),
        ("step,train/loss\ninf,2.0\n", "line 2: 'inf' is no step"),
        ("step,train/loss\n1,2.0,3.0\n", "line 2, or after it: it has more cells than there are columns"),
        ("step,step,train/loss\n1,1,2.0\n", "line 1: two columns are called step"),
        (f"step,train/loss\n1,{'2' * 140_000}\n", "line 2, or after it: field larger than"),
        ("step,train/loss\n1,2.0\n".encode("utf-16"), "line 1: 'utf-8' codec can't decode"),
        (b"step,train/loss\n" + b"1,2.0\n" * 5000 + b"\xff", "line "),
    ],
)
def test_damaged_metrics_are_told_with_their_place(
    content: str | bytes, why: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = tmp_path / "metrics.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = csv.field_size_limit(131_072)  # Python's; libraries raise it for the whole process
    request.addfinalizer(lambda: csv.field_size_limit(before))
    with pytest.raises(ConfigError, match=re.escape(f"{path} is damaged ({why}")):
        MetricsCsv(str(tmp_path)).forget_from(3)
    if "is no step" not in why:
        with pytest.raises(ConfigError, match=re.escape(f"{path} is damaged ({why}")):
            record.loss_spikes(tmp_path)
