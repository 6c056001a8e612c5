"""Which of several processes this one is, by what launchers put into the environment, and which signals end it."""

import contextlib
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU]
"""They end a run after the step under way, with a checkpoint of it, and its process with 128 + their number."""
if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
    SIGNALS.append(signal.SIGHUP)
GRACE = 10.0
"""Seconds in which further signals change nothing: terminals, launchers and schedulers send several at once."""
SAVING_SECONDS = 600  # that a process has to end the step and save, once it is told to stop
WHEN_KILLED = "the system does so when memory runs out"
PARENT = "THUNDERHEAD_PARENT"
"""Where a launcher of ours leaves its process id for those that it starts."""
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

if sys.version_info < (3, 11, 8):
    # Forked while a thread of torch's lets Python know of itself, the new process waits for ever for a lock that the
    # thread held (python/cpython#112275): loader workers of ranks did. It needs a moment.
    os.register_at_fork(before=functools.partial(time.sleep, 0.01))


class Stopped(KeyboardInterrupt):
    """A signal ended what this process does; its number."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def stop(number: int) -> None:
    """Raise Stopped."""
    raise Stopped(number)


def end_at_once(number: int) -> None:
    """Do what a signal does to who does not listen."""
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)


_first_heard: float | None = None  # of this process, whoever listened: handlers take turns while a run ends


def listen(
    first: Callable[[int], None], later: Callable[[int], None] = end_at_once
) -> Callable[[int, FrameType | None], None]:
    """A handler of SIGNALS: calls `first` with the number of the first one, and `later` for those after GRACE.

    The first one since the last call of this function, of all handlers that it has returned.
    """
    global _first_heard  # noqa: PLW0603 - signals are the process'
    _first_heard = None

    def handle(number: int, frame: FrameType | None) -> None:
        global _first_heard  # noqa: PLW0603
        if _first_heard is None:
            _first_heard = time.monotonic()
            first(number)
        elif time.monotonic() - _first_heard > GRACE:
            later(number)

    return handle


def is_slurm_task() -> bool:
    """Whether srun started this process among others; alone, or in an interactive shell of a job, it is no rank."""
    return "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1


def is_rank() -> bool:
    """Whether a launcher (torchrun, or SLURM's srun) started this process as one of several."""
    return "LOCAL_RANK" in os.environ or is_slurm_task()


def global_rank() -> int:
    """The rank that the launcher gave this process; 0 if there is none."""
    return int(os.environ.get("RANK", os.environ["SLURM_PROCID"] if is_slurm_task() else "0"))


def started_processes() -> int | None:
    """How many processes the launcher started, on all machines; None if there is none."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    return int(os.environ["SLURM_NTASKS"]) if is_slurm_task() else None


def allowed_cores() -> int:
    """Cores that this process may use, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_host_memory() -> int:
    """Bytes that processes of this machine can still take; on systems other than Linux half of all that there is.

    Linux's MemAvailable, or what the control groups of this process allow if that is less.
    """
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    (free,) = (int(line.split()[1]) * 1024 for line in meminfo.read_text().splitlines() if "MemAvailable" in line)
    return min([free, *_control_group_memory()])


def _control_group_memory(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[int]:
    """Bytes left in each control group (version 2) that this process is in and that has a limit."""
    lines = own.read_text().splitlines() if own.exists() else []
    left = []
    for path in [line.removeprefix("0::/") for line in lines if line.startswith("0::/")]:
        for folder in ((root / path), *(root / path).parents):
            limit, used, stat = (folder / f"memory.{name}" for name in ("max", "current", "stat"))
            if not limit.exists() or not limit.read_text().strip().isdigit():
                continue
            # files that were read and can be forgotten count as used
            cached = dict(line.split() for line in stat.read_text().splitlines()).get("inactive_file", "0")
            left.append(max(0, int(limit.read_text()) - int(used.read_text()) + int(cached)))
    return left


def end_with(parent: int, end: Callable[[], None]) -> None:
    """Call `end`, in a thread, when `parent`, which started this process, has ended, in whatever way."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        end()

    threading.Thread(target=watch, daemon=True).start()


def end_with_launcher() -> None:
    """Have this process save and end when what started it is gone: our launcher, a sweep, or torchrun's agent.

    Who was killed (kill -9, no memory) could not end it, and it would train on alone, and so would the next start.
    Others, as a shell, may end before what they start. (prctl's PR_SET_PDEATHSIG is Linux' alone, and sets no limit.)
    """
    parent = os.environ.pop(PARENT, None)  # not handed on to what this process starts

    def end() -> None:
        if global_rank() == 0:
            with contextlib.suppress(OSError):  # who read it may be gone, too
                print("error: what started this process was killed: it saves and ends", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(SAVING_SECONDS)  # it may wait for processes that are gone, too
        os.kill(os.getpid(), signal.SIGKILL)

    if parent is not None or "TORCHELASTIC_RUN_ID" in os.environ:
        end_with(int(parent or os.getppid()), end)
