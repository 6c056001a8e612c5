"""Runs on several devices of one machine: this process plans, and torchrun's processes train.

Lightning's own launcher repeats the command line in every process, which inside a Hydra sweep would start the whole
sweep again in each. Here the processes get the one composed configuration instead.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from thunderhead.config import to_yaml

LAUNCHED = "THUNDERHEAD_LAUNCHED"
# Set by launchers and schedulers for the processes they start; torchrun must not inherit another launcher's.
RANK_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "NODE_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


def is_rank() -> bool:
    """Whether a launcher (torchrun, or SLURM's srun) started this process as one of several."""
    return "LOCAL_RANK" in os.environ or ("SLURM_PROCID" in os.environ and "SLURM_NTASKS" in os.environ)


def is_launched() -> bool:
    """Whether `launch` started this process, so that the plan is already printed and recorded."""
    return LAUNCHED in os.environ


def global_rank() -> int:
    """The rank that the launcher gave this process; 0 if there is none."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def launch(config: dict[str, Any], run_dir: Path, n_processes: int) -> dict[str, Any]:
    """Train `config` in `n_processes` processes of this machine, and return the run's summary.

    Raises:
        SystemExit: with the processes' exit status, if they fail.
    """
    folder = run_dir / "launch"
    folder.mkdir(exist_ok=True)
    (folder / "job.yaml").write_text(to_yaml(config))
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n_processes)),
        *(sys.argv[0], "--config-path", str(folder.resolve()), "--config-name", "job"),
        *(f"hydra.run.dir={run_dir}", "hydra.output_subdir=null", "hydra/job_logging=stdout"),
    ]
    environment = {key: value for key, value in os.environ.items() if key not in RANK_VARIABLES}
    threads = max(1, (os.cpu_count() or 1) // n_processes)
    environment |= {LAUNCHED: "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    finished = subprocess.run(command, env=environment, check=False)
    if finished.returncode != 0:
        raise SystemExit(finished.returncode)
    summary: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    return summary
