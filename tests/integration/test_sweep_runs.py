"""`python train.py -m …` for real: each run in a process of its own, then the report; a second start finds all done."""

import os
import subprocess
import sys
from pathlib import Path

from thunderhead.training.record import REPOSITORY, read_summary
from tiny import tiny


def train_py(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "train.py", "-m", *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_sweep_trains_reports_and_is_not_repeated(text_corpus: Path, shards_dir: Path, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    lines = tiny(text_corpus, shards_dir, "attention=mha,mqa")
    first = train_py(*lines, f"hydra.sweep.dir={sweep}")
    assert "Ranking" in first
    assert (sweep / "report.html").exists()
    summaries = [read_summary(folder) for folder in sweep.glob("attention_*")]
    assert [summary["steps"] for summary in summaries if summary is not None] == [2, 2]
    assert train_py(f"resume={sweep}").count("finished before") == 2
