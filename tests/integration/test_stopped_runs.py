"""Ctrl-C and SIGTERM end a run after the step under way, with a checkpoint to go on from."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from thunderhead.training.record import REPOSITORY, read_rows
from tiny import tiny

STEPS = 2000  # minutes, if nobody stops it


def train_py(*overrides: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "train.py", *overrides],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for_steps(process: subprocess.Popen[str], run_dir: Path) -> None:
    metrics = run_dir / "metrics.csv"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(read_rows(metrics)[1]) >= 3):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(("devices", "number"), [(1, signal.SIGINT), (1, signal.SIGUSR1), (2, signal.SIGTERM)])
def test_a_signal_stops_and_saves(
    devices: int, number: signal.Signals, text_corpus: Path, shards_dir: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    lines = tiny(text_corpus, shards_dir, "callbacks=default", "validation.every=1000")
    lines += [f"budget.steps={STEPS}", f"trainer.devices={devices}", f"hydra.run.dir={run_dir}"]
    process = train_py(*lines, "data.num_workers=1")
    wait_for_steps(process, run_dir)
    if number == signal.SIGINT:  # as a terminal does
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    assert "Traceback" not in output
    assert f"go on with: python train.py resume={run_dir}" in output
    assert not (run_dir / "summary.json").exists()

    reached = int(read_rows(run_dir / "metrics.csv")[1][-1]["step"])
    resumed = train_py(f"resume={run_dir}", f"budget.steps={reached + 5}")
    output, _ = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, output
    steps = [int(row["step"]) for row in read_rows(run_dir / "metrics.csv")[1] if row["train/loss"]]
    assert steps == list(range(1, reached + 6))
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == reached + 5


def test_a_signal_ends_a_long_validation(text_corpus: Path, shards_dir: Path, tmp_path: Path) -> None:
    """The last validation, too: the run is saved within it, and makes it up."""
    run_dir = tmp_path / "run"
    slow = "+callbacks.slow={_target_: slow_validation.SlowValidation, seconds: 1.0}"
    lines = tiny(text_corpus, shards_dir, "callbacks=default", "data.max_validation_tokens=4096", "budget.steps=3")
    process = train_py(*lines, slow, f"hydra.run.dir={run_dir}")
    deadline = time.monotonic() + 120
    while not (run_dir / "validating").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "Traceback" not in output
    assert "stopped at step 3 of 3; go on with: " in output

    resumed = train_py(f"resume={run_dir}", "++callbacks.slow.seconds=0.0", "trust=[slow_validation]")
    output, _ = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, output
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == 3
