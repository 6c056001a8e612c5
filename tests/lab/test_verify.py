"""`python compare.py verify=…`: a run of a report trained again."""

import csv
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
from simulated import write_arms

import programs
from thunderhead.core.config import ConfigError
from thunderhead.lab.runs import read_runs
from thunderhead.lab.verify import tell_differences, verify


def test_the_same_losses(run: Callable[..., Path], tmp_path: Path) -> None:
    recorded = run("budget.steps=4", "dropout=gpt2")
    with (tmp_path / "results.csv").open("w", newline="") as file:  # a report names its runs
        csv.writer(file).writerows([["arm", "folder"], ["one", recorded]])
    found = programs.run("compare.py", f"verify={tmp_path}", f"hydra.run.dir={tmp_path / 'again'}")
    assert found.returncode == 0, found.stdout + found.stderr
    assert f"losses of {recorded} came out again, equal to the last bit" in found.stdout
    assert (tmp_path / "again" / "summary.json").is_file()


def test_losses_that_differ(run: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    (drawn,) = read_runs([run("budget.steps=4")])
    changed = deepcopy(drawn)
    (row,) = [row for row in changed.rows if row["step"] == 3]
    loss = row["train/loss"]
    row["train/loss"] += 1e-6
    capsys.readouterr()
    assert tell_differences(changed, drawn) == 1
    told = capsys.readouterr().out
    assert f"Not the same: 1 of {len(drawn.rows) + 1} losses of {drawn.folder} differ, by 1e-06 at most" in told
    assert f"first at step 3: train/loss was {loss + 1e-6!r}, and is {loss!r} now" in told


def test_nothing_to_verify(tmp_path: Path) -> None:
    write_arms(tmp_path / "sweep", {"attention=mha": [float("nan")]})
    with pytest.raises(ConfigError, match=r"^verify: .* holds no finished run"):
        verify(tmp_path / "sweep", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_record_is_not_trusted(run: Callable[..., Path], tmp_path: Path) -> None:
    recorded = run()
    config = recorded / "config.yaml"
    config.write_text(config.read_text().replace("thunderhead.core.model.decoder.Decoder", "os.system"))
    with pytest.raises(ConfigError, match=r"_target_: os\.system is not called"):
        verify(recorded, tmp_path / "out")


def test_a_damaged_record_is_told(run: Callable[..., Path], tmp_path: Path) -> None:
    recorded = run()
    config = recorded / "config.yaml"
    config.write_text(config.read_text() + "\nmore: ${oc.env:SEED} ${budget.steps}\n")
    with pytest.raises(ConfigError, match=r"^verify: .* is more than a text with environment variables"):
        verify(recorded, tmp_path / "out")
