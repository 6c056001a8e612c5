"""An IsoFLOP grid: every size of the model at every compute budget, a larger run to be predicted, then the law."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from thunderhead.core.config import ConfigError, Problem, check
from thunderhead.core.terminal import say
from thunderhead.core.types import Count, PositiveFloat, PositiveInt
from thunderhead.lab.execution import Executor
from thunderhead.lab.runs import Failure, Run
from thunderhead.lab.scaling_report import write_law_report
from thunderhead.lab.sweep import Candidate, run_grid
from thunderhead.training.run import find_problems

FLOPS = "budget.flops"
Compose = Callable[[Sequence[str]], dict[str, Any]]


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

    def composed(size: str, flops: float, *more: str) -> dict[str, Any]:
        lines = [f"{path}={value}" for path, value in sizes[size].items()]
        return compose([*overrides, *lines, f"{FLOPS}={flops:g}", *more])

    steps = _steps_by_flops({size: composed(size, max(flops for _, flops in points)) for size in sizes})
    candidates, left_out = [], []
    for size, flops in points:
        n = steps[size](flops)
        if n < min_steps:
            left_out.append(f"{size} at {flops:.2g} FLOPs ({n} steps)")
            continue
        for seed in seeds or [""]:
            choices = {"size": size, FLOPS: f"{flops:g}"} | ({"seed": seed} if len(seeds) > 1 else {})
            candidates.append(Candidate(choices, composed(size, flops, *([f"seed={seed}"] if seed else []))))
    notes = []
    if left_out:
        notes.append(f"Left out, with fewer than min_steps={min_steps} optimizer steps: {', '.join(left_out)}.")
        say(notes[0])
    report = partial(_report, count=count, fit_up_to=max(budgets), more_notes=notes)
    return run_grid(candidates, folder, executor, baseline=None, arguments=arguments, report=report)


def _report(
    folder: Path,
    runs: Sequence[Run],
    *,
    baseline: str | None,
    failures: Sequence[Failure],
    notes: Sequence[str],
    names: Mapping[Path, str],
    count: Count,
    fit_up_to: float,
    more_notes: Sequence[str],
) -> Path:
    """As `Report` of `thunderhead.lab.sweep`; there is no baseline, and a law's points have no arms."""
    return write_law_report(
        folder, runs, count=count, fit_up_to=fit_up_to, failures=failures, notes=[*more_notes, *notes]
    )


def read_settings(given: dict[str, Any]) -> HeldOut | None:
    """Check the sweeper's settings, and give the held-out run.

    Raises:
        ConfigError: a value does not fit.
    """
    if problems := check({"hydra.sweeper": {"_target_": f"{__name__}.settings", **given}}):
        raise ConfigError(problems)
    return HeldOut(**given["held_out"]) if given["held_out"] is not None else None


def _refuse(
    sizes: Mapping[str, Mapping[str, Any]],
    budgets: Sequence[float],
    held_out: HeldOut | None,
    overrides: Sequence[str],
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


def _steps_by_flops(configs: Mapping[str, dict[str, Any]]) -> dict[str, Callable[[float], int]]:
    """How many steps each size can make with a compute budget."""
    found: dict[str, Callable[[float], int]] = {}
    problems: list[Problem] = []
    for size, config in configs.items():
        single = config | {"match": {"_target_": "thunderhead.lab.match.Unmatched"}}
        single["tune"] = {"_target_": "thunderhead.lab.tune.Untuned"}
        wrong = find_problems(single)
        try:
            if not wrong:
                plan = plan_run(single).plan
                each = plan.flops_per_token * plan.tokens_per_step
                found[size] = lambda flops, each=each: int(flops / each)  # type: ignore[misc]
        except ConfigError as error:
            wrong = error.problems
        problems += [p for p in wrong if p not in problems]
    if problems:
        raise ConfigError(problems)
    return found
