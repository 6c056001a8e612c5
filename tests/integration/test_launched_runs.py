"""train.py in two processes, started by itself or by the user's own torchrun: the same run."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from thunderhead.core.config import read_mapping
from thunderhead.training.record import REPOSITORY, read_rows
from tiny import prepared, tiny

TRAIN = str(REPOSITORY / "train.py")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", TRAIN)
SHELL = {"SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "bash", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
TIMES = {"tokens_per_second", "mfu"}


def only_run(started_in: Path) -> Path:
    (folder,) = started_in.glob("logs/runs/*/*")
    return folder


def rows(folder: Path) -> list[dict[str, Any]]:
    """What training and validation measured, but for times."""
    return [
        {name: value for name, value in row.items() if name not in TIMES}
        for row in read_rows(folder / "metrics.csv")[1]
    ]


@pytest.fixture(scope="module")
def folders(text_corpus: Path, shards_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Where each of them left its record."""
    lines = tiny(text_corpus, shards_dir, "strategy=ddp", "budget.steps=3", "validation.every=2", "trainer.devices=2")
    lines.append(r"generation.prompt='\${HOME} is'")
    prepared(text_corpus, shards_dir, ["tokenizer=byte"])
    # our own launcher from a shell within a SLURM job: train.py is no task among others there
    starts = {"own": ((TRAIN,), SHELL), "torchrun": (TORCHRUN, {})}
    awkward = "run (1), {x}=é '$y'"
    folders = {name: tmp_path_factory.mktemp(name) / awkward for name in starts}
    for folder in folders.values():
        folder.mkdir()
    processes = {
        name: subprocess.Popen(
            [sys.executable, *command, *lines],
            cwd=folders[name],
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name, (command, environment) in starts.items()
    }
    for process in processes.values():
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output
        assert "Traceback" not in output
        assert output.count("Attention kernel") == 1, "rank 0 alone speaks"
    return folders


@pytest.mark.parametrize("name", ["own", "torchrun"])
def test_two_processes_leave_one_record(name: str, folders: dict[str, Path]) -> None:
    folder = only_run(folders[name])
    plan = read_mapping(folder / "plan.json")
    assert plan["data_parallel_size"] == 2
    assert read_mapping(folder / "summary.json")["steps"] == 3
    assert (folder / "sample.txt").read_text().startswith("${HOME} is")


def test_torchrun_trains_as_the_own_launcher(folders: dict[str, Path]) -> None:
    own, torchrun = (only_run(folders[name]) for name in ("own", "torchrun"))
    assert rows(torchrun) == rows(own)
    assert read_mapping(torchrun / "summary.json")["val_loss"] == read_mapping(own / "summary.json")["val_loss"]
