"""What is handed to SLURM, without a cluster: the batch script, and what a job does."""

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from thunderhead.core import config
from thunderhead.core.config import ConfigError
from thunderhead.lab.jobs import make_job, state
from thunderhead.lab.slurm import ArmJob, SlurmJobs
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


def wait_for_a_step(process: subprocess.Popen[bytes], folder: Path) -> None:
    deadline = time.monotonic() + 240
    while not (folder / "metrics.csv").is_file():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


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


def test_the_launcher_hands_its_settings_on(cluster: Path, tmp_path: Path) -> None:
    overrides = ["hydra/launcher=slurm", "hydra.launcher.partition=gpu", "hydra.launcher.setup=[module load cuda]"]
    overrides += [f"hydra.sweep.dir={tmp_path / 'sweep'}", "hydra.launcher.n_jobs=2", "name=lab"]
    with initialize_config_dir(str(config.CONF_DIR), version_base="1.3"):
        composed = compose("train", overrides, return_hydra_config=True)
    launcher = instantiate(composed.hydra.launcher)
    launcher.setup(hydra_context=None, task_function=None, config=composed)
    launcher.executor().start([make_job({}, {"seed": seed}, tmp_path / "sweep") for seed in (1, 2, 3)])
    wanted = {"#SBATCH --array=0-2%2", "#SBATCH --job-name=lab", "#SBATCH --partition=gpu", "#SBATCH --time=1440"}
    assert wanted | {"#SBATCH --signal=USR2@90", "module load cuda"} <= set(cluster.read_text().splitlines())


def test_a_job_whose_time_is_up_saves_is_queued_again_and_goes_on(
    cluster: Path, text_corpus: Path, shards_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """submitit's own program runs as the batch script has it, and gets the signal that SLURM sends before the end."""
    scontrol = cluster.parent / "bin" / "scontrol"
    scontrol.write_text(f"#!/bin/sh\necho $* >> {tmp_path}/scontrol.txt\n")
    scontrol.chmod(0o755)
    job = make_job({}, config.plain(config.compose(tiny(text_corpus, shards_dir))), tmp_path / "sweep")
    (running,) = SlurmJobs(tmp_path / "slurm", n_jobs=1, name="x", max_num_timeout=3, program=FAKE).start([job])
    place = {"SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "17"}
    command = [sys.executable, "-m", "submitit.core._submit", str(tmp_path / "slurm")]
    assert any("submitit.core._submit" in line for line in cluster.read_text().splitlines())

    def start(**more: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, env=os.environ | place | more)

    first = start(FAKE_SLOW="300")
    wait_for_a_step(first, job.folder)
    first.send_signal(signal.SIGUSR2)
    assert first.wait(240) != 0
    assert state(job.folder) == "partial"
    assert (tmp_path / "scontrol.txt").read_text() == "requeue 17\n"
    second = start(FAKE_SLOW="300")
    assert second.wait(240) == 0
    assert (job.folder / "starts.txt").read_text() == "new\nresumed\n"
    assert running.poll() == 0


def test_a_cancelled_job_saves(text_corpus: Path, shards_dir: Path, tmp_path: Path) -> None:
    job = make_job({}, config.plain(config.compose(tiny(text_corpus, shards_dir))), tmp_path)
    job.folder.mkdir(parents=True)
    script = tmp_path / "task.py"
    lines = ["import pickle, sys", "sys.exit(pickle.load(open(sys.argv[1], 'rb'))())"]
    script.write_text("\n".join(lines))
    (tmp_path / "task.pkl").write_bytes(pickle.dumps(ArmJob(job, FAKE)))
    task = subprocess.Popen([sys.executable, script, tmp_path / "task.pkl"], env=os.environ | {"FAKE_SLOW": "300"})
    wait_for_a_step(task, job.folder)
    task.terminate()
    assert task.wait(240) == 143
    assert state(job.folder) == "partial"


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
