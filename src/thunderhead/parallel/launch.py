"""Runs on several devices of one machine: this process plans, and processes that torchrun's agent starts train.

Lightning's own launcher repeats the command line in every process, which inside a Hydra sweep would start the whole
sweep again in each. Here the processes get the one composed configuration instead.
"""

import logging
import os
import signal
import sys
import uuid
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch.distributed.elastic.multiprocessing import api
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from thunderhead import disk
from thunderhead.command_line import from_job
from thunderhead.core.config import read_mapping, to_yaml
from thunderhead.core.environment import escaped
from thunderhead.processes import PARENT, RANK_VARIABLES, SAVING_SECONDS, SIGNALS, WHEN_KILLED, allowed_cores, listen

LAUNCHED = "THUNDERHEAD_LAUNCHED"


class KilledError(RuntimeError):
    """One of the processes was killed, and the others were ended."""


def is_launched() -> bool:
    """Whether `launch` started this process, so that the plan is already printed and recorded."""
    return LAUNCHED in os.environ


def _stop(number: int) -> None:
    raise SignalException(f"signal {number}", signal.Signals(number))


def launch(config: dict[str, Any], run_dir: Path, n_processes: int) -> dict[str, Any]:
    """Train `config` in `n_processes` processes of this machine, and return the run's summary.

    Raises SystemExit with the status of the process that failed first, or 128 + the signal that stopped them all, and
    KilledError if one was killed.
    """
    folder = run_dir / "launch"
    with disk.naming(folder / "job.yaml"):
        folder.mkdir(exist_ok=True)
        (folder / "job.yaml").write_text(to_yaml(escaped(config)), encoding="utf-8")
    arguments = [sys.argv[0], *from_job(folder.resolve(), run_dir)]
    threads = max(1, allowed_cores() // n_processes)
    environment = {key: value for key, value in os.environ.items() if key not in RANK_VARIABLES}
    environment |= {LAUNCHED: "1", PARENT: str(os.getpid())}
    environment.setdefault("OMP_NUM_THREADS", str(threads))
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
    # The agent's own handler stops waiting for the processes when a second one comes.
    once = patch.object(api, "_terminate_process_handler", listen(_stop))
    stopped: SignalException | None = None
    with patch.dict(os.environ, environment, clear=True), once:
        try:
            logging.disable(logging.ERROR)  # the agent's, of what is told here
            elastic_launch(agent, sys.executable)(*arguments)
        except ChildFailedError as error:
            _, first = error.get_first_failure()
            # in the same second: who was killed, then who lost the connection to it, then whom the agent has ended
            at_first = [(rank, f) for rank, f in error.failures.items() if f.timestamp == first.timestamp]
            rank, failure = min(at_first, key=lambda f: (f[1].exitcode == -signal.SIGTERM, f[1].exitcode >= 0))
            if failure.exitcode < 0:
                number = signal.Signals(-failure.exitcode)
                why = f": {WHEN_KILLED}" if number == signal.SIGKILL else ""
                raise KilledError(f"rank {rank} was ended by {number.name}{why}") from None
            raise SystemExit(failure.exitcode) from None
        except SignalException as error:  # passed on to the processes, which have saved and said so
            stopped = error
            raise SystemExit(128 + int(error.sigval)) from None
        finally:
            logging.disable(logging.NOTSET)
            for number, handler in handlers.items() if stopped is None else ():  # see StopOnSignal.close
                signal.signal(number, handler)
    return read_mapping(run_dir / "summary.json")
