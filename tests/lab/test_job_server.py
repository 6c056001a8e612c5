"""A process that has imported what its jobs need, and is forked for each."""

import fcntl
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from thunderhead.lab.job_server import JobServer, ServedJob

PROGRAM = """
import atexit, os, subprocess, sys, threading, time
import counted
print(sys.argv[1:], os.getcwd(), os.environ["OF_THE_JOB"], os.environ["OF_ALL"], __name__, flush=True)
if sys.argv[1] == "wait":
    child = subprocess.Popen(["sleep", "60"])
    print("child", child.pid, flush=True)
    time.sleep(60)
if sys.argv[1] == "orphan":
    while os.getppid() == int(os.environ["THUNDERHEAD_PARENT"]):
        time.sleep(0.01)
    print("the server is gone", flush=True)
if sys.argv[1] == "end":
    atexit.register(print, "at the end")
    threading.Thread(target=lambda: (time.sleep(0.5), print("from a thread"))).start()
    print("and by then printed", end="")
    sys.exit("as it had to be")
if sys.argv[1] == "raise":
    raise RuntimeError("a wire broke")
sys.exit(int(sys.argv[1]) if sys.argv[1].isdigit() else 0)
"""

Start = Callable[..., ServedJob]


@pytest.fixture
def server(tmp_path: Path) -> JobServer:
    """It has imported a module that takes a moment, and notes each time that it is read."""
    source = f"open({str(tmp_path / 'read')!r}, 'a').write('read\\n')"
    (tmp_path / "counted.py").write_text(source, encoding="utf-8")
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
    return JobServer({**os.environ, "OF_ALL": "1", "PYTHONPATH": str(tmp_path)}, ["counted"])


@pytest.fixture
def start(server: JobServer, tmp_path: Path) -> Iterator[Start]:
    started = []

    def start(*arguments: str) -> ServedJob:
        with (tmp_path / "log").open("ab") as log, (tmp_path / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            command = [str(tmp_path / "program.py"), *arguments]
            job = server.start(command, {"OF_THE_JOB": "2"}, (log.fileno(), lock.fileno()))
        started.append(job)
        return job

    yield start
    for job in started:
        job.kill()


def status(job: ServedJob) -> int:
    return until(job.poll)


def until(found: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 60
    while (value := found()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return value


def test_a_job_is_the_program_it_asked_for_and_imports_are_made_once(start: Start, tmp_path: Path) -> None:
    assert [status(job) for job in [start("0"), start("3"), start("raise")]] == [0, 3, 1]
    log = (tmp_path / "log").read_text(encoding="utf-8")
    assert f"['3'] {Path.cwd()} 2 1 __main__" in log
    assert "RuntimeError: a wire broke" in log
    assert (tmp_path / "read").read_text(encoding="utf-8") == "read\n"


def test_a_job_has_the_end_of_any_program(start: Start, tmp_path: Path) -> None:
    assert status(start("end")) == 1
    log = (tmp_path / "log").read_text(encoding="utf-8")
    for words in ("and by then printed", "from a thread", "at the end", "as it had to be"):
        assert words in log


def test_a_job_is_ended_with_what_it_started_and_its_files_are_free(start: Start, tmp_path: Path) -> None:
    def child() -> int | None:
        words = (tmp_path / "log").read_text(encoding="utf-8").split()
        return int(words[words.index("child") + 1]) if "child" in words[:-1] else None

    job = start("wait")
    grandchild = until(child)
    with (tmp_path / "lock").open("w") as lock:
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        job.stop()
        assert status(job) == -signal.SIGTERM
        job.stop()  # says nothing of one that has ended
        os.kill(grandchild, signal.SIGKILL)
        until(lambda: True if _is_free(lock.fileno()) else None)
    (tmp_path / "log").unlink()
    job = start("wait")
    grandchild = until(child)
    job.kill()
    assert status(job) == -signal.SIGKILL
    until(lambda: None if _runs(grandchild) else True)


def _is_free(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_killed_server_ends_its_jobs_and_says_so(server: JobServer, start: Start, tmp_path: Path) -> None:
    job = start("orphan")
    os.kill(server._process.pid, signal.SIGKILL)
    assert status(job) == -signal.SIGKILL
    assert server.has_ended()
    until(lambda: True if "the server is gone" in (tmp_path / "log").read_text(encoding="utf-8") else None)
    with pytest.raises(OSError, match="the process that starts jobs has ended"):
        start("0")


def test_what_the_server_cannot_import_is_told() -> None:
    with pytest.raises(OSError, match="No module named 'no_such_module'"):
        JobServer(dict(os.environ), ["no_such_module"]).start([sys.executable], {}, (1, 1))
