"""`python compare.py verify=…`: a run of a report trained again."""

import csv
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from simulated import write_arms

from thunderhead.core.config import ConfigError
from thunderhead.lab.verify import verify

ROOT = Path(__file__).parents[2]


def test_the_same_losses_or_which_are_not(run: Callable[..., Path], tmp_path: Path) -> None:
    recorded = run("budget.steps=4", "dropout=gpt2")
    with (tmp_path / "results.csv").open("w", newline="") as file:  # a report names its runs
        csv.writer(file).writerows([["arm", "folder"], ["one", recorded]])

    def verified(reported: Path, name: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "compare.py", f"verify={reported}", f"hydra.run.dir={tmp_path / name}"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    found = verified(tmp_path, "first")
    assert found.returncode == 0, found.stdout + found.stderr
    assert f"losses of {recorded} came out again, equal to the last bit" in found.stdout
    assert (tmp_path / "first" / "summary.json").is_file()

    metrics = (recorded / "metrics.csv").read_text()
    with (recorded / "metrics.csv").open(newline="") as file:
        (loss,) = [row["train/loss"] for row in csv.DictReader(file) if row["step"] == "3"]
    (recorded / "metrics.csv").write_text(metrics.replace(loss, repr(float(loss) + 1e-6)))
    found = verified(recorded, "second")
    assert found.returncode == 1, found.stdout + found.stderr
    assert f"of {recorded} differ, by" in found.stdout
    assert f"first at step 3: train/loss was {float(loss) + 1e-6!r}, and is {float(loss)!r} now" in found.stdout


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
