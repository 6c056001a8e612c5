"""The runs of a ladder: each arm at every size with all seeds, the held-out size last, then the report."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thunderhead.core.components import check
from thunderhead.core.config import Config, ConfigError, Problem
from thunderhead.core.types import PositiveFloat
from thunderhead.lab.grid import Candidate, run_grid
from thunderhead.lab.jobs import name_of, without_seed
from thunderhead.lab.ladder_report import Place, rate_rule, tell_predictions, write_ladder_report
from thunderhead.lab.runs import Run
from thunderhead.lab.sweep import Sweep
from thunderhead.terminal import say


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The sweeper's: see conf/experiment/ladder.yaml.

    `sizes` has by name what makes a model of that size; `held_out` is one of them, predicted before it is trained;
    `project` is the parameters of the baseline at a size that nobody trains.
    """

    sizes: dict[str, dict[str, Any]]
    held_out: str | None
    project: PositiveFloat | None


def read_settings(given: dict[str, Any], lines: Sequence[str]) -> Settings:
    """Check the sweeper's settings; ConfigError if a value does not fit, or to the lines of the command."""
    if problems := check({"hydra.sweeper": {"_target_": f"{__name__}.Settings", **given}}):
        raise ConfigError(problems)
    found = Settings(**given)
    if found.held_out is not None and found.held_out not in found.sizes:
        message = f"{found.held_out!r} is no size: {', '.join(found.sizes)}"
        problems.append(Problem("hydra.sweeper.held_out", message))
    if (n := len(found.sizes) - (found.held_out is not None)) < 3:
        message = f"a ladder needs at least 3 sizes beside the held-out one, not {n}"
        problems.append(Problem("hydra.sweeper.sizes", message))
    sized = {path for size in found.sizes.values() for path in size}
    for path in dict.fromkeys(line.partition("=")[0].lstrip("+~") for line in lines):
        if path in sized:
            problems.append(Problem(path, "is set by hydra.sweeper.sizes: change it there"))
    if any(line.startswith("match=") and line != "match=none" for line in lines):
        message = "arms need no match here: multipliers count what each of them computed; leave it out"
        problems.append(Problem("match", message))
    if problems:
        raise ConfigError(problems)
    return found


def run_ladder(
    given: Settings,
    sweep: Sweep,
    *,
    arms: Sequence[tuple[Mapping[str, str], Sequence[str]]],
    compose: Callable[[Sequence[str]], Config],
    baseline: str | None,
) -> int:
    """Run all arms at all sizes and report; gives the exit status, as `run_grid` does, and its ConfigError.

    `arms` are what is varied, seeds too, with its overrides; the first is the baseline, if none is named.
    """
    names = list(dict.fromkeys(name_of(without_seed(choices)) for choices, _ in arms))
    seeds = {name: {dict(c).get("seed") for c, _ in arms if name_of(without_seed(c)) == name} for name in names}
    problems = []
    if len(names) < 2:
        problems.append(Problem("experiment", "a ladder compares two arms or more: add a choice, as attention=mha,gqa"))
    if min(map(len, seeds.values())) < 2:
        problems.append(Problem("seed", "a ladder needs two seeds at least: give them, as seed=1,2,3"))
    if baseline is not None and baseline not in names:
        problems.append(Problem("hydra.sweeper.baseline", f"no arm is called {baseline}: {', '.join(names)}"))
    if problems:
        raise ConfigError(problems)
    first = baseline or names[0]
    candidates = [
        Candidate({"size": size, **choices}, compose([*lines, *(f"{path}={v}" for path, v in changes.items())]))
        for size, changes in given.sizes.items()
        for choices, lines in arms
    ]
    say(f"Learning rates by size: {rate_rule([candidate.config for candidate in candidates])}")

    def places() -> dict[Path, Place]:
        found = {}
        for job in sweep.jobs:
            choices = {name: value for name, value in without_seed(job.choices).items() if name != "size"}
            found[job.folder] = Place(job.choices["size"], name_of(choices), job.choices["size"] == given.held_out)
        return found

    def report(folder: Path, runs: Sequence[Run], **found: Any) -> Path:
        kept = {name: found[name] for name in ("failures", "notes")}
        return write_ladder_report(folder, runs, places(), baseline=first, project=given.project, **kept)

    sweep.report = report
    sweep.is_last = lambda job: job.choices["size"] == given.held_out
    sweep.announce = lambda runs, jobs: tell_predictions(
        runs, places(), {job.folder: sweep.plan(job.config) for job in jobs}, baseline=first
    )
    return run_grid(candidates, sweep)
