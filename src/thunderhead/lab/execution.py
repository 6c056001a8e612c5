"""Run the jobs of a sweep: start them, watch them, and end them when asked to."""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch

from thunderhead import disk
from thunderhead.lab.job_server import IMPORTS, JobServer
from thunderhead.lab.jobs import Job, prepare_start, state
from thunderhead.lab.progress import Board
from thunderhead.processes import (
    GRACE,
    PARENT,
    RANK_VARIABLES,
    SIGNALS,
    WHEN_KILLED,
    Stopped,
    allowed_cores,
    listen,
    stop,
)
from thunderhead.training.record import read_summary

POLL_SECONDS = 0.5
ORPHAN_SECONDS = 30  # that the process of a job has to save and end, after its sweep was killed
PRUNED = "worse than the median of the trials before it"
# Set for this process, by us or by a scheduler, and not meant for the jobs.
NOT_INHERITED = {*RANK_VARIABLES, "HYDRA_FULL_ERROR", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"}


class Outcome(NamedTuple):
    """How a job ended."""

    state: Literal["finished", "failed", "stopped", "pruned", "diverged"]
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
    def start(self, jobs: Sequence[Job]) -> Sequence[Running]: ...


Monitor = Callable[[Job], bool]
"""Called for each running job now and then; true ends it early."""


def log_file(folder: Path) -> Path:
    """What a job printed, on all its starts."""
    return folder / "log.txt"


# --- on this machine --------------------------------------------------------------------------------------------------


class LocalProcess(subprocess.Popen[bytes]):
    """A job in a process of its own, in a session of its own, so that Ctrl-C reaches it through `stop` only."""

    def __init__(self, job: Job, program: Sequence[str], **options: Any):
        with log_file(job.folder).open("ab") as log:
            options |= {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
            super().__init__(prepare_start(job, program), start_new_session=True, **options)

    stop = subprocess.Popen.terminate  # SIGTERM: a training run finishes its step, saves and ends

    def kill(self) -> None:
        """The process and those that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


class LocalExecutor:
    """Jobs as processes of this machine, up to `n_jobs` at a time, by `program` (() = this one).

    Parallel jobs share the CPU cores by OMP_NUM_THREADS, unless it is set, and the GPUs by CUDA_VISIBLE_DEVICES. They
    are forked from one process that has made `imports`; not if that is None, nor on systems whose libraries do not bear
    it.
    """

    def __init__(self, n_jobs: int, program: Sequence[str] = (), imports: Sequence[str] | None = IMPORTS):
        self._slots: list[Running | None] = [None] * n_jobs
        self._program = program
        self._environment = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
        self._environment |= {"PYTHONUNBUFFERED": "1", PARENT: str(os.getpid())}
        if n_jobs > 1:
            self._environment.setdefault("OMP_NUM_THREADS", str(max(1, allowed_cores() // n_jobs)))
        self._imports = imports if sys.platform == "linux" else None
        self._server = self._new_server()

    def _new_server(self) -> JobServer | None:
        return None if self._imports is None else JobServer(self._environment, self._imports)

    def free(self) -> int:
        return len(self._free())

    def _free(self) -> list[int]:
        return [slot for slot, process in enumerate(self._slots) if process is None or process.poll() is not None]

    def start(self, jobs: Sequence[Job]) -> list[Running]:
        """Start a process for each; OSError if one that a killed sweep left behind does not end."""
        return [self._start(job, slot) for job, slot in zip(jobs, self._free(), strict=False)]

    def _start(self, job: Job, slot: int) -> Running:
        job.folder.mkdir(parents=True, exist_ok=True)
        # .lock is the run's own; the process inherits this one: it is held until the process ends, however it does
        with (job.folder / ".job.lock").open("w") as lock:
            deadline = time.monotonic() + ORPHAN_SECONDS
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise BlockingIOError(f"a process of an earlier start still trains {job.folder}") from None
                    time.sleep(POLL_SECONDS)
            devices = self._devices(slot)
            process: Running
            if self._server is not None and self._server.has_ended():  # killed, as for want of memory
                self._server = self._new_server()
            if self._server is None:
                environment = self._environment | devices
                process = LocalProcess(job, self._program, env=environment, pass_fds=(lock.fileno(),))
            else:
                _, *command = prepare_start(job, self._program)  # by the server's Python
                with log_file(job.folder).open("ab") as log:
                    process = self._server.start(command, devices, (log.fileno(), lock.fileno()))
        self._slots[slot] = process
        return process

    def _devices(self, slot: int) -> dict[str, str]:
        """The GPUs of a slot, as an environment variable, where there are any to share."""
        if (n_jobs := len(self._slots)) == 1:
            return {}
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        here = map(str, range(torch.cuda.device_count()))
        devices = [device for device in (visible.split(",") if visible is not None else here) if device]
        return {"CUDA_VISIBLE_DEVICES": ",".join(share(devices, n_jobs, slot))} if devices else {}


def share(devices: Sequence[str], n_jobs: int, slot: int) -> list[str]:
    """The devices of one of `n_jobs` slots: equal parts; one device in turn where there are fewer devices than jobs."""
    each = len(devices) // n_jobs
    return list(devices[slot * each : (slot + 1) * each]) if each else [devices[slot % len(devices)]]


# --- until all have ended ---------------------------------------------------------------------------------------------


def run_jobs(
    jobs: Sequence[Job],
    executor: Executor,
    board: Board,
    outcomes: dict[Path, Outcome],
    monitor: Monitor | None = None,
) -> None:
    """Run what is not finished, in order, as many at a time as the executor takes; those with the same folder once.

    How each ended is noted in `outcomes`, by its folder. A failed job does not stop the others. On Ctrl-C and other
    SIGNALS the running jobs are asked to save and end, and Stopped is raised then; another, after GRACE, ends them.
    """
    watch = _Watch(executor, board, outcomes)
    waiting: deque[Job] = deque()
    for job in {job.folder: job for job in jobs}.values():
        if state(job.folder) != "finished":
            waiting.append(job)
        elif lost := [name for name in ("config.yaml", "plan.json") if not (job.folder / name).is_file()]:
            remedy = f"move {job.folder} away to have it trained again"
            watch.end(job, Outcome("failed", f"{lost[0]} of its record is gone: {remedy}"), "failed")
        else:
            watch.end(job, Outcome("finished", already=True), "finished before")
    handler = listen(stop, stop)
    before: dict[int, Any] = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        while waiting or watch.running:
            while waiting and (n := executor.free()) > 0:
                watch.start([waiting.popleft() for _ in range(min(n, len(waiting)))])
            watch.collect()
            watch.prune(monitor)
            board.refresh([job for job, _ in watch.running.values()])
            watch.wait()
    except Stopped:
        watch.stop()
        raise  # and go on to pass over signals: the report has yet to be written
    for number, previous in before.items():
        signal.signal(number, previous)


class _Watch:
    """The jobs that run, by their folders, and how others ended."""

    def __init__(self, executor: Executor, board: Board, outcomes: dict[Path, Outcome]):
        self.executor, self.board, self.outcomes = executor, board, outcomes
        self.running: dict[Path, tuple[Job, Running]] = {}
        self.pruned: set[Path] = set()
        self.killed = False

    def start(self, batch: Sequence[Job]) -> None:
        resumed = {job.folder for job in batch if state(job.folder) == "partial"}
        try:
            processes = self.executor.start(batch)
        except OSError as error:
            for job in batch:
                self.end(job, Outcome("failed", disk.problem(error) or str(error)))
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
        self.board.say(f"Stopping: {n} running job(s) finish their step and save; again to end them, in {GRACE:.0f} s")
        for _, process in self.running.values():
            process.stop()
        try:
            self._collect_all()
        except Stopped:
            self.killed = True
            for _, process in self.running.values():
                process.kill()
            self._collect_all()

    def _collect_all(self) -> None:
        while self.running:
            self.collect()
            self.wait()

    def wait(self) -> None:
        """POLL_SECONDS, or until one of those that run has ended, so that the next begins at once."""
        end = time.monotonic() + POLL_SECONDS
        while self.running and time.monotonic() < end and all(p.poll() is None for _, p in self.running.values()):
            time.sleep(POLL_SECONDS / 20)


def _outcome(job: Job, status: int, *, pruned: bool, killed: bool) -> Outcome:
    if status == 0 and state(job.folder) == "finished":
        return Outcome("finished")
    if pruned:
        return Outcome("pruned", PRUNED)
    if status == 1 and (diverged := (read_summary(job.folder) or {}).get("diverged")):
        return Outcome("diverged", f"at step {diverged['step']:,}: {diverged['what']}")
    if status in (*(128 + number for number in SIGNALS), -signal.SIGTERM) or killed:
        return Outcome("stopped", "killed" if status < 0 else "stopped and saved")
    if status == -signal.SIGKILL:
        return Outcome("failed", f"killed from outside; {WHEN_KILLED}")
    if status == 0:
        return Outcome("failed", "ended before its last step, without an error")
    return Outcome("failed", f"exit status {status}: {last_words(log_file(job.folder))}")


def last_words(log: Path) -> str:
    """What a log says in the end: of a refusal the first problem, of a traceback its error, else the last line."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    begins = [n for n, line in enumerate(lines) if line.startswith(("error:", "Traceback (most recent call last)"))]
    if not begins:
        return lines[-1].strip() if lines else "nothing was printed"
    said = lines[begins[-1] + 1 :]
    if lines[begins[-1]].startswith("Traceback"):  # then its frames, which are indented
        said = [line for line in said if not line.startswith(" ")]
    return (said or lines[-1:])[0].strip()
