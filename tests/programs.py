"""The programs at the top of the repository as processes of their own, and those that they start."""

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from thunderhead.lab.job_server import JobServer, ServedJob
from thunderhead.training.record import REPOSITORY

VARIABLES = {name: value for name, value in os.environ.items() if name != "HYDRA_FULL_ERROR"}  # before any test
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}


def _hears() -> None:
    """Background jobs of a shell ignore Ctrl-C, those of nohup the end of the terminal, and so would all they start."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def start(*command: str) -> subprocess.Popen[str]:
    """Python with these arguments, in a session of its own: a signal to its group reaches what it started, only."""
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=REPOSITORY,
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=_hears,  # noqa: PLW1509
    )


@functools.cache
def _server() -> JobServer:
    """Has imported what a run does: half of the time that a program of tests takes."""
    return JobServer(VARIABLES | ENVIRONMENT)


def fork(
    program: str | Path, *arguments: str, log: Path, errors: Path | None = None, cwd: Path = REPOSITORY,
    path: Path | None = None, **environment: str
) -> ServedJob:  # fmt: skip
    """Start a program in a process forked from one that has imported all; `path` is put before Python's.

    It differs from `start` in that alone: what is asked of how a program starts needs a process of its own.
    """
    variables = {name: value for name, value in os.environ.items() if name != "HYDRA_FULL_ERROR"} | ENVIRONMENT
    variables |= {"PYTHONPATH": os.pathsep.join([str(path), *sys.path])} if path is not None else {}
    how = {"program": str(REPOSITORY / program), "cwd": str(cwd), "stderr": str(errors or log)}
    how |= {"path": str(path)} if path is not None else {}
    command = [str(Path(__file__).with_name("forked.py")), json.dumps(how), *arguments]
    with log.open("wb") as file:
        return _server().start(command, variables | environment, [file.fileno()])


def wait(jobs: Sequence[ServedJob], seconds: float = 300) -> list[int]:
    """Wait for them to end, and kill those that take longer; returns their statuses."""
    deadline = time.monotonic() + seconds
    try:
        while any(job.poll() is None for job in jobs) and time.monotonic() < deadline:
            time.sleep(0.01)
        return [-signal.SIGKILL if (status := job.poll()) is None else status for job in jobs]
    finally:
        for job in jobs:
            job.kill()


def run(program: str, *arguments: str, **how: Any) -> subprocess.CompletedProcess[str]:
    """A program to its end, as `fork` starts it."""
    with tempfile.TemporaryDirectory() as folder:
        output, errors = (Path(folder) / name for name in ("output", "errors"))
        errors.touch()
        (status,) = wait([fork(program, *arguments, log=output, errors=errors, **how)])
        return subprocess.CompletedProcess([program, *arguments], status, output.read_text(), errors.read_text())


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
