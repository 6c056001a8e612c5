"""Preparing by many tasks, on one machine or many, carried by datatrove's executors.

What a task does is a `Stages` of ours, whatever carries it: so the shards have the same bytes. datatrove brings the
executors, logs of each task, and the knowledge of which are done, in <shards_dir>/logs/<key>/<time>/<stage>.
"""

import contextlib
import difflib
import errno
import importlib
import importlib.util
import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import Progress

from thunderhead import disk, extras
from thunderhead.core.config import first_line
from thunderhead.core.types import PositiveInt
from thunderhead.corpus.batch_processing import UselessError
from thunderhead.corpus.passes import Passes
from thunderhead.corpus.preparation import Preparation
from thunderhead.corpus.stages import Stages
from thunderhead.disk import write_text
from thunderhead.processes import WHEN_KILLED, allowed_cores, end_with
from thunderhead.terminal import TELL_SECONDS, say

_CLASSES = {
    "local": ("datatrove.executor.local", "LocalPipelineExecutor"),
    "ray": ("datatrove.executor.ray", "RayPipelineExecutor"),
    "slurm": ("datatrove.executor.slurm", "SlurmPipelineExecutor"),
}
_OURS = {"pipeline", "tasks", "workers", "logging_dir", "depends", "skip_completed", "local_tasks", "local_rank_offset"}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "local": {"start_method": "fork"},  # of a process that has imported all
    "slurm": {"qos": None},  # the cluster's own
}
_LITTLE = 1 << 20  # bytes
_SHOWN = 5  # of the tasks that refuse something
_NEEDS = {"local": ["datatrove"], "ray": ["datatrove", "ray"], "slurm": ["datatrove"]}


@dataclass(frozen=True)
class Step:
    """One stage as a step of datatrove's pipelines, with a note of what it refuses."""

    stages: Stages
    stage: str
    folder: Path  # of datatrove's logs of this stage

    def __call__(self, data: Any, rank: int, world_size: int) -> Any:
        from loguru import logger  # comes with datatrove, which writes it to the log of the task

        faults, running = self.folder.parent / "faults", self.folder / "running" / str(rank)
        if self.stage != "verify" and faults.exists():
            raise ValueError("another task refused its part: see its log")
        write_text(running, str(os.getpid()))
        try:
            passes = Passes(self.stages.preparation.sources, log=logger.info, tasks=world_size)
            self.stages.run(self.stage, rank, passes)
        except Exception as error:
            full, log = disk.problem(error), self.folder / "logs" / f"task_{rank:05d}.log"
            is_told = isinstance(error, (ValueError, ConnectionError))
            content = {
                "useless": isinstance(error, UselessError),
                "disk": [error.errno, error.strerror, error.filename] if full and isinstance(error, OSError) else None,
                "message": str(error) if is_told else full or f"engine: {type(error).__name__}: {error}: see {log}",
            }
            write_text(faults / f"{self.stage}-{rank:05d}", json.dumps(content))
            if self.stage != "verify":  # which lets all find their faults
                raise
            logger.error(str(error))
        finally:
            running.unlink(missing_ok=True)
        return data


