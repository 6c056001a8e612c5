"""What all sweeps share: a folder, jobs that run and how they ended, and the report of them."""

import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from thunderhead import command_line, disk
from thunderhead.command_line import is_taken_from_a_record, joined, shown
from thunderhead.core.config import ConfigError, Problem, quoted, read_mapping
from thunderhead.lab.analysis import Analysis, analyse
from thunderhead.lab.execution import Executor, Monitor, Outcome, log_file, run_jobs
from thunderhead.lab.jobs import Job, PlanRun, state, steps
from thunderhead.lab.packing import Unmeasured
from thunderhead.lab.progress import Board
from thunderhead.lab.report import write_report
from thunderhead.lab.reuse import take_over
from thunderhead.lab.runs import Failure, Run, planned_looks, read_runs
from thunderhead.terminal import say
from thunderhead.training import record

SINGLE_RUN = {
    "match": {"_target_": "thunderhead.lab.match.Unmatched"},
    "tune": {"_target_": "thunderhead.lab.tune.Untuned"},
    "resume": None,
}
"""What a job's configuration holds for the groups that act on a sweep: it is an ordinary run."""


@dataclass
class Sweep:
    """A sweep's folder, where its jobs run, and what is to be said about it in the end.

    - arguments: of the command line, to go on with later. plan: plans a run, or refuses it.
    - report: what is written in the end, called as `thunderhead.lab.report.write_report`. comparisons: its
      metric and smallest_effect; looks at several numbers of seeds are planned before the first run.
    - jobs: of the comparison. names: their arms, by folder. outcomes: of all jobs that were started, by folder.
    - failures, pruned, notes: for the report. reuse: where finished runs of earlier sweeps are looked for.
    - is_last, announce: jobs that wait for all others, and what is said before them of the runs that have ended.
    """

    folder: Path
    executor: Executor | Unmeasured
    arguments: list[str]
    plan: PlanRun
    report: Callable[..., Path] = write_report
    comparisons: dict[str, Any] = field(default_factory=dict)
    looks: tuple[int, ...] = ()
    jobs: list[Job] = field(default_factory=list)
    names: dict[Path, str] = field(default_factory=dict)
    outcomes: dict[Path, Outcome] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    pruned: list[Failure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    reuse: Path | None = None
    is_last: Callable[[Job], bool] = lambda job: False
    announce: Callable[[Sequence[Run], Sequence[Job]], None] = lambda runs, jobs: None

    @cached_property
    def lock(self) -> FileLock:
        """Keeps others from the folder; it ends with this process, however that ends."""
        return FileLock(self.folder / ".sweep.lock")

    def begin(self) -> None:
        """Hold the folder until this process ends, and write sweep.json, by which `resume=<folder>` knows the sweep.

        ConfigError if another process holds it, it has another sweep, the disk does not take it, or runs have ended
        that were planned to be looked at otherwise.
        """
        self._hold()
        if any(self.folder.glob("*/summary.json")) and (planned := planned_looks(self.folder)) != self.looks:
            told = f"looks at {', '.join(map(str, planned))} seeds were" if planned else "no looks before the end were"
            message = f"{told} planned when this sweep began, and what it found is known by now: start a new one"
            raise ConfigError([Problem("hydra.sweeper", message)])
        with disk.refusing():
            self._write()

    def _hold(self) -> None:
        with disk.refusing():
            self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            message = f"{self.folder} is still being run by another process"
            raise ConfigError([Problem("hydra.sweep.dir", message)]) from None
        except (OSError, NotImplementedError):  # a file system without locks: then nobody can be asked
            pass
        file = self.folder / "sweep.json"
        before = read_mapping(file, "resume").get("arguments", []) if file.is_file() else self.arguments
        if not command_line.is_repeated() and _what(before) != _what(self.arguments):
            message = f"{self.folder} holds another sweep already: give another folder, or go on with it by resume=…"
            raise ConfigError([Problem("hydra.sweep.dir", message)])

    def _write(self, **more: object) -> None:
        record.write_json(self.folder / "sweep.json", {"arguments": self.arguments, "looks": self.looks, **more})

    def _runs(self) -> list[Run]:
        """Those of the comparison that left a record; of failed and pruned ones other words are said."""
        without = {folder for folder, outcome in self.outcomes.items() if outcome.state in ("failed", "pruned")}
        folders = [job.folder for job in self.jobs if job.folder not in without]
        return read_runs(f for f in folders if (f / "plan.json").is_file() and (f / "config.yaml").is_file())

    def analyse(self, baseline: str | None) -> Analysis:
        """What the runs that have ended so far say."""
        return analyse(self._runs(), baseline=baseline, names=self.names, **self.comparisons)

    def run(
        self, jobs: Sequence[Job], title: str, monitor: Monitor | None = None, before: int = 0, total: int | None = None
    ) -> None:
        """Run jobs, and note how they ended; Stopped if a signal ended them. `before` and `total`: see `Board`."""
        outcomes: dict[Path, Outcome] = {}
        looks = self.looks or (len({job.config["seed"] for job in jobs}),)
        if self.reuse is not None and (n := take_over(jobs, self.reuse, looks)):
            told = f"{n} of {len(jobs)} runs were finished by earlier sweeps, with the same code, and taken from there."
            self.notes.append(told)
            say(f"{told} ({self.reuse})")
        executor = self._executor_for(jobs)
        try:
            with Board(jobs, title, before=before, total=total) as board:
                run_jobs(jobs, executor, board, outcomes, monitor)
        finally:
            self.note(jobs, outcomes)

    def _executor_for(self, jobs: Sequence[Job]) -> Executor:
        if not isinstance(self.executor, Unmeasured):
            return self.executor
        if sum(state(job.folder) != "finished" for job in jobs) < 2:  # nothing to run beside each other yet
            return self.executor.executor(1)
        self.executor, told = self.executor.measured(jobs, self.folder)
        say(told)
        return self.executor

    def run_all(self) -> None:
        """Run `jobs`, those that wait for others behind them."""
        last = [job for job in self.jobs if self.is_last(job)]
        self.run([job for job in self.jobs if job not in last], "Sweep")
        if last:
            waiting = {job.folder for job in last}  # some may be finished, of a sweep that goes on
            self.announce([run for run in self._runs() if run.folder not in waiting], last)
            self.run(last, "Held out")

    def note(self, jobs: Sequence[Job], outcomes: dict[Path, Outcome]) -> None:
        self.outcomes |= outcomes
        for job in jobs:
            outcome = outcomes.get(job.folder)
            if outcome is not None and outcome.state == "failed":
                self.failures.append(Failure(job.name, f"{outcome.message} (see {log_file(job.folder)})"))
            elif outcome is not None and outcome.state == "pruned":
                at, of = steps(job.folder) or (0, 0)
                self.pruned.append(Failure(job.name, f"pruned at step {at:,} of {of:,}: {outcome.message}"))

    def end(self, *, stopped: KeyboardInterrupt | None, baseline: str | None = None) -> int:
        """Write sweep.json and the report of the jobs that are there, and say how to go on; gives the exit status."""
        told = {
            str(job.folder.relative_to(self.folder)): {"name": job.name, "arm": self.names[job.folder]}
            | (self.outcomes[job.folder]._asdict() if job.folder in self.outcomes else {"state": "waiting"})
            for job in self.jobs
        }
        self._write(jobs=told)
        found = {"failures": [*self.failures, *self.pruned], "notes": self.notes, "names": self.names}
        self.report(self.folder, self._runs(), **found, baseline=baseline, **self.comparisons)
        self.lock.release()
        if stopped is None and not self.failures:
            return 0
        again = [a for a in joined(self.arguments) if not is_taken_from_a_record(a)]
        say(f"go on with: {shown('train.py', '-m', f'resume={quoted(self.folder)}', *again)}")
        return 1 if stopped is None else 128 + getattr(stopped, "number", signal.SIGINT)


def _what(arguments: Sequence[str]) -> set[str]:
    """A sweep's arguments, but for where it lies."""
    return {a for a in joined(arguments) if not a.startswith(("hydra.sweep.dir=", "-m", "--multirun"))}
