"""torchrun's own restarts: a rank dies, all start again by the same command, and `resume=auto` goes on."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from programs import ranks_of, start, wait_until
from thunderhead.core.config import read_mapping
from thunderhead.training.record import read_rows
from tiny import tiny

DEVICES = "trainer.devices=auto"  # as many as torchrun starts


def torchrun(name: str, n_processes: int, *overrides: str) -> subprocess.Popen[str]:
    agent = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_processes}", "--max-restarts=5")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
        return start(*agent, "train.py", "resume=auto", f"name={name}", DEVICES, *overrides)


def rows_of(run_dir: Path) -> list[tuple[str, str, str]]:
    return [(row["step"], row["tokens"], row["train/loss"]) for row in read_rows(run_dir / "metrics.csv")[1]]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_is_started_again(
    rank: int, text_corpus: Path, shards_dir: Path, tmp_path: Path, tell: Callable[..., None]
) -> None:
    """The folder of the run is the first start's; every token comes once, in its order; also on one rank afterwards."""
    runs = tmp_path / "runs"
    settings = ("callbacks=default", "callbacks.checkpoint.every_n_train_steps=20", "budget.steps=200")
    lines = [*tiny(text_corpus, shards_dir, *settings), f"hydra.run.dir={runs}/${{now:%Y-%m-%d_%H-%M-%S-%f}}"]
    process = torchrun("elastic", 2, *lines)
    wait_until(process, lambda: list(runs.glob("*/checkpoints/step-40.ckpt")))
    os.kill(ranks_of(process, tmp_path)[rank], signal.SIGKILL)
    reached, since = int(rows_of(next(runs.iterdir()))[-1][0]), time.monotonic()
    output, _ = process.communicate(timeout=400)
    seconds = time.monotonic() - since
    assert process.returncode == 0, output
    (run_dir,) = (file.parent for file in runs.glob("*/summary.json"))
    assert [folder for folder in runs.iterdir() if folder != run_dir] == []
    (said,) = (line for line in output.splitlines() if line.startswith(f"Going on from {run_dir}/checkpoints/"))
    (step,) = map(int, re.findall(r"step-(\d+)", said))
    tell(seconds=seconds, saw=said, tokens_lost=128 * max(0, reached - step))

    again = torchrun("elastic", 1, f"resume={run_dir}", "budget.steps=220")
    output, _ = again.communicate(timeout=400)
    assert again.returncode == 0, output
    assert read_mapping(run_dir / "summary.json")["steps"] == 220
    whole = torchrun("whole", 2, *tiny(text_corpus, shards_dir, *settings), f"hydra.run.dir={tmp_path / 'whole'}")
    output, _ = whole.communicate(timeout=400)
    assert whole.returncode == 0, output
    assert rows_of(run_dir)[:200] == rows_of(tmp_path / "whole")
    assert [int(row[1]) for row in rows_of(run_dir)] == [128 * step for step in range(1, 221)]