@dataclass(frozen=True, kw_only=True)
class Datatrove:
    """Tasks on this machine, or on a cluster with a file system that all its machines see."""

    executor: Literal["local", "ray", "slurm"] = "local"
    tasks: PositiveInt = 16
    workers: PositiveInt | None = None  # tasks at a time; None: one for each core here, no limit on a cluster
    arguments: Mapping[str, Any] | None = None  # more of datatrove's executor

    def __post_init__(self) -> None:
        if missing := [name for name in _NEEDS[self.executor] if importlib.util.find_spec(name) is None]:
            more = " ray" if "ray" in missing else ""
            raise ValueError(f"needs {' and '.join(missing)}: {extras.install('datatrove')}{more}")
        known = inspect.signature(self._class).parameters.keys() - _OURS
        arguments, faults = self.arguments or {}, []
        for name in sorted(arguments.keys() - known):
            near = ", ".join(difflib.get_close_matches(name, known, n=1) or sorted(known))
            faults.append(f"engine.arguments.{name}: is no setting of datatrove's executor={self.executor}: {near}")
        if self.executor == "slurm":
            if needs := [name for name in ("partition", "time") if name not in arguments]:
                lacks = f"lacks {' and '.join(needs)}, which slurm needs"
                faults.append(f"engine.arguments: {lacks}: {{partition: …, time: …}}")
            if shutil.which("sbatch") is None:
                faults.append("executor=slurm: there is no sbatch here: start it on a login node of the cluster")
        if faults:
            raise ValueError("; ".join(faults))

    @property
    def _class(self) -> Any:
        module, name = _CLASSES[self.executor]
        return getattr(importlib.import_module(module), name)

    def carry(self, stages: Stages) -> bool:
        _check(stages.preparation)
        logs = self._logs(stages)
        if self.executor == "slurm":
            self._submit(stages, logs)
            return False
        for fault in _faults(logs):
            say(f"  (it was refused the last time: {fault['message']})")
        for left in (logs / "faults", *logs.glob("*/running")):
            shutil.rmtree(left, ignore_errors=True)
        self._run(self._chain(stages, logs), stages, logs)
        return True

    def _logs(self, stages: Stages) -> Path:
        """The folder of this preparation's logs: the one that it was begun with."""
        file = stages.work / "logs"
        if not file.exists():
            write_text(file, time.strftime("%Y-%m-%d_%H-%M-%S"))
        place = Path(stages.preparation.shards_dir, "logs", stages.key, file.read_text()).absolute()
        place.mkdir(parents=True, exist_ok=True)
        return place

    def _chain(self, stages: Stages, logs: Path) -> Any:
        """An executor for each stage, each after the one before; returns the last."""
        workers = self.workers or (allowed_cores() if self.executor == "local" else -1)
        last = None
        for stage, tasks in stages.names():
            step = Step(stages, stage, logs / stage)
            more = {**_DEFAULTS.get(self.executor, {}), **(self.arguments or {})}
            if self.executor == "slurm":
                more = {"job_name": f"prepare-{stage}", "env_command": _env_command(), **more}
                more["sbatch_args"] = {"kill-on-invalid-dep": "yes"} | (more.get("sbatch_args") or {})
            last = self._class(
                [step], tasks=tasks, workers=workers, logging_dir=str(logs / stage), depends=last,
                skip_completed=stage != "verify", **more,
            )  # fmt: skip
        return last

    def _submit(self, stages: Stages, logs: Path) -> None:
        submitted = stages.work / "jobs"
        if submitted.exists() and (jobs := submitted.read_text()) and _queued(jobs):
            raise ValueError(f"engine: jobs {jobs} are preparing this already: squeue -j {jobs}")
        if len(str(logs).split()) > 1:
            raise ValueError(f"data.shards_dir: {logs}: datatrove's scripts for SLURM take no spaces in a path")
        shutil.rmtree(logs / "faults", ignore_errors=True)
        last, executors = self._chain(stages, logs), list[Any]()
        while last is not None:
            executors.insert(0, last)
            last = last.depends
        try:
            executors[-1].run()
        except subprocess.CalledProcessError as error:
            begun = [str(executor.job_id) for executor in executors if executor.job_id not in (None, -1)]
            subprocess.run(["scancel", *begun], check=False)
            raise ValueError("engine.arguments: SLURM takes no such job, see sbatch's message above") from error
        jobs = ",".join(str(executor.job_id) for executor in executors if executor.job_id != -1)
        if stages.work.exists():  # they are not done already
            write_text(submitted, jobs)
        say(
            f"Submitted {len(executors)} jobs, each after the one before, of up to {self.tasks} tasks: squeue -j {jobs}"
        )
        say(f"  logs of each task: {logs}/<stage>/logs; if one fails, the same command goes on")

    def _run(self, executor: Any, stages: Stages, logs: Path) -> None:
        """Run the executors in a process group of their own, which ends with this process; show how far they are."""
        import dill

        pickled = logs / "executor.pik"
        with open(pickled, "wb") as file:
            dill.dump(executor, file, fmode=dill.CONTENTS_FMODE)
        environment = {
            **os.environ,
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
            "PYTHONSAFEPATH": "1",  # modules are found as here, none in the folder where the command was given
        }
        command = [
            sys.executable,
            "-c",
            f"import {__name__} as engine; engine.launch()",
            str(pickled),
            str(os.getpid()),
            self.executor,
        ]
        with open(logs / "executor.log", "ab") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
        try:
            killed = self._watch(process, stages, logs)
        finally:
            with contextlib.suppress(ProcessLookupError):  # tasks outlive a first process that was killed
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        _refuse(_faults(logs))
        if killed:
            raise ValueError(f"engine: {killed} was killed: {WHEN_KILLED}; the next start goes on where it was")
        if process.returncode != 0 and shutil.disk_usage(logs).free < _LITTLE:  # not even a fault could be noted
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(logs))
        if process.returncode != 0:
            raise ValueError(f"engine: the executor ended with status {process.returncode}: see {logs}/executor.log")

    def _watch(self, process: subprocess.Popen[bytes], stages: Stages, logs: Path) -> str | None:
        """Show how far tasks are until all have ended; name what was killed, if something was."""
        console, told = Console(stderr=True), time.monotonic()
        with Progress(console=console, disable=not console.is_terminal) as progress:
            bars = {stage: progress.add_task(stage.capitalize(), total=tasks) for stage, tasks in stages.names()}
            while process.poll() is None:
                time.sleep(0.2)
                for stage, bar in bars.items():
                    progress.update(bar, completed=len(_listed(logs / stage / "completions")))
                if self.executor == "local" and (dead := _killed(logs)):
                    return dead
                if progress.disable and time.monotonic() - told >= TELL_SECONDS:
                    told = time.monotonic()
                    for task in [task for task in progress.tasks if not task.finished][:1]:
                        say(f"  {task.description}: {task.completed:.0f} of {task.total:.0f} tasks")
        return "one of its processes" if process.returncode == -signal.SIGKILL else None


