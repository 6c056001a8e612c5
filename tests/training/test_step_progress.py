"""What training says of itself where there is no terminal."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from thunderhead.training.callbacks import progress
from thunderhead.training.record import read_rows


def test_every_loss_stands_beside_its_own_step(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "TELL_SECONDS", 0.0)
    folder = run(
        "callbacks=default", "budget.steps=7", "trainer.log_every_n_steps=3", "validation.every=4", "sample=false"
    )
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [int(line.split()[1].partition("/")[0]) for line in told] == [1, 2, 3, 4, 4, 5, 6, 7, 7]
    rows = {int(row["step"]): row for row in read_rows(folder / "metrics.csv")[1]}
    for line in told:
        step = int(line.split()[1].partition("/")[0])
        if "validation loss" in line:
            assert f"{float(rows[step]['val/loss']):.4f}" in line
        else:
            loss, of = re.findall(r"loss (\S+)(?: \(step (\d+)\))?", line)[0]
            assert (int(of) if of else step) == max(n for n in (1, 3, 6, 7) if n <= step)
            assert loss == f"{float(rows[int(of or step)]['train/loss']):.3f}"
        assert (" left" in line) == (step < 7 and "validation" not in line)


def test_lines_come_now_and_then(run: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    run("callbacks=default", "budget.steps=7", "sample=false")
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in told if "validation" not in line] == ["1/7", "7/7"]
