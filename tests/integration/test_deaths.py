"""kill -9 of one process of several: the others end soon, and the next start goes on bit for bit."""

import functools
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from programs import NEEDS_PROC, processes_of, ranks_of, train_py, wait_until
from thunderhead import command_line
from thunderhead.core.config import ConfigError
from thunderhead.training import resume, run_folder
from thunderhead.training.record import read_rows, read_summary
from tiny import tiny, train_here

pytestmark = NEEDS_PROC
SECONDS = 40  # until all have ended
STEPS = 24
SETTINGS = (
    *("callbacks=default", "callbacks.checkpoint.every_n_train_steps=4", "validation.every=6", "dropout=gpt2"),
    *(f"budget.steps={STEPS}", "generation.max_new_tokens=1"),
)


def ended(process: subprocess.Popen[str], status: int = 0) -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == status, output
    assert "Traceback" not in output
    return output


def wait_for_the_end(folder: Path, since: float) -> float:
    """Seconds until no process is left."""
    while left := processes_of(folder):
        assert time.monotonic() - since < SECONDS, left
        time.sleep(0.02)
    return time.monotonic() - since


def victim(role: str, process: subprocess.Popen[str], folder: Path) -> int:
    ranks = ranks_of(process, folder)
    match role:
        case "launcher":
            return process.pid
        case "rank 0" | "rank 1":
            return ranks[int(role[-1])]
        case "worker":  # of rank 0
            of = ranks.get(0, process.pid)
            return next(pid for pid, (parent, _) in processes_of(folder).items() if parent == of)
    raise AssertionError


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def assert_equal(run_dir: Path, whole: Path) -> None:
    found, wanted = weights(run_dir), weights(whole)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    columns = ("step", "train/loss", "val/loss")
    rows = ([[row[name] for name in columns] for row in read_rows(f / "metrics.csv")[1]] for f in (run_dir, whole))
    assert next(rows) == next(rows)


@pytest.fixture(scope="module")
def whole(text_corpus: Path, shards_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """The undisturbed run, of one process or of two ranks."""

    @functools.cache
    def run(launched: bool) -> Path:
        folder = tmp_path_factory.mktemp("whole") / "run"
        lines = tiny(text_corpus, shards_dir, *SETTINGS, *(RANKS if launched else ()))
        if launched:
            ended(train_py(*lines, f"hydra.run.dir={folder}"))
        else:
            train_here(lines, folder)
        return folder

    return run


WAITS = "+callbacks.waits={_target_: waits.Waits, phase: training, step: 12, seconds: 3.0}"
RANKS = ("trainer.devices=2", "strategy=ddp")
WORKERS = ("data.num_workers=1",)
SLOW = pytest.mark.slow
Kill = tuple[str, str]  # who, and in which phase


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "kills"),
    [
        (RANKS, [("launcher", "training")]),
        (WORKERS, [("worker", "training")]),
        (RANKS, [("launcher", "saving"), ("rank 0", "training"), ("launcher", "validation")]),
        (RANKS, [("rank 1", "validation")]),
        (RANKS, [("rank 1", "saving"), ("rank 0", "validation"), ("rank 1", "training")]),
        ((*RANKS, *WORKERS), [("worker", "training"), ("launcher", "training"), ("rank 0", "saving")]),
        (WORKERS, [("worker", "saving"), ("launcher", "training"), ("worker", "validation")]),
    ],
)
def test_all_end_and_the_next_start_goes_on(
    more: tuple[str, ...],
    kills: list[Kill],
    whole: Callable[[bool], Path],
    text_corpus: Path,
    shards_dir: Path,
    tmp_path: Path,
    tell: Callable[..., None],
) -> None:
    run_dir, launched = tmp_path / "run", more[0] == RANKS[0]
    lines = [*tiny(text_corpus, shards_dir, *SETTINGS), *more, WAITS, f"hydra.run.dir={run_dir}"]
    longest, lost, said = 0.0, 0, ""
    for step, (role, phase) in zip((6, 12, 18), kills, strict=False):
        settings = [f"++callbacks.waits.phase={phase}", f"++callbacks.waits.step={step}"]
        process = train_py(*lines, *settings)
        wait_until(process, (run_dir / f"waits-{step}").exists)
        since, who = time.monotonic(), victim(role, process, run_dir)
        os.kill(who, signal.SIGKILL)
        if role == "launcher" and launched:  # who writes holds the folder
            with pytest.raises(ConfigError, match="still being trained by another process"), run_folder.held(run_dir):
                pass
        longest = max(longest, wait_for_the_end(run_dir, since))
        output, _ = process.communicate()
        assert "Traceback" not in output
        if role == "launcher":
            assert process.returncode == -signal.SIGKILL
            assert not launched or output.count("error: what started this process was killed") == 1
        else:
            assert process.returncode == 1
            (said,) = (line for line in output.splitlines() if "error" in line.lower())
            assert {"worker": "DataLoader worker (pid"}.get(role, f"{role} was ended by SIGKILL") in said
            assert f"go on with: python train.py resume={run_dir}" in said
        said = said or next((line for line in output.splitlines() if "error" in line.lower()), "")
        assert read_summary(run_dir) is None
        found = resume._newest(run_dir).checkpoint
        assert found is not None
        reached = int(read_rows(run_dir / "metrics.csv")[1][-1]["step"])
        lost = max(lost, reached - torch.load(found, weights_only=True)["global_step"])
        lines = [f"resume={run_dir}", "trust=[waits]"]

    if launched:
        ended(train_py(*lines))
    else:
        resumed_here(run_dir)
    assert_equal(run_dir, whole(launched))
    tell(tries=len(kills), seconds=longest, saw=said, tokens_lost=128 * lost)


def resumed_here(run_dir: Path) -> None:
    with patch.object(command_line, "invocation_overrides", list):
        train_here([f"resume={run_dir}", "trust=[waits]"], run_dir.with_name("new"))


@pytest.mark.parametrize(
    ("more", "at_once"), [((), False), pytest.param((), True, marks=SLOW), pytest.param(RANKS, True, marks=SLOW)]
)
def test_jobs_end_with_their_sweep(
    more: tuple[str, ...],
    at_once: bool,
    whole: Callable[[bool], Path],
    text_corpus: Path,
    shards_dir: Path,
    tmp_path: Path,
) -> None:
    sweep = tmp_path / "sweep"
    lines = [*tiny(text_corpus, shards_dir, *SETTINGS), *more, WAITS, "seed=1,2", f"hydra.sweep.dir={sweep}"]
    process = train_py("-m", *lines)
    wait_until(process, lambda: any(sweep.glob("*/waits-12")))
    (job,) = sweep.glob("*-*")
    since = time.monotonic()
    process.kill()
    process.communicate()
    orphans = processes_of(job).keys()
    assert orphans
    again = train_py(f"resume={sweep}", WAITS, "trust=[waits]") if at_once else None  # waits for the job to end
    while orphans & processes_of(job).keys():
        assert time.monotonic() - since < SECONDS
        time.sleep(0.02)
    print(f"the job of a sweep, {more}, ended after {time.monotonic() - since:.1f} s")
    if again is None:
        resumed_here(job)
    else:
        assert "goes on from its checkpoint" in ended(again)
        assert len([folder for folder in sweep.glob("*-*") if read_summary(folder) is not None]) == 2
    log = (job / "log.txt").read_text()
    assert "Traceback" not in log
    assert "error: what started this process was killed" in log
    assert "stopped at step 13 of 24; go on with: " in log
    assert_equal(job, whole(bool(more)))
