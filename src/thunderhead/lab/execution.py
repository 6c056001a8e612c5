"""Run the jobs of a sweep: start them, watch them, and end them when asked to."""

import contextlib
import fcntl
import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Literal, NamedTuple, Protocol

import torch

from thunderhead.core.processes import RANK_VARIABLES, allowed_cores
from thunderhead.lab.jobs import Job, prepare_start, state
from thunderhead.lab.progress import Board

POLL_SECONDS = 0.5
PRUNED = "its validation loss was above the median of the trials before it"
# Set for this process, by us or by a scheduler, and not meant for the jobs.
NOT_INHERITED = {*RANK_VARIABLES, "HYDRA_FULL_ERROR", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"}


class Outcome(NamedTuple):
    """How a job ended."""

    state: Literal["finished", "failed", "stopped", "pruned"]
    message: str = ""  # of a failure
    already: bool = False  # it was finished before this start


class Running(Protocol):
    """A job that was started: `poll` gives its exit status once it ended, `stop` asks it to save and end."""

    def poll(self) -> int | None: ...
    def stop(self) -> None: ...
    def kill(self) -> None: ...


class Executor(Protocol):
    """Where jobs run: `free` says how many may be started now."""

    def free(self) -> int: ...
    def start(self, jobs: Sequence[Job]) -> list[Running]: ...


def log_file(folder: Path) -> Path:
    """What a job printed, on all its starts."""
    return folder / "log.txt"


class JobIsRunningError(Exception):
    """Another process trains this job already."""


@dataclass
class LocalProcess:
    """A job in a process of its own, in a session of its own, so that Ctrl-C reaches it through `stop` only."""

    process: subprocess.Popen[bytes]
    log: IO[bytes]
    release: Callable[[], None]

    def poll(self) -> int | None:
        status = self.process.poll()
        if status is not None and not self.log.closed:
            self.log.close()
            self.release()
        return status

    def stop(self) -> None:
        """SIGTERM: a training run finishes its step, saves and ends."""
        self.process.terminate()

    def kill(self) -> None:
        """The process and those that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


class LocalExecutor:
    """Jobs as processes of this machine, up to `n_jobs` at a time, by `program` (() = this one).

    Parallel jobs share the CPU cores by OMP_NUM_THREADS, unless it is set, and the GPUs by CUDA_VISIBLE_DEVICES.
    """

    def __init__(self, n_jobs: int, program: Sequence[str] = ()):
        self._slots, self._n_jobs, self._program = list(range(n_jobs)), n_jobs, program

    def free(self) -> int:
        return len(self._slots)

    def start(self, jobs: Sequence[Job]) -> list[Running]:
        """Start a process for each.

        Raises:
            JobIsRunningError: a process that an earlier sweep left behind still trains the job.
        """
        return [self._start(job) for job in jobs]

    def _start(self, job: Job) -> LocalProcess:
        job.folder.mkdir(parents=True, exist_ok=True)
        # .lock is the run's own; the process inherits this one: it is held until the process ends, however it does
        with (job.folder / ".job.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise JobIsRunningError(f"a process of an earlier start still trains {job.folder}") from None
            slot, log = self._slots.pop(0), log_file(job.folder).open("ab")
            process = subprocess.Popen(
                prepare_start(job, self._program),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(slot),
                start_new_session=True,
                pass_fds=(lock.fileno(),),
            )
        return LocalProcess(process, log, lambda: self._slots.append(slot))

    def _environment(self, slot: int) -> dict[str, str]:
        environment = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
        environment |= {"PYTHONUNBUFFERED": "1"}
        if self._n_jobs > 1:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, allowed_cores() // self._n_jobs)))
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            here = map(str, range(torch.cuda.device_count()))
            if devices := [device for device in (visible.split(",") if visible is not None else here) if device]:
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(share(devices, self._n_jobs, slot))
        return environment


def share(devices: Sequence[str], n_jobs: int, slot: int) -> list[str]:
    """The devices of one of `n_jobs` slots: equal parts; one device in turn where there are fewer devices than jobs."""
    each = len(devices) // n_jobs
    return list(devices[slot * each : (slot + 1) * each]) if each else [devices[slot % len(devices)]]


Monitor = Callable[[Job], bool]
"""Called for each running job now and then; true ends it early."""


def run_jobs(
    jobs: Sequence[Job], executor: Executor, board: Board, monitor: Monitor | None = None
) -> dict[Path, Outcome]:
    """Run what is not finished, as many at a time as the executor takes.

    A failed job does not stop the others. On Ctrl-C or SIGTERM the running jobs are asked to save and end; a second
    one ends them at once.

    Jobs are started in their order, those with the same folder once.

    Returns:
        How each ended, by its folder.

    Raises:
        Interrupted: after Ctrl-C or SIGTERM, with how those ended that were started, or had been finished before.
    """
    watch = _Watch(executor, board)
    waiting: deque[Job] = deque()
    for job in {job.folder: job for job in jobs}.values():
        if state(job.folder) == "finished":
            watch.end(job, Outcome("finished", already=True), "finished before")
        else:
            waiting.append(job)
    with _sigterm_as_interrupt():
        try:
            while waiting or watch.running:
                while waiting and (n := executor.free()) > 0:
                    watch.start([waiting.popleft() for _ in range(min(n, len(waiting)))])
                watch.collect()
                watch.prune(monitor)
                board.refresh([job for job, _ in watch.running.values()])
                if watch.running:
                    time.sleep(POLL_SECONDS)
        except KeyboardInterrupt:
            watch.stop()
            raise Interrupted(watch.outcomes) from None
    return watch.outcomes


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM ended the jobs; holds how those that had started ended."""

    def __init__(self, outcomes: dict[Path, Outcome]):
        super().__init__()
        self.outcomes = outcomes


class _Watch:
    """The jobs that run, by their folders, and how others ended."""

    def __init__(self, executor: Executor, board: Board):
        self.executor, self.board = executor, board
        self.outcomes: dict[Path, Outcome] = {}
        self.running: dict[Path, tuple[Job, Running]] = {}
        self.pruned: set[Path] = set()
        self.killed = False

    def start(self, batch: Sequence[Job]) -> None:
        resumed = {job.folder for job in batch if state(job.folder) == "partial"}
        try:
            processes = self.executor.start(batch)
        except (JobIsRunningError, OSError) as error:
            for job in batch:
                self.end(job, Outcome("failed", str(error)))
            return
        for job, process in zip(batch, processes, strict=True):
            self.running[job.folder] = (job, process)
            self.board.started(job, resumed=job.folder in resumed)

    def collect(self) -> None:
        """Note what has ended."""
        for folder, (job, process) in list(self.running.items()):
            if (status := process.poll()) is not None:
                del self.running[folder]
                self.end(job, _outcome(job, status, pruned=folder in self.pruned, killed=self.killed))

    def end(self, job: Job, outcome: Outcome, note: str = "") -> None:
        self.outcomes[job.folder] = outcome
        self.board.ended(job, outcome.state, note or outcome.message)

    def prune(self, monitor: Monitor | None) -> None:
        for folder, (job, process) in self.running.items():
            if monitor is not None and folder not in self.pruned and monitor(job):
                self.pruned.add(folder)
                process.stop()

    def stop(self) -> None:
        """Let all save and end; interrupted once more, end them at once."""
        n = len(self.running)
        self.board.say(f"Stopping: {n} running job(s) finish their step and save; again to end them at once")
        for _, process in self.running.values():
            process.stop()
        try:
            while self.running:
                self.collect()
                time.sleep(POLL_SECONDS)
        except KeyboardInterrupt:
            self.killed = True
            for _, process in self.running.values():
                process.kill()
            while self.running:
                self.collect()


def _outcome(job: Job, status: int, *, pruned: bool, killed: bool) -> Outcome:
    if status == 0 and state(job.folder) == "finished":
        return Outcome("finished")
    if pruned:
        return Outcome("pruned", PRUNED)
    if status in (128 + signal.SIGTERM, 128 + signal.SIGINT, -signal.SIGTERM) or killed:
        return Outcome("stopped", "killed" if status < 0 else "stopped and saved")
    if status == -signal.SIGKILL:
        return Outcome("failed", "killed from outside; the system does so when memory runs out")
    return Outcome("failed", f"exit status {status}: {last_words(log_file(job.folder))}")


def last_words(log: Path) -> str:
    """The last line of a log that says something: of a refusal the first problem."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    if not lines:
        return "nothing was printed"
    refusals = [index for index, line in enumerate(lines) if line.startswith("error:")]
    if refusals and refusals[-1] + 1 < len(lines):
        return lines[refusals[-1] + 1]
    return lines[-1]


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # where no signal arrives
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
