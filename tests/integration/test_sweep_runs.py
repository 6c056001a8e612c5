"""`python train.py -m …` for real: each run in a process of its own, killed, failing, stopped, of several processes."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from programs import NEEDS_PROC, processes_of, run
from thunderhead.training.record import REPOSITORY, read_rows, read_summary
from tiny import tiny

CHECKPOINTS = ("callbacks=default", "callbacks.checkpoint.every_n_train_steps=10")


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(REPOSITORY / "tests"), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "train.py", "-m", *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # a shell's background jobs ignore it, and so would all that they start
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )


def train_py(*arguments: str, status: int = 0, **environment: str) -> str:
    done = run("train.py", "-m", *arguments, **environment)
    output = done.stdout + done.stderr
    assert done.returncode == status, output
    assert "Traceback" not in output
    return output


def wait(process: subprocess.Popen[str], happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not happened():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def steps(folder: Path) -> int:
    metrics = folder / "metrics.csv"
    rows = read_rows(metrics)[1] if metrics.is_file() else []
    return int(rows[-1]["step"]) if rows else 0


def losses(folder: Path) -> dict[str, str]:
    return {row["step"]: row["train/loss"] for row in read_rows(folder / "metrics.csv")[1] if row["train/loss"]}


def only(sweep: Path, pattern: str) -> Path:
    (folder,) = sweep.glob(pattern)
    return folder


def test_a_sweep_trains_reports_and_is_not_repeated(text_corpus: Path, shards_dir: Path, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    lines = tiny(text_corpus, shards_dir, "attention=mha,mqa")
    first = train_py(*lines, f"hydra.sweep.dir={sweep}")
    assert "Ranking" in first
    assert (sweep / "report.html").exists()
    summaries = [read_summary(folder) for folder in sweep.glob("attention_*")]
    assert [summary["steps"] for summary in summaries if summary is not None] == [2, 2]
    assert train_py(f"resume={sweep}").count("finished before") == 2


@pytest.mark.slow
def test_joblib_is_the_processes_launcher_and_others_are_refused(
    text_corpus: Path, shards_dir: Path, tmp_path: Path
) -> None:
    lines = [
        *tiny(text_corpus, shards_dir, "attention=mha,mqa", "dry_run=true"),
        f"hydra.sweep.dir={tmp_path / 'sweep'}",
    ]
    assert "mqa: 1 run(s)" in train_py(*lines, "hydra/launcher=joblib")
    said = train_py(*lines, "hydra/launcher=basic", status=2)
    assert "BasicLauncher cannot run this sweep" in said
    assert "hydra.launcher.n_jobs=2" in said


@pytest.mark.slow
@NEEDS_PROC
def test_a_sweep_killed_at_once_goes_on_as_if_nothing_had_happened(
    text_corpus: Path, shards_dir: Path, tmp_path: Path
) -> None:
    """kill -9 of the sweep and of its second run, in the middle of it."""
    lines = tiny(text_corpus, shards_dir, "attention=mha,mqa", *CHECKPOINTS, "budget.steps=150", "dropout=gpt2")
    train_py(*lines, f"hydra.sweep.dir={tmp_path / 'whole'}")
    sweep = tmp_path / "killed"
    process = start(*lines, f"hydra.sweep.dir={sweep}")
    wait(process, lambda: any(steps(folder) >= 25 for folder in sweep.glob("attention_mqa-*")))
    finished, partial = only(sweep, "attention_mha-*"), only(sweep, "attention_mqa-*")
    process.kill()
    process.communicate()
    for pid in processes_of(partial):
        os.kill(pid, signal.SIGKILL)
    reached = steps(partial)
    assert 25 <= reached < 150
    assert read_summary(partial) is None
    before = {file: file.stat().st_mtime_ns for file in finished.rglob("*") if file.is_file()}

    said = train_py(f"resume={sweep}")
    assert "mha: finished, validation loss" in said
    assert "(finished before)" in said
    assert f"mqa: goes on from its checkpoint (had logged step {reached}" in said
    assert {file: file.stat().st_mtime_ns for file in finished.rglob("*") if file.is_file()} == before
    for found in (finished, partial):
        expected = only(tmp_path / "whole", f"{found.name}")  # the key is the same wherever the sweep lies
        assert losses(found) == losses(expected)
        assert len(losses(found)) == 150
        assert (
            json.loads((found / "summary.json").read_text())["val_loss"]
            == (json.loads((expected / "summary.json").read_text())["val_loss"])
        )


@pytest.mark.slow
def test_a_failing_arm_is_listed_retried_and_interrupted(text_corpus: Path, shards_dir: Path, tmp_path: Path) -> None:
    sweep, outside = tmp_path / "sweep", REPOSITORY / "tests" / "lab" / "outside"
    lines = tiny(text_corpus, shards_dir, "activation=breaks,swiglu", *CHECKPOINTS, "budget.steps=150")
    lines += [f"hydra.searchpath=[file://{outside}]", f"hydra.sweep.dir={sweep}"]
    said = train_py(*lines, BREAK="1", status=1)
    assert "breaks: failed (exit status 1: RuntimeError: a wire broke)" in said
    assert f"train.py -m resume={sweep}" in said
    assert "RuntimeError: a wire broke" in (sweep / "report.html").read_text()
    assert read_summary(only(sweep, "activation_swiglu-*")) is not None
    broken = only(sweep, "activation_breaks-*")

    process = start(f"resume={sweep}")
    wait(process, lambda: steps(broken) >= 30)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate()
    assert process.returncode == 130, said
    assert "breaks: stopped (stopped and saved)" in said
    page = (sweep / "report.html").read_text()
    assert "a wire broke" not in page
    assert "unfinished: step" in page

    said = train_py(f"resume={sweep}")
    assert "breaks: goes on from its checkpoint" in said
    assert "swiglu − breaks" in said
    with (sweep / "results.csv").open() as rows:
        assert [row["arm"] for row in csv.DictReader(rows)] == ["breaks", "swiglu"]


@pytest.mark.slow
def test_runs_of_several_processes(text_corpus: Path, shards_dir: Path, tmp_path: Path) -> None:
    """Two processes a run, each with the configuration of its own arm: Lightning's launcher would start the sweep."""
    sweep = tmp_path / "sweep"
    lines = tiny(text_corpus, shards_dir, "attention=mha,gqa", "strategy=ddp,fsdp", "budget.steps=4")
    train_py(*lines, "trainer.devices=2", "trainer.accelerator=cpu", f"hydra.sweep.dir={sweep}")
    found = {}
    for attention in ("mha", "gqa"):
        for strategy in ("ddp", "fsdp"):
            folder = only(sweep, f"attention_{attention}-strategy_{strategy}-*")
            plan, summary = (json.loads((folder / f"{name}.json").read_text()) for name in ("plan", "summary"))
            assert plan["data_parallel_size"] == 2
            assert summary["steps"] == 4
            assert (summary["decode_tokens_per_second"] is None) == (strategy == "fsdp")
            found[attention, strategy] = summary
    for attention in ("mha", "gqa"):  # the same sums in another order
        assert found[attention, "ddp"]["val_loss"] == pytest.approx(found[attention, "fsdp"]["val_loss"], rel=1e-5)
    assert found["mha", "ddp"]["parameters"] > found["gqa", "ddp"]["parameters"]
    assert found["mha", "ddp"]["val_loss"] != found["gqa", "ddp"]["val_loss"]
