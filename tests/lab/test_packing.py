"""`n_jobs=auto`: how many runs at once, found by running stand-ins whose speed depends on it."""

import json
import os
import sys
from pathlib import Path

import pytest

from thunderhead.lab import packing
from thunderhead.lab.jobs import Job
from thunderhead.lab.packing import CHOSEN, Unmeasured

# Trains until it is killed; of 1, 2, 4 or 8 beside each other each makes so many tokens a second.
TRAINING = """
import json, os, pathlib, sys, time
folder = pathlib.Path(next(a for a in sys.argv if a.startswith("hydra.run.dir=")).partition("=")[2])
started = folder.parent.parent / "started"
with started.open("a") as file:
    print(folder.name, os.getpid(), os.environ.get("OMP_NUM_THREADS"), file=file, flush=True)
(folder / "plan.json").write_text(json.dumps({"memory": {"weights": 1000}, "accelerator": "cpu"}))
n = int(folder.name.partition("-")[0])
if n == int(os.environ.get("FAILS_AT", "0")):
    sys.exit("a wire broke")
with (folder / "metrics.csv").open("w", buffering=1) as metrics:
    print("step,tokens_per_second", file=metrics)
    for step in range(10**9):
        print(f"{step},{1 if step < 2 else {1: 1000, 2: 800, 4: 300, 8: 300}[n]}", file=metrics)
        time.sleep(0.02)
"""


@pytest.fixture
def jobs(tmp_path: Path) -> list[Job]:
    config = {"trainer": {}, "logger": {}, "validation": {"every": "auto"}}
    return [Job({"seed": str(seed)}, config, tmp_path / f"run-{seed}") for seed in range(9)]


@pytest.fixture
def unmeasured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Unmeasured:
    monkeypatch.setattr(packing, "SECONDS", 0.2)
    monkeypatch.setattr(packing, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(packing, "allowed_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    program = tmp_path / "training.py"
    program.write_text(TRAINING)
    return Unmeasured((sys.executable, str(program)), imports=())


def started(folder: Path) -> list[list[str]]:
    return [line.split() for line in (folder / "started").read_text().splitlines()]


def test_the_fastest_number_is_taken(
    unmeasured: Unmeasured, jobs: list[Job], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """1, 2 and 4 at a time make 1,000, 1,600 and 1,200 tokens/s: 8 are not tried any more."""
    executor, told = unmeasured.measured(jobs, tmp_path / "sweep")
    assert executor.free() == 2
    assert "2 at a time" in told
    assert "1 at a time 1,000, 2 at a time 1,600, 4 at a time 1,200" in told
    assert capsys.readouterr().out.count("tokens/s") == 3
    tried = started(tmp_path / "sweep")
    assert sorted(name for name, _, _ in tried) == ["1-1", "2-1", "2-2", "4-1", "4-2", "4-3", "4-4"]
    assert [threads for name, _, threads in tried if name[0] == "1"] == ["None"]  # all cores
    assert not any(Path("/proc", pid).exists() for _, pid, _ in tried)  # they were ended
    assert sorted(file.name for file in (tmp_path / "sweep").iterdir()) == [CHOSEN, "started"]
    again, same = unmeasured.measured(jobs, tmp_path / "sweep")  # as after a stop: known
    assert (again.free(), same) == (2, told)
    assert len(started(tmp_path / "sweep")) == len(tried)


def test_no_more_than_jobs_and_memory(
    unmeasured: Unmeasured, jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert unmeasured.measured(jobs[:1], tmp_path / "few")[0].free() == 1
    assert [name for name, _, _ in started(tmp_path / "few")] == ["1-1"]
    monkeypatch.setattr(packing, "free_host_memory", lambda: 2 * packing.PROCESS_BYTES + 1999)
    assert unmeasured.measured(jobs, tmp_path / "small")[0].free() == 1
    assert [name for name, _, _ in started(tmp_path / "small")] == ["1-1"]


@pytest.mark.parametrize(("fails_at", "n_jobs"), [("2", 1), ("1", 1)])
def test_runs_that_fail_are_not_what_is_taken(
    fails_at: str,
    n_jobs: int,
    unmeasured: Unmeasured,
    jobs: list[Job],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Too little memory of a GPU for two; or a run that fails by itself, which the sweep will tell."""
    monkeypatch.setenv("FAILS_AT", fails_at)
    assert unmeasured.measured(jobs, tmp_path / "sweep")[0].free() == n_jobs
    assert f"{fails_at} at a time: failed: a wire broke" in capsys.readouterr().out
    assert (tmp_path / "sweep" / CHOSEN).is_file() == (fails_at == "2")
    if fails_at == "2":
        rates = json.loads((tmp_path / "sweep" / CHOSEN).read_text())["tokens_per_second"]
        assert rates == {"1": 1000, "2": 0}
    assert os.listdir(tmp_path / "sweep").count("started") == 1


def test_a_trial_writes_for_nobody() -> None:
    config = {"trainer": {"devices": 1}, "logger": {"wandb": {}}, "validation": {"every": 3}, "sample": True, "seed": 1}
    trial = packing._trial(config)
    assert trial["logger"] == {"csv": {"_target_": "thunderhead.training.record.MetricsCsv"}}
    assert trial["trainer"] == {"devices": 1, "log_every_n_steps": 1}
    assert not trial["sample"]
    assert trial["validation"]["every"] > 10**9
    assert config["logger"] == {"wandb": {}}  # left alone
