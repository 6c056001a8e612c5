"""Run the jobs of a sweep: start them, watch them, and end them when asked to."""

import contextlib
import fcntl
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any, Literal, NamedTuple, Protocol

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
    """A job that was started."""

    def poll(self) -> int | None:
        """Its exit status, or None while it runs."""
        ...

    def stop(self) -> None:
        """Ask it to save and end."""
        ...

    def kill(self) -> None:
        """End it at once."""
        ...


class Executor(Protocol):
    """Where jobs run."""

    def free(self) -> int:
        """How many jobs may be started now."""
        ...

    def start(self, jobs: Sequence[Job]) -> list[Running]:
        """Start them."""
        ...


def log_file(folder: Path) -> Path:
    """What a job printed, on all its starts."""
    return folder / "log.txt"


# --------------------------------------------------------------------------------------------------------------------
# On this machine


class JobIsRunningError(Exception):
    """Another process trains this job already."""


@dataclass
class LocalProcess:
    """A job in a process of its own, in a session of its own, so that Ctrl-C reaches it through `stop` only."""

    process: subprocess.Popen[bytes]
    log: IO[bytes]
    release: Callable[[], None]
    ended: bool = False

    def poll(self) -> int | None:
        """Its exit status, or None while it runs."""
        status = self.process.poll()
        if status is not None and not self.ended:
            self.ended = True
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
    """Jobs as processes of this machine, up to `n_jobs` at a time.

    Parallel jobs share the CPU cores by OMP_NUM_THREADS, unless it is set, and the GPUs by CUDA_VISIBLE_DEVICES.

    Args:
        n_jobs: at a time.
        program: what trains a job; () = this program.
    """

    def __init__(self, n_jobs: int, program: Sequence[str] = ()):
        self._slots = list(range(n_jobs))
        self._n_jobs = n_jobs
        self._program = program

    def free(self) -> int:
        """Slots without a job."""
        return len(self._slots)

    def start(self, jobs: Sequence[Job]) -> list[Running]:
        """Start a process for each.

        Raises:
            JobIsRunningError: a process that an earlier sweep left behind still trains the job.
        """
        return [self._start(job) for job in jobs]

    def _start(self, job: Job) -> LocalProcess:
        job.folder.mkdir(parents=True, exist_ok=True)
        lock = (job.folder / ".job.lock").open("w")  # .lock is the run's own
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise JobIsRunningError(f"a process of an earlier start still trains {job.folder}") from None
        slot = self._slots.pop(0)
        log = log_file(job.folder).open("ab")
        with lock:  # the process inherits the lock: it is held until the process ends, however this one does
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
            if devices := _visible_gpus():
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(share(devices, self._n_jobs, slot))
        return environment


def share(devices: Sequence[str], n_jobs: int, slot: int) -> list[str]:
    """The devices of one of `n_jobs` slots: equal parts; one device in turn where there are fewer devices than jobs."""
    each = len(devices) // n_jobs
    return list(devices[slot * each : (slot + 1) * each]) if each else [devices[slot % len(devices)]]


def _visible_gpus() -> list[str]:
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [device for device in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if device]
    return [str(index) for index in range(torch.cuda.device_count())]


# --------------------------------------------------------------------------------------------------------------------
# Start, watch, end


Monitor = Callable[[Job], bool]
"""Called for each running job now and then; true ends it early."""


def run_jobs(
    jobs: Sequence[Job], executor: Executor, board: Board, monitor: Monitor | None = None
) -> dict[Path, Outcome]:
    """Run what is not finished, as many at a time as the executor takes.

    A failed job does not stop the others. On Ctrl-C or SIGTERM the running jobs are asked to save and end; a second
    one ends them at once.

    Args:
        jobs: in the order to be started; those with the same folder run once.
        executor: where.
        board: shows progress.
        monitor: may end jobs early.

    Returns:
        How each ended, by its folder; after an interruption only those that were started or finished before.
    """
    outcomes: dict[Path, Outcome] = {}
    waiting: deque[Job] = deque()
    for job in {job.folder: job for job in jobs}.values():
        if state(job.folder) == "finished":
            outcomes[job.folder] = Outcome("finished", already=True)
            board.ended(job, outcomes[job.folder].state, "finished before")
        else:
            waiting.append(job)
    running: dict[Path, tuple[Job, Running]] = {}
    pruned: set[Path] = set()
    killed = False

    def collect() -> None:
        for folder, (job, process) in list(running.items()):
            status = process.poll()
            if status is None:
                continue
            del running[folder]
            outcomes[folder] = _outcome(job, status, pruned=folder in pruned, killed=killed)
            board.ended(job, outcomes[folder].state, outcomes[folder].message)

    with _sigterm_as_interrupt():
        try:
            while waiting or running:
                while waiting and (n := executor.free()) > 0:
                    batch = [waiting.popleft() for _ in range(min(n, len(waiting)))]
                    _start(batch, executor, running, outcomes, board)
                collect()
                for folder, (job, process) in running.items():
                    if monitor is not None and folder not in pruned and monitor(job):
                        pruned.add(folder)
                        process.stop()
                board.refresh([job for job, _ in running.values()], len(waiting))
                if running:
                    time.sleep(POLL_SECONDS)
        except KeyboardInterrupt:
            board.say(f"Stopping: {len(running)} running job(s) finish their step and save; again to end them at once")
            for _, process in running.values():
                process.stop()
            try:
                while running:
                    collect()
                    time.sleep(POLL_SECONDS)
            except KeyboardInterrupt:
                killed = True
                for _, process in running.values():
                    process.kill()
                while running:
                    collect()
            raise Interrupted(outcomes) from None
    return outcomes


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM ended the jobs; holds how those that had started ended."""

    def __init__(self, outcomes: dict[Path, Outcome]):
        super().__init__()
        self.outcomes = outcomes


def _start(
    batch: Sequence[Job],
    executor: Executor,
    running: dict[Path, tuple[Job, Running]],
    outcomes: dict[Path, Outcome],
    board: Board,
) -> None:
    resumed = {job.folder for job in batch if state(job.folder) == "partial"}
    try:
        processes = executor.start(batch)
    except (JobIsRunningError, OSError) as error:
        for job in batch:
            outcomes[job.folder] = Outcome("failed", str(error))
            board.ended(job, "failed", str(error))
        return
    for job, process in zip(batch, processes, strict=True):
        running[job.folder] = (job, process)
        board.started(job, resumed=job.folder in resumed)


def _outcome(job: Job, status: int, *, pruned: bool, killed: bool) -> Outcome:
    if status == 0 and state(job.folder) == "finished":
        return Outcome("finished")
    if pruned:
        return Outcome("pruned", PRUNED)
    if status in (128 + signal.SIGTERM, 128 + signal.SIGINT, -signal.SIGTERM) or killed:
        return Outcome("stopped", _signal_words(status))
    if status == -signal.SIGKILL:
        return Outcome("failed", "killed from outside; the system does so when memory runs out")
    return Outcome("failed", f"exit status {status}: {last_words(log_file(job.folder))}")


def _signal_words(status: int) -> str:
    return "killed" if status < 0 else "stopped and saved"


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

    try:
        before: Mapping[int, Any] = {signal.SIGTERM: signal.signal(signal.SIGTERM, interrupt)}
    except ValueError:  # not in the main thread, where no signal arrives
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
