"""What a person sees while a sweep runs: a table of all jobs on a terminal, plain lines elsewhere."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from rich.live import Live
from rich.markup import escape
from rich.table import Table

from thunderhead.lab.jobs import Job, steps
from thunderhead.lab.runs import last_metrics
from thunderhead.terminal import TELL_SECONDS, Console, duration
from thunderhead.training.record import read_summary

REFRESH_SECONDS = 2.0
STYLES = {
    "running": "bold",
    "finished": "green",
    "failed": "bold red",
    "pruned": "yellow",
    "stopped": "yellow",
    "diverged": "red",
}
COLUMNS = {"train/loss": ".3f", "val/loss": ".4f", "tokens_per_second": ",.0f"}


@dataclass
class _Row:
    name: str
    state: str = "waiting"
    note: str = ""
    since: float | None = None
    first_step: int = 0
    at: tuple[int, int] | None = None
    measured: dict[str, float] = field(default_factory=dict)

    def shown(self, column: str) -> str:
        return f"{self.measured[column]:{COLUMNS[column]}}" if column in self.measured else ""

    @property
    def time_left(self) -> str:
        if self.state != "running" or self.since is None or self.at is None or self.at[0] <= self.first_step:
            return ""
        seconds = (time.monotonic() - self.since) / (self.at[0] - self.first_step) * (self.at[1] - self.at[0])
        return duration(seconds)


class Board:
    """Progress across jobs, a row each, read from their records; `console` None = standard output.

    `before` jobs of a larger `total` have ended when these begin, as those of a search.
    """

    def __init__(
        self, jobs: Sequence[Job], title: str, console: Console | None = None, before: int = 0, total: int | None = None
    ):
        self._before, self._total = before, len(jobs) if total is None else total
        self._console, self._title = console or Console(highlight=False), title
        self._rows = {job.folder: _Row(job.name) for job in jobs}
        self._live: Live | None = None
        self._refreshed = time.monotonic() if not self._console.is_terminal else 0.0

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live = Live(self.table(), console=self._console, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.update(self.table(), refresh=True)
            self._live.stop()
            self._live = None

    def say(self, text: str) -> None:
        """One line, above the table."""
        self._console.print(escape(text), soft_wrap=True)

    def started(self, job: Job, *, resumed: bool) -> None:
        row = self._rows[job.folder]
        row.state, row.since = "running", time.monotonic()
        row.at = steps(job.folder) if resumed else None
        row.first_step = row.at[0] if row.at else 0
        if self._live is None:
            begins = f"goes on from its checkpoint (had logged step {row.first_step:,})" if resumed else "begins"
            self.say(f"{job.name}: {begins}")

    def ended(self, job: Job, state: str, note: str = "") -> None:
        row = self._rows[job.folder]
        row.state, row.note = state, note
        self._read(job.folder, row)
        if self._live is None:
            loss = row.shown("val/loss")
            result = f", validation loss {loss}" if state == "finished" and loss else ""
            n_ended = self._before + sum(row.state not in ("waiting", "running") for row in self._rows.values())
            told = f"{job.name}: {state}{result}" + (f" ({note})" if note else "")
            self.say(f"{told}; {n_ended} of {self._total}{self._left() if state != 'stopped' else ''}")

    def _left(self) -> str:
        """How long the other jobs will take, if they take as long as those that have ended."""
        begun = [row.since for row in self._rows.values() if row.since is not None]
        n_open = sum(row.state in ("waiting", "running") for row in self._rows.values())
        n_open += self._total - self._before - len(self._rows)
        n_done = len(begun) - sum(row.state == "running" for row in self._rows.values())
        if not (n_open and n_done):
            return ""
        return f", about {duration((time.monotonic() - min(begun)) / n_done * n_open)} left"

    def refresh(self, running: Sequence[Job]) -> None:
        """Read the records of the running jobs, and show them: the table anew, or now and then a line for each."""
        if time.monotonic() - self._refreshed < (TELL_SECONDS if self._live is None else REFRESH_SECONDS):
            return
        self._refreshed = time.monotonic()
        for job in running:
            row = self._rows[job.folder]
            self._read(job.folder, row)
            if self._live is None and row.at:
                loss = f"  loss {row.shown('train/loss')}" if "train/loss" in row.measured else ""
                left = f"  {row.time_left} left" if row.time_left else ""
                self.say(f"{job.name}: step {row.at[0]:,}/{row.at[1]:,}{loss}{left}")
        if self._live is not None:
            self._live.update(self.table(), refresh=True)

    def _read(self, folder: Path, row: _Row) -> None:
        row.at = steps(folder) or row.at
        row.measured = {column: value for measured in last_metrics(folder) for column, value in measured.items()}
        if (summary := read_summary(folder)) is not None and "val_loss" in summary:
            row.measured["val/loss"] = summary["val_loss"]

    def table(self) -> Table:
        """All jobs as they stand."""
        done = sum(row.state == "finished" for row in self._rows.values())
        title = f"{self._title}: {done} of {len(self._rows)} finished{self._left()}"
        table = Table(title=title, title_justify="left", box=None)
        table.add_column("run", no_wrap=True)
        table.add_column("")
        for heading in ("step", "loss", "val loss", "tokens/s", "left"):
            table.add_column(heading, justify="right", no_wrap=True)
        for row in self._rows.values():
            at = f"{row.at[0]:,}/{row.at[1]:,}" if row.at else ""
            state = row.state if row.state != "failed" else f"failed: {row.note}"
            shown = f"[{STYLES.get(row.state, 'dim')}]{escape(state)}[/]"
            table.add_row(escape(row.name), shown, at, *map(row.shown, COLUMNS), row.time_left)
        return table
