"""`python -m thunderhead.lab.job_server`: a process that has imported everything, and forks for each job of a sweep.

What a run imports takes longer than many a short run trains. `JobServer` starts such a process; lines of JSON pass
between the two on a socket, the server's standard input. A job comes as {"command": […], "environment": {…}}, with the
files that it gets; {"pid": …} of it goes back, and {"pid": …, "status": …} when it has ended, as `subprocess` has it.
The server ends with its sweep, in whatever way that ends.
"""

import atexit
import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from thunderhead import lean
from thunderhead.processes import PARENT

IMPORTS = ("thunderhead.training.run", "thunderhead.corpus.text_data", "torch.utils.tensorboard")
"""What a run takes sooner or later. Nothing in it may start CUDA, or threads that would be missing after a fork."""
CHECK_SECONDS = 0.05
CHUNK = 1 << 16


class JobServer:
    """The server's end in the sweep: starts it, with this environment, and jobs in it. OSError once it has ended."""

    def __init__(self, environment: Mapping[str, str], imports: Sequence[str] = IMPORTS):
        self._socket, theirs = socket.socketpair()
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed by _end
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__, *imports],
                stdin=theirs.fileno(),
                stdout=self._said.fileno(),
                stderr=self._said.fileno(),
                start_new_session=True,  # Ctrl-C is not for it
                # torch would start CUDA to see whether it is there
                env={**environment, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"},
            )
        weakref.finalize(self, _end, self._process, self._socket, self._said)
        self._lines, self._statuses, self._started = b"", dict[int, int](), list[int]()

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def start(self, command: Sequence[str], environment: Mapping[str, str], files: Sequence[int]) -> "ServedJob":
        """Start `command`, a Python program and its arguments; `files` are its output and what it keeps open."""
        message = {"command": list(command), "environment": dict(environment)}
        try:
            socket.send_fds(self._socket, [json.dumps(message).encode() + b"\n"], files)
            while not self._started:
                self._read(wait=True)
        except OSError:
            self._said.seek(0)
            last = (self._said.read().decode(errors="replace").splitlines() or ["it printed nothing"])[-1]
            raise OSError(f"the process that starts jobs has ended: {last}") from None
        return ServedJob(self, self._started.pop(0))

    def status(self, pid: int) -> int | None:
        """The exit status of a job that has ended; that of a killed one if the server has."""
        try:
            self._read(wait=False)
        except OSError:
            return self._statuses.get(pid, -signal.SIGKILL)
        return self._statuses.get(pid)

    def _read(self, *, wait: bool) -> None:
        while wait or select.select([self._socket], [], [], 0)[0]:
            wait = False
            if not (chunk := self._socket.recv(CHUNK)):
                raise ConnectionResetError
            *lines, self._lines = (self._lines + chunk).split(b"\n")
            for told in map(json.loads, lines):
                if "status" in told:
                    self._statuses[told["pid"]] = told["status"]
                else:
                    self._started.append(told["pid"])


def _end(process: subprocess.Popen[bytes], *files: Any) -> None:
    process.kill()  # it may still import
    process.wait()
    for file in files:
        file.close()


class ServedJob:
    """A job in a process that the server forked, in a session of its own."""

    def __init__(self, server: JobServer, pid: int):
        self._server, self.pid = server, pid

    def poll(self) -> int | None:
        return self._server.status(self.pid)

    def stop(self) -> None:
        """SIGTERM: a training run finishes its step, saves and ends."""
        self._send(os.kill, signal.SIGTERM)

    def kill(self) -> None:
        """The process and those that it started."""
        self._send(os.killpg, signal.SIGKILL)

    def _send(self, how: Any, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                how(self.pid, number)


# --- in the server's process -----------------------------------------------------------------------------------------


def main() -> None:
    """Serve; `_serve` returns in the process of a job, which becomes the program that it was asked for."""
    with lean.importing():  # its pages stay as they are, too, for all jobs to share
        for name in sys.argv[1:]:
            importlib.import_module(name)
    if (job := _serve(socket.socket(fileno=os.dup(0)))) is not None:
        os.environ.update(job["environment"])
        program = job["command"][0]
        sys.argv = job["command"]
        sys.path.insert(0, str(Path(program).parent))
        os._exit(_run(program))


def _run(program: str) -> int:
    """Run a program and what it leaves for its end, to its exit status.

    As multiprocessing does for its processes: for Python to take half a million objects apart took 0.2 s a job.
    """
    status: int | str | None = None
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as said:
        status = said.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    threading._shutdown()  # type: ignore[attr-defined] # waits for those that are not daemons
    atexit._run_exitfuncs()
    if isinstance(status, str):
        print(status, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    return 1 if isinstance(status, str) else status or 0


def _serve(sweep: socket.socket) -> dict[str, Any] | None:
    """Start jobs until the sweep has ended; in the process of a job, gives what was asked for."""
    server, running = os.getpid(), set[int]()
    with sweep:
        while True:
            if select.select([sweep], [], [], CHECK_SECONDS if running else None)[0]:
                message, files, _, _ = socket.recv_fds(sweep, CHUNK, 2)
                while message and not message.endswith(b"\n"):
                    message += sweep.recv(CHUNK)
                if not message:
                    return None
                if (pid := os.fork()) == 0:
                    os.setsid()
                    null = os.open(os.devnull, os.O_RDONLY)
                    for source, place in ((null, 0), (files[0], 1), (files[0], 2)):  # others stay open until it ends
                        os.dup2(source, place)
                    job: dict[str, Any] = json.loads(message)
                    return {**job, "environment": {**job["environment"], PARENT: str(server)}}
                for file in files:
                    os.close(file)
                running.add(pid)
                sweep.sendall(json.dumps({"pid": pid}).encode() + b"\n")
            for pid in list(running):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    running.remove(pid)
                    told = {"pid": pid, "status": os.waitstatus_to_exitcode(status)}
                    sweep.sendall(json.dumps(told).encode() + b"\n")


if __name__ == "__main__":
    main()
