"""Runs on several devices of one machine: this process plans, and processes that torchrun's agent starts train.

Lightning's own launcher repeats the command line in every process, which inside a Hydra sweep would start the whole
sweep again in each. Here the processes get the one composed configuration instead.
"""

import os
import signal
import sys
import uuid
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from thunderhead.command_line import from_job
from thunderhead.core.config import escaped, read_mapping, to_yaml
from thunderhead.processes import RANK_VARIABLES, SIGNALS, allowed_cores

LAUNCHED = "THUNDERHEAD_LAUNCHED"
SAVING_SECONDS = 600  # that processes have to end the step and save, once they are told to stop


def is_launched() -> bool:
    """Whether `launch` started this process, so that the plan is already printed and recorded."""
    return LAUNCHED in os.environ


def launch(config: dict[str, Any], run_dir: Path, n_processes: int) -> dict[str, Any]:
    """Train `config` in `n_processes` processes of this machine, and return the run's summary.

    Raises SystemExit with the status of the process that failed first, or 128 + the signal that stopped them all.
    """
    folder = run_dir / "launch"
    folder.mkdir(exist_ok=True)
    (folder / "job.yaml").write_text(to_yaml(escaped(config)), encoding="utf-8")
    arguments = [sys.argv[0], *from_job(folder.resolve(), run_dir)]
    threads = max(1, allowed_cores() // n_processes)
    environment = {key: value for key, value in os.environ.items() if key not in RANK_VARIABLES}
    environment |= {LAUNCHED: "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    agent = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=n_processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        shutdown_timeout=SAVING_SECONDS,
        signals_to_handle=",".join(number.name for number in SIGNALS),
    )
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    with patch.dict(os.environ, environment, clear=True):
        try:
            elastic_launch(agent, sys.executable)(*arguments)
        except ChildFailedError as error:
            _, failure = error.get_first_failure()
            raise SystemExit(max(failure.exitcode, 1)) from None
        except SignalException as stopped:  # passed on to the processes, which have saved and said so
            raise SystemExit(128 + int(stopped.sigval)) from None
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return read_mapping(run_dir / "summary.json")
