"""The jobs of a sweep as one SLURM job array, through submitit."""

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import submitit

from thunderhead.core.config import ConfigError, Problem
from thunderhead.lab.execution import NOT_INHERITED, POLL_SECONDS, LocalProcess, Running
from thunderhead.lab.jobs import Job, this_program
from thunderhead.processes import is_slurm_task

SAVING_SECONDS = 80  # submitit warns 90 seconds before the end


class ArmJob:
    """What a SLURM job does: train one run as a process. Before its time is up it saves, and is queued again."""

    def __init__(self, job: Job, program: Sequence[str]):
        self.job, self.program = job, tuple(program)
        self._process: LocalProcess | None = None
        self._told = False

    def __call__(self) -> int:
        # One task is an ordinary run, which starts its own processes; several tasks are the ranks of one run.
        drop = {"HYDRA_FULL_ERROR"} if is_slurm_task() else NOT_INHERITED
        environment = {name: value for name, value in os.environ.items() if name not in drop}
        # In a session of its own: SLURM's warning is not for it, and a second SIGTERM would end it at once.
        self._process = LocalProcess(self.job, self.program, env=environment)
        signal.signal(signal.SIGTERM, lambda number, frame: self._terminate())  # scancel's, which submitit ignores
        while (status := self._process.poll()) is None:  # not wait(): the signal's handler could not wait, too
            time.sleep(POLL_SECONDS)
        return status

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Called by submitit before time runs out: let the run save, and queue the job again."""
        if self._process is not None:
            self._terminate()
            end = time.monotonic() + SAVING_SECONDS
            while self._process.poll() is None and time.monotonic() < end:
                time.sleep(POLL_SECONDS)
        return submitit.helpers.DelayedSubmission(ArmJob(self.job, self.program))

    def _terminate(self) -> None:
        """Let the run save and end; told once."""
        if self._process is not None and not self._told:
            self._told = True
            self._process.terminate()


class SlurmRunning:
    """A job in SLURM's hands."""

    def __init__(self, job: submitit.Job[int]):
        self._job = job

    def poll(self) -> int | None:
        if not self._job.done():
            return None
        return self._job.result() if self._job.exception() is None else 1  # SLURM ended it without a result

    def stop(self) -> None:
        self._job.cancel(check=False)  # SLURM sends SIGTERM: the run saves and ends

    kill = stop


class SlurmJobs:
    """All jobs at once, as an array of which `n_jobs` run at a time, by `program` (() = this one).

    `folder` is for submitit's files, on a file system that all nodes see; a job goes on `max_num_timeout` times after
    its time was up; `parameters` are submitit's.
    """

    def __init__(
        self,
        folder: Path,
        *,
        n_jobs: int,
        name: str,
        max_num_timeout: int,
        program: Sequence[str] = (),
        **parameters: Any,
    ):
        try:
            self.executor = submitit.SlurmExecutor(folder, max_num_timeout=max_num_timeout)
        except RuntimeError as error:
            message = "needs SLURM's srun, which is not on this machine: use hydra/launcher=processes"
            raise ConfigError([Problem("hydra/launcher=slurm", message)]) from error
        parameters["time"] = parameters.pop("timeout_min", None)
        if memory := parameters.pop("mem_gb", None):
            parameters["mem"] = f"{memory}GB"
        given = {key: value for key, value in parameters.items() if value not in (None, [], {})}
        self.executor.update_parameters(job_name=name, array_parallelism=n_jobs, **given)
        self._program = program or this_program()  # of the node that submits

    def free(self) -> int:
        return 10**6  # SLURM queues what does not fit

    def start(self, jobs: Sequence[Job]) -> list[Running]:
        for job in jobs:
            job.folder.mkdir(parents=True, exist_ok=True)
        submitted = self.executor.submit_array([ArmJob(job, self._program) for job in jobs])
        return [SlurmRunning(job) for job in submitted]
