"""`hydra.launcher.n_jobs=auto`: how many runs of a sweep at once make the most tokens a second here, by trying."""

import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from thunderhead.core.config import Config, read_mapping, values_of
from thunderhead.lab.execution import POLL_SECONDS, LocalExecutor, last_words, log_file
from thunderhead.lab.job_server import IMPORTS
from thunderhead.lab.jobs import Job, state
from thunderhead.lab.runs import last_metrics
from thunderhead.processes import allowed_cores, free_host_memory
from thunderhead.terminal import say
from thunderhead.training import record

SECONDS = 5.0
"""That all runs of a trial train beside each other, once each has logged SKIPPED steps."""
SKIPPED = 2  # steps at the start of a run, which are slow
STEPS = 3  # at least, of each run
PATIENCE = 600.0  # seconds until then, importing and preparing of data among them
PROCESS_BYTES = 2**29  # that a process takes beside what its run plans
CHOSEN = "packing.json"


class Unmeasured:
    """Stands for a LocalExecutor until its sweep has jobs: `measured` tries how many at once are best for them."""

    def __init__(self, program: Sequence[str] = (), imports: Sequence[str] | None = IMPORTS):
        self.executor: Callable[[int], LocalExecutor] = lambda n: LocalExecutor(n, program, imports)

    def measured(self, jobs: Sequence[Job], folder: Path) -> tuple[LocalExecutor, str]:
        """An executor for the jobs of a sweep, and what was found: tokens/s of all runs together, by their number.

        Tried is the first job that is not finished, by copies of it that nobody keeps; what was found stays in the
        sweep's folder, for the next start.
        """
        chosen = folder / CHOSEN
        if chosen.is_file() and (found := read_mapping(chosen)).get("cores") == allowed_cores():
            return self.executor(found["n_jobs"]), _told(found)
        waiting = [job for job in jobs if state(job.folder) != "finished"]
        say("n_jobs=auto: trying how many runs at once train fastest, some seconds each")
        rates: dict[int, float] = {}
        folder.mkdir(parents=True, exist_ok=True)
        trials = Path(tempfile.mkdtemp(prefix="trial-", dir=folder))
        try:
            for n in _numbers(len(waiting)):
                if rates and n * _needs(trials) > free_host_memory():
                    break
                rates[n], why = _rate(self.executor(n), n, waiting[0].config, trials)
                say(f"  {n} at a time: {f'{rates[n]:,.0f} tokens/s' if rates[n] else why}")
                if not rates[n] or rates[n] < max(rates.values()):
                    break
        finally:
            shutil.rmtree(trials, ignore_errors=True)
        best = max(rates, key=lambda n: rates[n])
        found = {"n_jobs": best, "cores": allowed_cores(), "tokens_per_second": rates}
        if rates[best]:
            record.write_json(chosen, found)
        return self.executor(best), _told(found)


def _told(found: dict[str, Any]) -> str:
    rates = ", ".join(f"{n} at a time {rate:,.0f}" for n, rate in found["tokens_per_second"].items())
    return f"n_jobs=auto: {found['n_jobs']} at a time; tokens/s of all runs together: {rates}"


def _numbers(n_jobs: int) -> Iterator[int]:
    """Numbers of runs to try, each twice the one before: up to one a core, on GPUs up to eight a GPU."""
    gpus, n = torch.cuda.device_count(), 1
    while n <= min(n_jobs, 8 * gpus or allowed_cores()):
        yield n
        n = gpus if n == 1 and gpus > 1 else 2 * n


def _needs(trials: Path) -> int:
    """Bytes of the host that a run takes, by the plan of the one that was tried alone."""
    plan = read_mapping(trials / "1-1" / "plan.json")
    return PROCESS_BYTES + (sum(plan["memory"].values()) if plan["accelerator"] == "cpu" else 0)


def _rate(executor: LocalExecutor, n: int, config: Config, trials: Path) -> tuple[float, str]:
    """Tokens a second of n runs beside each other; 0, and why, if one of them failed."""
    jobs = [Job({}, _trial(config), trials / f"{n}-{index}") for index in range(1, n + 1)]
    running = executor.start(jobs)
    began, since, seen = time.monotonic(), 0.0, [SKIPPED] * n
    try:
        while True:
            ended = [process.poll() for process in running]
            if failed := [job for job, status in zip(jobs, ended, strict=True) if status]:
                return 0.0, f"failed: {last_words(log_file(failed[0].folder))}"
            rows = [[row for row in last_metrics(job.folder) if "tokens_per_second" in row] for job in jobs]
            if not since and all(len(each) >= SKIPPED for each in rows):
                since, seen = time.monotonic(), [len(each) for each in rows]
            found = [each[first:] for each, first in zip(rows, seen, strict=True)]
            enough = since and time.monotonic() - since > SECONDS and all(len(each) >= STEPS for each in found)
            if enough or None not in ended:  # short runs end before
                return sum(
                    fmean(row["tokens_per_second"] for row in each) for each in found if each
                ), "too short to tell"
            if time.monotonic() - began > PATIENCE:
                return 0.0, f"too slow to be tried: not {STEPS + SKIPPED} steps in {PATIENCE:.0f} s"
            time.sleep(POLL_SECONDS)
    finally:
        for process in running:
            process.kill()
        while any(process.poll() is None for process in running):
            time.sleep(POLL_SECONDS)


def _trial(config: Config) -> Config:
    """The job, seen at each step and by nobody else: no logger, no text, no validation on the way."""
    trainer = {**config["trainer"], "log_every_n_steps": 1}
    changed = {**config, "trainer": trainer, "logger": values_of("logger", "csv"), "sample": False}
    if "every" in (config.get("validation") or {}):
        changed["validation"] = {**config["validation"], "every": sys.maxsize}
    return changed
