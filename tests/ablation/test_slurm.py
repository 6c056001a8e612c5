"""What is handed to SLURM, without a cluster: the batch script, and what a job does."""

import sys
from pathlib import Path

import pytest

from thunderhead import config
from thunderhead.ablation.jobs import make_job, state
from thunderhead.ablation.slurm import ArmJob, SlurmJobs
from thunderhead.config import ConfigError
from tiny import tiny

FAKE = (sys.executable, str(Path(__file__).with_name("fake_training.py")))


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine that has srun, and an sbatch that keeps what it gets."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", ""), ("sbatch", f'cp "$1" {tmp_path}/script.sh; echo "Submitted batch job 17"')):
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    return tmp_path / "script.sh"


def test_the_batch_script(cluster: Path, tmp_path: Path) -> None:
    jobs = [make_job({"seed": str(seed)}, {"seed": seed}, tmp_path / "sweep") for seed in (1, 2, 3)]
    executor = SlurmJobs(
        tmp_path / "slurm", n_jobs=2, name="ablation", max_num_timeout=3, program=FAKE, partition="gpu",
        timeout_min=90, cpus_per_task=8, gpus_per_node=2, mem_gb=None, additional_parameters={"account": "mine"},
        setup=["module load cuda"],
    )  # fmt: skip
    assert len(executor.start(jobs)) == 3
    lines = cluster.read_text().splitlines()
    wanted = {
        "#SBATCH --array=0-2%2", "#SBATCH --job-name=ablation", "#SBATCH --partition=gpu", "#SBATCH --time=90",
        "#SBATCH --cpus-per-task=8", "#SBATCH --gpus-per-node=2", "#SBATCH --account=mine", "module load cuda",
    }  # fmt: skip
    assert wanted <= set(lines)
    assert any(line.startswith("srun") for line in lines)
    assert len(list((tmp_path / "slurm").rglob("*.pkl"))) == 3


def test_what_a_job_does(text_corpus: Path, shards_dir: Path, tmp_path: Path) -> None:
    resolved = config.plain(config.compose(tiny(text_corpus, shards_dir)))
    job = make_job({}, resolved, tmp_path)
    job.folder.mkdir(parents=True)
    assert ArmJob(job, FAKE)() == 0
    assert state(job.folder) == "finished"


def test_without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="needs SLURM's srun"):
        SlurmJobs(tmp_path, n_jobs=1, name="x", max_num_timeout=1)
