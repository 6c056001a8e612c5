"""What all sweeps share: a folder, jobs that run and how they ended, and the report of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from thunderhead.lab.execution import Executor, Interrupted, Monitor, Outcome, log_file, run_jobs
from thunderhead.lab.jobs import Job, steps
from thunderhead.lab.progress import Board
from thunderhead.lab.report import write_report
from thunderhead.lab.runs import Failure, Run, read_runs
from thunderhead.training import record

SINGLE_RUN = {
    "match": {"_target_": "thunderhead.lab.match.Unmatched"},
    "tune": {"_target_": "thunderhead.lab.tune.Untuned"},
    "resume": None,
}
"""What a job's configuration holds for the groups that act on a sweep: it is an ordinary run."""


class Report(Protocol):
    """Writes what a sweep found into its folder; see `thunderhead.lab.report.write_report`."""

    def __call__(
        self,
        folder: Path,
        runs: Sequence[Run],
        *,
        baseline: str | None,
        failures: Sequence[Failure],
        notes: Sequence[str],
        names: Mapping[Path, str],
    ) -> Path: ...


@dataclass
class Sweep:
    """A sweep's folder, where its jobs run, and what is to be said about it in the end.

    - jobs: of the comparison. names: their arms, by folder. outcomes: of all jobs that were started, by folder.
    - failures, pruned, notes: for the report.
    """

    folder: Path
    executor: Executor
    arguments: list[str]
    write_report: Report = write_report

    def __post_init__(self) -> None:
        self.outcomes: dict[Path, Outcome] = {}
        self.failures: list[Failure] = []
        self.pruned: list[Failure] = []
        self.notes: list[str] = []
        self.names: dict[Path, str] = {}
        self.jobs: list[Job] = []

    def begin(self) -> None:
        """Write sweep.json, by which `resume=<folder>` knows the sweep."""
        record.write_json(self.folder / "sweep.json", {"arguments": self.arguments})

    def run(self, jobs: Sequence[Job], title: str, monitor: Monitor | None = None) -> None:
        """Run jobs, and note how they ended."""
        try:
            with Board(jobs, title) as board:
                found = run_jobs(jobs, self.executor, board, monitor)
        except Interrupted as interrupted:
            self.note(jobs, interrupted.outcomes)
            raise
        self.note(jobs, found)

    def note(self, jobs: Sequence[Job], outcomes: dict[Path, Outcome]) -> None:
        self.outcomes |= outcomes
        for job in jobs:
            outcome = outcomes.get(job.folder)
            if outcome is not None and outcome.state == "failed":
                self.failures.append(Failure(job.name, f"{outcome.message} (see {log_file(job.folder)})"))
            elif outcome is not None and outcome.state == "pruned":
                at, of = steps(job.folder) or (0, 0)
                self.pruned.append(Failure(job.name, f"pruned at step {at:,} of {of:,}: {outcome.message}"))

    def end(self, *, interrupted: bool, baseline: str | None = None) -> int:
        """Write sweep.json and the report of the jobs that are there; gives the exit status."""
        waiting = {"state": "waiting"}
        told = {
            str(job.folder.relative_to(self.folder)): {"name": job.name, "arm": self.names[job.folder]}
            | (self.outcomes[job.folder]._asdict() if job.folder in self.outcomes else waiting)
            for job in self.jobs
        }
        record.write_json(self.folder / "sweep.json", {"arguments": self.arguments, "jobs": told})
        without = {folder for folder, outcome in self.outcomes.items() if outcome.state in ("failed", "pruned")}
        folders = [job.folder for job in self.jobs if job.folder not in without]
        recorded = [place for place in folders if (place / "plan.json").is_file() and (place / "config.yaml").is_file()]
        known = baseline if baseline in [self.names[place] for place in recorded] else None
        if baseline is not None and known is None:
            self.notes.append(f"No run of the baseline {baseline} has begun yet.")
        self.write_report(
            self.folder,
            read_runs(recorded),
            baseline=known,
            failures=[*self.failures, *self.pruned],
            notes=self.notes,
            names=self.names,
        )
        return 130 if interrupted else 1 if self.failures else 0