def _check(preparation: Preparation) -> None:
    """Raise ValueError if something cannot be sent to tasks, or their logs would be among the text: of all such."""
    import dill

    shards_dir, found = Path(preparation.shards_dir).resolve(), []
    for name, source in preparation.sources.items():
        path = getattr(source, "path", None)
        if isinstance(path, str) and Path(path).expanduser().resolve() in (shards_dir, *shards_dir.parents):
            lies = f"lies in {path} of data.sources.{name}, where logs of tasks would be among the text"
            found.append(f"data.shards_dir: {shards_dir} {lies}: put it elsewhere")
    parts: dict[str, object] = {f"data.sources.{name}": source for name, source in preparation.sources.items()}
    parts |= {f"curation.filters.{name}": rule for name, rule in preparation.filters.items()}
    for path, part in (parts | {"tokenizer": preparation.tokenizer}).items():
        try:
            dill.dumps(part)
        except Exception as error:  # of whatever class its own code raises
            found.append(f"{path}: tasks cannot be given it ({first_line(error)}): use engine=local")
    if found:
        raise ValueError("; ".join(found))


def launch() -> None:
    """Run the executor of the file sys.argv[1], and end when the process sys.argv[2] does."""
    import dill

    end_with(int(sys.argv[2]), lambda: os.killpg(0, signal.SIGKILL))
    with open(sys.argv[1], "rb") as file:
        executor = dill.load(file)  # written by the process that started this one

    def begin() -> None:  # of those that do the tasks: they end with this one
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        end_with(os.getppid(), lambda: os._exit(1))

    if sys.argv[3] == "local":  # Ray has servers of its own below this process, and kills them
        signal.signal(signal.SIGCHLD, _end_with_child)
        os.register_at_fork(after_in_child=begin)
    executor.run()


def _end_with_child(*_: object) -> None:
    """End by kill -9 if a child did: one that was about to begin a task, or to end one, has not said so."""
    with contextlib.suppress(ChildProcessError):
        found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if found is not None and (found.si_code, found.si_status) == (os.CLD_KILLED, signal.SIGKILL):
            os.kill(os.getpid(), signal.SIGKILL)


def _listed(folder: Path) -> list[Path]:
    return list(folder.glob("[!.]*"))  # none that is half-written


def _killed(logs: Path) -> str | None:
    """Name a task that runs no more, and did not say why: datatrove's pool waits for such for ever."""
    for file in logs.glob("*/running/*"):
        try:
            os.kill(int(file.read_text()), 0)
        except (FileNotFoundError, ValueError):  # it is done meanwhile
            continue
        except ProcessLookupError:
            if file.exists():
                file.unlink()
                return f"task {file.name} of {file.parent.parent.name}"
    return None


def _faults(logs: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_bytes()) for file in sorted(_listed(logs / "faults"))]


def _refuse(faults: list[dict[str, Any]]) -> None:
    """Raise what tasks did, if they did."""
    for fault in faults:
        if fault["disk"]:
            raise OSError(*fault["disk"])
    if faults:
        told = list(dict.fromkeys(fault["message"] for fault in faults))
        more = [f"{len(told) - _SHOWN} more tasks: see their logs"] if len(told) > _SHOWN else []
        message = "; ".join([*told[:_SHOWN], *more])
        raise UselessError(message) if any(fault["useless"] for fault in faults) else ValueError(message)


def _queued(jobs: str) -> bool:
    """Say whether jobs wait or run; SLURM forgets those that are done."""
    found = subprocess.run(["squeue", "--noheader", "--jobs", jobs], capture_output=True, text=True, check=False)
    return found.returncode == 0 and bool(found.stdout.strip())


def _env_command() -> str:
    """Let jobs find this Python's commands, and modules that are found from here."""
    paths = os.pathsep.join(path for path in sys.path if path)
    return f'export PATH="{Path(sys.executable).parent}:$PATH" PYTHONPATH="{paths}"'
