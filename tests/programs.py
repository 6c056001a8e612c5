"""train.py as a program of its own, and the processes that it starts."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from thunderhead.training.record import REPOSITORY


def _hears() -> None:
    """Background jobs of a shell ignore Ctrl-C, those of nohup the end of the terminal, and so would all they start."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def start(*command: str) -> subprocess.Popen[str]:
    """Python with these arguments, in a session of its own: a signal to its group reaches what it started, only."""
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=REPOSITORY,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=_hears,  # noqa: PLW1509
    )


def train_py(*overrides: str) -> subprocess.Popen[str]:
    return start("train.py", *overrides)


def wait_until(process: subprocess.Popen[str], happened: Callable[[], object]) -> None:
    """Wait two minutes at most; fails with what was printed if the process ends before."""
    deadline = time.monotonic() + 120
    while not happened():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


NEEDS_PROC = pytest.mark.skipif(not Path("/proc/self").exists(), reason="reads /proc, which Linux has")


def processes_of(folder: Path) -> dict[int, tuple[int, dict[str, str]]]:
    """Those with this folder in their command line, or that print into it: of each its parent and its environment."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            command = (place / "cmdline").read_bytes().decode(errors="replace")
            if str(folder) in command or str(folder) in os.readlink(place / "fd" / "1"):
                parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
                lines = (place / "environ").read_bytes().decode(errors="replace").split("\0")
                found[int(place.name)] = parent, dict(line.partition("=")[::2] for line in lines if "=" in line)
        except OSError:  # ended
            continue
    return found


def ranks_of(process: subprocess.Popen[str], folder: Path) -> dict[int, int]:
    """Process ids of the ranks that a launcher has started, and not of their loaders' workers."""
    found = processes_of(folder).items()
    return {int(env["RANK"]): pid for pid, (parent, env) in found if "RANK" in env and parent == process.pid}
