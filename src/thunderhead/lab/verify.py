"""`python compare.py verify=<folder>`: train one run of a report again, and see whether it gets the recorded losses."""

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from thunderhead.command_line import remove_if_empty
from thunderhead.core.config import Config, ConfigError, Problem
from thunderhead.core.environment import of_record
from thunderhead.core.trust import refuse_unknown_variables, refuse_untrusted
from thunderhead.lab.arms import Arm, warnings
from thunderhead.lab.jobs import Job, prepare_start
from thunderhead.lab.runs import Run, read_runs
from thunderhead.terminal import say
from thunderhead.training import record

COUNTED = ("train/loss", "val/loss")


def verify(reported: Path, folder: Path) -> int:
    """Draw a run of a sweep's or a report's folder, train it again in `folder`, and say how its losses differ.

    Gives the exit status: 0 if all are equal to the last bit. ConfigError if there is no finished run, or its record
    names what is not trusted here.
    """
    finished = [run for run in _reported(reported) if run.unfinished is None]
    if not finished:
        raise ConfigError([Problem("verify", f"{reported} holds no finished run: give a sweep's or a report's folder")])
    drawn = random.SystemRandom().choice(finished)
    job = Job({}, _configuration(drawn), folder)
    say(f"Verifying 1 of {len(finished)} runs, drawn at random: training {drawn.folder} again, in {folder}")
    train = sys.executable, str(Path(sys.argv[0]).with_name("train.py"))
    status = subprocess.run(prepare_start(job, train), check=False).returncode
    if status:
        remove_if_empty(folder)
        return status
    (again,) = read_runs([folder])
    return tell_differences(drawn, again)


def tell_differences(drawn: Run, again: Run) -> int:
    """Print whether a run has the losses of the one before it; 0 if all are equal to the last bit."""
    losses = list(_losses(drawn, again))
    n, different = len(losses), [loss for loss in losses if loss[2] != loss[3]]
    if not different:
        say(f"Verified: all {n:,} losses of {drawn.folder} came out again, equal to the last bit")
        return 0
    step, name, before, now = different[0]
    largest = max(abs(before - now) for _, _, before, now in different)
    say(f"Not the same: {len(different):,} of {n:,} losses of {drawn.folder} differ, by {largest:.3g} at most")
    say(f"  first at step {step:,}: {name} was {before!r}, and is {now!r} now")
    for reason in warnings([Arm("recorded", {drawn.seed: drawn}, [], []), Arm("again", {again.seed: again}, [], [])]):
        say(f"  {reason}")
    return 1


def _reported(folder: Path) -> list[Run]:
    """The runs of a report: those below its folder, or those that its results.csv names."""
    if (results := folder / "results.csv").is_file() and not any(folder.rglob("plan.json")):
        return read_runs(row["folder"] for row in record.read_rows(results)[1] if row.get("folder"))
    return read_runs([folder])


def _configuration(run: Run) -> Config:
    """As recorded, on the shards that it was trained on."""
    refuse_untrusted(run.config)
    try:
        config = of_record({**run.config, "trust": [], "resume": None})
    except ValueError as error:  # of one that was edited
        raise ConfigError([Problem("verify", f"{run.folder}: {error}")]) from error
    refuse_unknown_variables(config)
    return record.with_its_shards(config, run.folder, "verify")


def _losses(before: Run, now: Run) -> Iterator[tuple[int, str, float, float]]:
    """Step, name and both values of each loss that was recorded; NaN where the second has none."""
    found = {int(row["step"]): row for row in now.rows}
    for row in before.rows:
        for name in COUNTED:
            if name in row:
                yield int(row["step"]), name, row[name], found.get(int(row["step"]), {}).get(name, float("nan"))
