"""An IsoFLOP grid: every size of the model at every compute budget, a larger run to be predicted, then the law."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from thunderhead.core.config import Config, ConfigError, Problem, check
from thunderhead.core.terminal import say
from thunderhead.core.types import Count, PositiveFloat, PositiveInt
from thunderhead.lab.execution import Executor
from thunderhead.lab.grid import Candidate, run_grid
from thunderhead.lab.jobs import PlanRun
from thunderhead.lab.runs import Failure, Run
from thunderhead.lab.scaling_report import write_law_report
from thunderhead.lab.sweep import SINGLE_RUN

FLOPS = "budget.flops"
Compose = Callable[[Sequence[str]], Config]
"""Gives the resolved configuration of some overrides."""


class HeldOut(NamedTuple):
    """The run that the law is to predict."""

    size: str
    flops: PositiveFloat


def settings(
    *,
    sizes: dict[str, dict[str, Any]],
    budgets: list[PositiveFloat],
    held_out: HeldOut | None,
    min_steps: PositiveInt,
    count: Count,
) -> None:
    """The sweeper's settings, for the check."""


def run_isoflop(
    sizes: Mapping[str, Mapping[str, Any]],
    budgets: Sequence[float],
    held_out: HeldOut | None,
    *,
    min_steps: int,
    count: Count,
    overrides: Sequence[str],
    seeds: Sequence[str],
    compose: Compose,
    plan: PlanRun,
    folder: Path,
    executor: Executor,
    arguments: list[str],
) -> int:
    """Run the grid, fit the law and report.

    Args:
        sizes: overrides by the name of the size: {"d64": {"model.d_model": 64}}.
        budgets: training FLOPs.
        held_out: of a larger budget; None = nothing is predicted.
        min_steps: combinations with fewer optimizer steps are left out, and named.
        count: which parameters N counts.
        overrides: of all runs.
        seeds: to train each combination with; none = the configuration's.
        compose: the resolved configuration of some overrides.
        plan: plans a run.
        folder: the sweep's.
        executor: where jobs run.
        arguments: of the command line, to go on with later.

    Returns:
        The exit status: 0, 1 if jobs failed, 130 after Ctrl-C.

    Raises:
        ConfigError: nothing was started.
    """
    _refuse(sizes, budgets, held_out, overrides)
    points = [(size, flops) for flops in sorted(budgets) for size in sizes]
    if held_out is not None:
        points.append((held_out.size, held_out.flops))

    def composed(size: str, flops: float, *more: str) -> Config:
        lines = [f"{path}={value}" for path, value in sizes[size].items()]
        return compose([*overrides, *lines, f"{FLOPS}={flops:g}", *more])

    steps = _steps_by_flops({size: composed(size, max(flops for _, flops in points)) for size in sizes}, plan)
    candidates, left_out = [], []
    for size, flops in points:
        n = steps[size](flops)
        if n < min_steps:
            left_out.append(f"{size} at {flops:.2g} FLOPs ({n} steps)")
            continue
        for seed in seeds or [""]:
            choices = {"size": size, FLOPS: f"{flops:g}"} | ({"seed": seed} if len(seeds) > 1 else {})
            candidates.append(Candidate(choices, composed(size, flops, *([f"seed={seed}"] if seed else []))))
    told: list[str] = []
    if left_out:
        told.append(f"Left out, with fewer than min_steps={min_steps} optimizer steps: {', '.join(left_out)}.")
        say(told[0])

    def report(
        folder: Path,
        runs: Sequence[Run],
        *,
        baseline: str | None,
        failures: Sequence[Failure],
        notes: Sequence[str],
        names: Mapping[Path, str],
    ) -> Path:
        """Report the law: there is no baseline, and its points have no arms."""
        notes = [*told, *notes]
        return write_law_report(folder, runs, count=count, fit_up_to=max(budgets), failures=failures, notes=notes)

    return run_grid(candidates, folder, executor, plan, baseline=None, arguments=arguments, report=report)


def read_settings(given: dict[str, Any]) -> HeldOut | None:
    """Check the sweeper's settings, and give the held-out run.

    Raises:
        ConfigError: a value does not fit.
    """
    if problems := check({"hydra.sweeper": {"_target_": f"{__name__}.settings", **given}}):
        raise ConfigError(problems)
    return HeldOut(**given["held_out"]) if given["held_out"] is not None else None


def _refuse(
    sizes: Mapping[str, Mapping[str, Any]], budgets: Sequence[float], held_out: HeldOut | None, overrides: Sequence[str]
) -> None:
    problems = []
    if len(sizes) < 3:
        problems.append(Problem("hydra.sweeper.sizes", f"a law needs at least 3 sizes, not {len(sizes)}"))
    if len(set(budgets)) < 2:
        problems.append(Problem("hydra.sweeper.budgets", f"a law needs at least 2 budgets, not {len(set(budgets))}"))
    if held_out is not None:
        if held_out.size not in sizes:
            message = f"{held_out.size!r} is no size: {', '.join(sizes)}"
            problems.append(Problem("hydra.sweeper.held_out.size", message))
        if budgets and held_out.flops <= max(budgets):
            message = f"{held_out.flops:g} must be above the largest budget, {max(budgets):g}"
            problems.append(Problem("hydra.sweeper.held_out.flops", message))
    set_here = {FLOPS, *(path for size in sizes.values() for path in size)}
    for line in overrides:
        path = line.partition("=")[0].lstrip("+~")
        if path in set_here:
            where = "budgets" if path == FLOPS else "sizes"
            problems.append(Problem(path, f"is set by hydra.sweeper.{where}: change it there"))
        if path == "match" and line != "match=none":
            problems.append(Problem(path, "would undo the grid of sizes and budgets: leave it out"))
        if path == "budget" and line != "budget=flops":
            problems.append(Problem(path, "an IsoFLOP grid needs budget=flops"))
    if problems:
        raise ConfigError(problems)


def _steps_by_flops(configs: Mapping[str, Config], plan: PlanRun) -> dict[str, Callable[[float], int]]:
    """How many steps each size can make with a compute budget."""
    found: dict[str, Callable[[float], int]] = {}
    problems: list[Problem] = []
    for size, config in configs.items():
        try:
            planned = plan(config | SINGLE_RUN)
        except ConfigError as error:
            problems += [problem for problem in error.problems if problem not in problems]
        else:
            of_a_step = planned.flops_per_token * planned.tokens_per_step
            found[size] = lambda flops, of_a_step=of_a_step: int(flops / of_a_step)  # type: ignore[misc]
    if problems:
        raise ConfigError(problems)
    return found
