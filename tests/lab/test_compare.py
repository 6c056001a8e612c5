"""`python compare.py` from outside: a report, or one clear refusal."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from simulated import write_arms, write_run

from thunderhead.lab.compare import commas_to_list
from thunderhead.options.scaling_law import read_law

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


def test_a_scaling_law_of_finished_runs(tmp_path: Path) -> None:
    """Sizes and budgets of their own choice; the largest run is held out."""
    for index, (n, tokens) in enumerate(itertools.product((1e4, 3e4, 1e5, 3e5), (1e6, 4e6, 2e7))):
        results = {"tokens": tokens, "flops": 6 * n * tokens, "val_loss": 1 + 20 / n**0.3 + 50 / tokens**0.3}
        write_run(tmp_path / "runs" / str(index), summary=results, plan={"parameters": {"total": n}})
    arguments = (f"runs={tmp_path / 'runs'}", f"hydra.run.dir={tmp_path / 'out'}")
    finished = compare(*arguments, "scaling=total", "fit_up_to=2e13")
    assert finished.returncode == 0, finished.stderr
    assert "The held-out run of 300 k parameters on 20 M tokens" in finished.stdout
    law = read_law(tmp_path / "out" / "law.json")
    assert (law.E, law.alpha, law.beta, law.flops_coefficient) == pytest.approx((1, 0.3, 0.3, 6), rel=0.01)

    refused = compare(*arguments, "scaling=total", "baseline=mha")
    assert refused.returncode == 2
    assert "baseline is of a comparison of arms" in refused.stderr
    refused = compare(*arguments, "fit_up_to=2e13")
    assert refused.returncode == 2
    assert "fit_up_to is of a scaling law: add scaling=total" in refused.stderr


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
