"""Callbacks of Lightning are used as usual, from the command line."""

from collections.abc import Callable
from pathlib import Path

import pytest

from thunderhead.core.config import read_mapping
from thunderhead.lab.runs import read_runs
from thunderhead.training import resume

EARLY_STOPPING = (
    "+callbacks.early_stopping={_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val/loss, min_delta: 100,"
    " patience: 1}"
)


def test_early_stopping_ends_a_run_as_if_it_were_done(
    run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run("budget.steps=8", "validation.every=2", "callbacks=default", EARLY_STOPPING)
    summary = read_mapping(folder / "summary.json")
    assert summary["stopped_early"]
    assert summary["steps"] == 4  # the second validation is not better by 100 nats
    assert summary["tokens"] == 4 * read_mapping(folder / "plan.json")["tokens_per_step"]
    assert sum(source["tokens"] for source in summary["ledger"].values()) == summary["tokens"]
    assert (folder / "sample.txt").read_text()
    assert "ended early, at step 4 of 8: a callback stopped the run" in capsys.readouterr().out
    assert resume.is_finished(folder)


def test_a_report_leaves_a_run_out_that_a_callback_ended(run: Callable[..., Path]) -> None:
    """Its learning rate never came to the end of its schedule."""
    folder = run("budget.steps=8", "validation.every=2", EARLY_STOPPING)
    (found,) = read_runs([folder])
    assert found.unfinished == "stopped early by a callback: step 4 of 8"
