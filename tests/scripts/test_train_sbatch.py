"""scripts/slurm/train.sbatch with an `srun` and an `scontrol` that are not SLURM's."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from thunderhead.core.config import read_mapping
from thunderhead.training.record import REPOSITORY
from tiny import tiny

SCRIPT = REPOSITORY / "scripts" / "slurm" / "train.sbatch"
JOB = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "16", "SLURM_NNODES": "2", "SLURM_CPUS_PER_TASK": "3"}


def install(folder: Path, name: str, program: str) -> None:
    file = folder / "bin" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"#!{sys.executable}\n{textwrap.dedent(program)}")
    file.chmod(0o755)


def sbatch(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the script as SLURM would on the first node, in `folder`."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "OMP_"))}
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    install(folder, "scontrol", "import sys\nprint('scontrol', *sys.argv[1:])")
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        cwd=folder,
        env=clean | JOB | {"PATH": path, "PYTHON": sys.executable} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def srun_that_ends(folder: Path, status: int) -> None:
    install(folder, "srun", f"import os, sys\nprint(os.environ['OMP_NUM_THREADS'], *sys.argv[1:])\nsys.exit({status})")


def test_shellcheck_has_nothing_to_say() -> None:
    shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    checked = subprocess.run([shellcheck, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_tasks_get_the_same_folder_and_the_shape_of_the_job(tmp_path: Path) -> None:
    srun_that_ends(tmp_path, 0)
    ended = sbatch(tmp_path, "experiment=llama-1b", "budget.steps=10")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == [
        "3",
        *("--kill-on-bad-exit=1", sys.executable, "train.py", "trainer.num_nodes=2", "trainer.devices=8"),
        *("experiment=llama-1b", "budget.steps=10", "hydra.run.dir=logs/runs/slurm/4711"),
    ]


@pytest.mark.parametrize(
    ("status", "kept", "requeued"),
    [(143, "file", True), (143, None, False), (1, "file", False)],
)
def test_a_job_whose_time_is_up_is_queued_again(status: int, kept: str | None, requeued: bool, tmp_path: Path) -> None:
    """If it left a checkpoint to go on from."""
    srun_that_ends(tmp_path, status)
    checkpoints = tmp_path / "logs" / "runs" / "slurm" / "4711" / "checkpoints"
    if kept is not None:
        checkpoints.mkdir(parents=True)
    if kept == "file":
        (checkpoints / "last.ckpt").touch()
    ended = sbatch(tmp_path)
    assert ended.returncode == (0 if requeued else status)
    assert ("scontrol requeue 4711" in ended.stdout) == requeued
    assert ("resume=logs/runs/slurm/4711" in ended.stdout) == (kept == "file")


TASKS = """
    import os, subprocess, sys
    tasks = []
    for rank in range(2):
        places = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NODEID": 0, "SLURM_JOB_NAME": "thunderhead"}
        places |= {"SLURM_NODELIST": "127.0.0.1", "SLURM_NTASKS_PER_NODE": 2}
        environment = os.environ | {name: str(value) for name, value in places.items()}
        tasks.append(subprocess.Popen(sys.argv[2:], env=environment))
    sys.exit(max(task.wait() for task in tasks))
"""


@pytest.mark.slow
def test_tasks_train_together(text_corpus: Path, shards_dir: Path, tmp_path: Path) -> None:
    """Two tasks on one node, through Lightning's own SLURMEnvironment."""
    install(tmp_path, "srun", TASKS)
    for name in ("train.py", "conf", "src"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    lines = tiny(text_corpus, shards_dir, "strategy=ddp", "callbacks=default", "budget.steps=4")
    shape = {"SLURM_NTASKS": "2", "SLURM_NNODES": "1", "SLURM_CPUS_PER_TASK": "1"}
    ended = sbatch(tmp_path, *lines, "trainer.accelerator=cpu", "trainer.devices=2", **shape)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    folder = tmp_path / "logs" / "runs" / "slurm" / "4711"
    assert read_mapping(folder / "plan.json")["data_parallel_size"] == 2
    assert read_mapping(folder / "summary.json")["steps"] == 4
    again = sbatch(tmp_path, "budget.steps=6", **shape)
    assert again.returncode == 0, again.stdout + again.stderr
    assert read_mapping(folder / "summary.json")["steps"] == 6
