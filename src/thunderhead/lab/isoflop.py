"""An IsoFLOP grid: every size of the model at every compute budget, a larger run to be predicted, then the law."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from thunderhead.core.components import check
from thunderhead.core.config import Config, ConfigError, Problem
from thunderhead.core.types import Count, PositiveFloat, PositiveInt
from thunderhead.lab.grid import Candidate, plan_all, run_grid
from thunderhead.lab.runs import Failure, Run
from thunderhead.lab.scaling_report import tell_predictions, write_law_report
from thunderhead.lab.sweep import SINGLE_RUN, Sweep
from thunderhead.terminal import say

FLOPS = "budget.flops"


class HeldOut(NamedTuple):
    """The run that the law is to predict: its size, and its training FLOPs."""

    size: str
    flops: PositiveFloat


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The sweeper's: see conf/experiment/scaling_law.yaml.

    `sizes` has by name what makes a model of that size, `budgets` training FLOPs; `held_out` is a larger run, which the
    law predicts; combinations with fewer than `min_steps` optimizer steps are left out, and named.
    """

    sizes: dict[str, dict[str, Any]]
    budgets: list[PositiveFloat]
    held_out: HeldOut | None
    min_steps: PositiveInt
    count: Count


def read_settings(given: dict[str, Any]) -> Settings:
    """Check the sweeper's settings; ConfigError if a value does not fit."""
    if problems := check({"hydra.sweeper": {"_target_": f"{__name__}.Settings", **given}}):
        raise ConfigError(problems)
    held_out = HeldOut(**given["held_out"]) if given["held_out"] is not None else None
    return Settings(**given | {"held_out": held_out})


def run_isoflop(
    given: Settings,
    sweep: Sweep,
    *,
    overrides: Sequence[str],
    seeds: Sequence[str],
    compose: Callable[[Sequence[str]], Config],
) -> int:
    """Run the grid, fit the law and report; gives the exit status, as `run_grid` does, and its ConfigError.

    `overrides` are those of all runs; each combination is trained with all `seeds`, none = the configuration's;
    `compose` gives the resolved configuration of overrides.
    """
    _refuse(given, overrides)
    sizes, budgets, least = given.sizes, given.budgets, given.min_steps
    points = [(size, flops) for flops in sorted(budgets) for size in sizes]
    points += [given.held_out] if given.held_out is not None else []

    def composed(size: str, flops: float, *more: str) -> Config:
        lines = [f"{path}={value}" for path, value in sizes[size].items()]
        return compose([*overrides, *lines, f"{FLOPS}={flops:g}", *more])

    most = max(flops for _, flops in points)
    plans = plan_all([(size, composed(size, most) | SINGLE_RUN) for size in sizes], sweep.plan)
    of_a_step = {size: p.flops_per_token * p.tokens_per_step for size, p in zip(sizes, plans, strict=True)}
    candidates, left_out = [], []
    for size, flops in points:
        if (n := int(flops / of_a_step[size])) < least:
            left_out.append(f"{size} at {flops:.2g} FLOPs ({n} steps)")
            continue
        for seed in seeds or [""]:
            choices = {"size": size, FLOPS: f"{flops:g}"} | ({"seed": seed} if len(seeds) > 1 else {})
            candidates.append(Candidate(choices, composed(size, flops, *([f"seed={seed}"] if seed else []))))
    told = [f"Left out, with fewer than min_steps={least} optimizer steps: {', '.join(left_out)}."] if left_out else []
    for line in told:
        say(line)

    def report(
        folder: Path, runs: Sequence[Run], *, failures: Sequence[Failure], notes: Sequence[str], **_: Any
    ) -> Path:
        """Report the law: it has no baseline, and its points have no arms."""
        found: dict[str, Any] = {"failures": failures, "notes": [*told, *notes]}
        return write_law_report(folder, runs, count=given.count, fit_up_to=max(budgets), **found)

    sweep.report = report
    sweep.is_last = lambda job: given.held_out is not None and job.config["budget"]["flops"] > max(budgets)
    sweep.announce = lambda runs, jobs: tell_predictions(
        runs, {job.name: sweep.plan(job.config) for job in jobs}, count=given.count
    )
    return run_grid(candidates, sweep)


def _refuse(given: Settings, overrides: Sequence[str]) -> None:
    sizes, budgets, held_out = given.sizes, given.budgets, given.held_out
    problems: list[Problem] = []
    for name, n, least in (("sizes", len(sizes), 3), ("budgets", len(set(budgets)), 2)):
        if n < least:
            problems.append(Problem(f"hydra.sweeper.{name}", f"a law needs at least {least} {name}, not {n}"))
    if held_out is not None and held_out.size not in sizes:
        message = f"{held_out.size!r} is no size: {', '.join(sizes)}"
        problems.append(Problem("hydra.sweeper.held_out.size", message))
    if held_out is not None and budgets and held_out.flops <= max(budgets):
        message = f"{held_out.flops:g} must be above the largest budget, {max(budgets):g}"
        problems.append(Problem("hydra.sweeper.held_out.flops", message))
    set_here = {path: "sizes" for size in sizes.values() for path in size} | {FLOPS: "budgets"}
    for line in overrides:
        path = line.partition("=")[0].lstrip("+~")
        if path in set_here:
            problems.append(Problem(path, f"is set by hydra.sweeper.{set_here[path]}: change it there"))
        if path == "match" and line != "match=none":
            problems.append(Problem(path, "would undo the grid of sizes and budgets: leave it out"))
        if path == "budget" and line != "budget=flops":
            problems.append(Problem(path, "an IsoFLOP grid needs budget=flops"))
    if problems:
        raise ConfigError(problems)
