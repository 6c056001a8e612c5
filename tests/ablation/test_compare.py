"""`python compare.py` from outside: a report, or one clear refusal."""

import subprocess
import sys
from pathlib import Path

from simulated import write_arms

from thunderhead.ablation.compare import commas_to_list

ROOT = Path(__file__).parents[2]


def compare(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "compare.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_runs_of_several_sweeps(tmp_path: Path) -> None:
    write_arms(tmp_path / "a", {"attention=mha": [3.0, 3.1, 3.2]})
    write_arms(tmp_path / "b", {"attention=mqa": [3.05, 3.16, 3.25]})
    folders = f"runs={tmp_path / 'a'},{tmp_path / 'b'}"
    finished = compare(folders, "baseline=mqa", f"hydra.run.dir={tmp_path / 'out'}")
    assert finished.returncode == 0, finished.stderr
    assert "mha − mqa = −0.053 nats (95 % CI −0.068 … −0.039, 3 seeds" in finished.stdout
    assert {"report.html", "results.csv", "figures", "hparams"} <= {file.name for file in (tmp_path / "out").iterdir()}


def test_a_refusal_leaves_nothing(tmp_path: Path) -> None:
    write_arms(tmp_path / "a", {"attention=mha": [3.0], "attention=mqa": [3.1]})
    refused = compare(f"runs={tmp_path / 'a'}", "baseline=mla", f"hydra.run.dir={tmp_path / 'out'}")
    assert refused.returncode == 2
    assert "baseline no arm is called 'mla'" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "out").exists()


def test_commas_make_a_list() -> None:
    arguments = ["compare.py", "runs=a,b", "runs=[a,b]", "baseline=x"]
    assert commas_to_list(arguments) == ["compare.py", "runs=[a,b]", "runs=[a,b]", "baseline=x"]
