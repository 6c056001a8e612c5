"""Signals end a run after the step under way, with a checkpoint of it to go on from."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from programs import NEEDS_PROC, ranks_of, train_py, wait_until
from thunderhead.training.record import read_rows
from tiny import tiny

STEPS = 2000  # minutes, if nobody stops it
INT, TERM, USR1, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP


def wait_for_steps(process: subprocess.Popen[str], run_dir: Path) -> None:
    metrics = run_dir / "metrics.csv"
    wait_until(process, lambda: metrics.exists() and len(read_rows(metrics)[1]) >= 3)


@pytest.mark.parametrize(
    ("devices", "target", "numbers"),
    [
        (1, "group", [TERM, TERM, INT]),  # with the loader's workers, one of which may be starting
        pytest.param(2, "process", [USR1, TERM], marks=pytest.mark.slow),
        pytest.param(2, "rank 1", [HUP], marks=pytest.mark.slow),
        pytest.param(1, "process", [USR1, INT], marks=pytest.mark.slow),
        pytest.param(1, "process", [HUP], marks=pytest.mark.slow),
        pytest.param(1, "process", [TERM] * 5, marks=pytest.mark.slow),
        pytest.param(2, "group", [INT, INT], marks=pytest.mark.slow),
        pytest.param(2, "group", [TERM, HUP, USR1], marks=pytest.mark.slow),
        pytest.param(2, "rank 0", [TERM, TERM], marks=pytest.mark.slow),
        pytest.param(2, "rank 1", [USR1, INT], marks=pytest.mark.slow),
    ],
)
def test_signals_stop_and_save(
    devices: int,
    target: str,
    numbers: list[signal.Signals],
    text_corpus: Path,
    shards_dir: Path,
    tmp_path: Path,
    tell: Callable[..., None],
) -> None:
    """Whatever comes to whom: a checkpoint of this very step, one line that says how to go on, the first's status."""
    run_dir = tmp_path / "run"
    lines = tiny(text_corpus, shards_dir, "callbacks=default", "validation.every=1000", "data.num_workers=1")
    lines += [f"budget.steps={STEPS}", f"trainer.devices={devices}", f"hydra.run.dir={run_dir}"]
    process = train_py(*lines)
    wait_for_steps(process, run_dir)
    pid = ranks_of(process, run_dir)[int(target[-1])] if target.startswith("rank") else process.pid
    for number in numbers:
        (os.killpg if target == "group" else os.kill)(pid, number)
        time.sleep(0.1)
    begin = time.monotonic()
    output, _ = process.communicate(timeout=60)
    seconds = time.monotonic() - begin
    assert seconds < 40, output  # 10 where nothing else runs: benchmarks/chaos.py tells
    assert process.returncode == 128 + numbers[0], output
    assert "Traceback" not in output
    (said,) = [line for line in output.splitlines() if f"go on with: python train.py resume={run_dir}" in line]
    assert not (run_dir / "summary.json").exists()

    reached = int(read_rows(run_dir / "metrics.csv")[1][-1]["step"])
    assert torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == reached
    tell(seconds=seconds, saw=said, tokens_lost=0)
    resumed = train_py(f"resume={run_dir}", f"budget.steps={reached + 5}")
    output, _ = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, output
    steps = [int(row["step"]) for row in read_rows(run_dir / "metrics.csv")[1] if row["train/loss"]]
    assert steps == list(range(1, reached + 6))
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == reached + 5


def test_a_signal_ends_a_long_validation(
    text_corpus: Path, shards_dir: Path, tmp_path: Path, tell: Callable[..., None]
) -> None:
    """The last validation, too: the run is saved within it, and makes it up."""
    run_dir = tmp_path / "run"
    slow = "+callbacks.slow={_target_: slow_validation.SlowValidation, seconds: 1.0}"
    lines = tiny(text_corpus, shards_dir, "callbacks=default", "data.max_validation_bytes=8192", "budget.steps=3")
    process = train_py(*lines, slow, f"hydra.run.dir={run_dir}")
    wait_until(process, (run_dir / "validating").exists)
    process.send_signal(TERM)
    process.send_signal(TERM)
    begin = time.monotonic()
    output, _ = process.communicate(timeout=30)
    seconds = time.monotonic() - begin
    assert process.returncode == 128 + TERM, output
    assert "Traceback" not in output
    (said,) = [line for line in output.splitlines() if "stopped at step 3 of 3; go on with: " in line]
    tell(seconds=seconds, saw=said, tokens_lost=0)

    resumed = train_py(f"resume={run_dir}", "++callbacks.slow.seconds=0.0", "trust=[slow_validation]")
    output, _ = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, output
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == 3


@pytest.mark.parametrize("number", [INT, pytest.param(TERM, marks=pytest.mark.slow)])
def test_a_signal_before_the_first_step_is_told_in_one_line(
    number: signal.Signals, text_corpus: Path, tmp_path: Path, tell: Callable[..., None]
) -> None:
    """While the data is prepared, say: the next start finds what is done, and there is no run."""
    corpus, run_dir = tmp_path / "corpus", tmp_path / "run"
    corpus.mkdir()
    text = (text_corpus / "a.txt").read_text(encoding="utf-8") if (text_corpus / "a.txt").exists() else "word " * 50_000
    for name in range(40):
        (corpus / f"{name}.txt").write_text(text, encoding="utf-8")
    lines = tiny(corpus, tmp_path / "shards", "tokenizer=bpe", f"data.path={corpus}", f"hydra.run.dir={run_dir}")
    process = train_py(*lines)
    wait_until(process, lambda: list(tmp_path.glob("shards/.*.preparing")))
    process.send_signal(number)
    begin = time.monotonic()
    output, _ = process.communicate(timeout=60)
    tell(seconds=time.monotonic() - begin)
    assert process.returncode == 128 + number, output
    assert "Traceback" not in output
    assert output.splitlines()[-1] == f"stopped by {number.name}; the same command starts it again"
    assert not run_dir.exists()


@NEEDS_PROC
def test_a_signal_while_packages_are_imported_is_told_in_one_line(tmp_path: Path) -> None:
    process = train_py(f"hydra.run.dir={tmp_path / 'run'}")
    wait_until(process, lambda: "libtorch_cpu" in Path(f"/proc/{process.pid}/maps").read_text())
    process.send_signal(INT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + INT, output
    assert "Traceback" not in output
    assert output.splitlines()[0] == "stopped by SIGINT; the same command starts it again"
    assert not (tmp_path / "run").exists()
