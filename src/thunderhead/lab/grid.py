"""The way of a grid of runs: check and plan all → match → tune → run → report."""

import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from thunderhead.core import config as configuration
from thunderhead.core.config import Config, ConfigError, Problem, build
from thunderhead.core.terminal import say
from thunderhead.lab import match as matching
from thunderhead.lab import tune as tuning
from thunderhead.lab.execution import Executor, Interrupted
from thunderhead.lab.jobs import Job, Plan, PlanRun, arm_key, make_job, name_of, without_seed
from thunderhead.lab.match import Matching
from thunderhead.lab.report import write_report
from thunderhead.lab.runs import Match, read_metrics, read_summary
from thunderhead.lab.sweep import SINGLE_RUN, Report, Sweep
from thunderhead.lab.tune import Bracket
from thunderhead.training import record


class Candidate(NamedTuple):
    """One combination of the grid: what is varied in it, and its configuration as composed."""

    choices: Mapping[str, str]
    config: Config


@dataclass
class Arm:
    """Candidates that differ in nothing but the seed."""

    name: str
    members: list[Candidate]
    plan: Plan
    matched: Match | None = None

    @property
    def varied(self) -> dict[str, str]:
        return without_seed(self.members[0].choices)

    def change(self, configs: Sequence[Config]) -> None:
        """Give each member another configuration."""
        self.members = [member._replace(config=config) for member, config in zip(self.members, configs, strict=True)]


def run_grid(
    candidates: Sequence[Candidate],
    folder: Path,
    *,
    executor: Executor,
    plan: PlanRun,
    arguments: list[str],
    baseline: str | None = None,
    report: Report = write_report,
) -> int:
    """Run all combinations, in order, and report.

    Args:
        candidates: the combinations.
        folder: the sweep's; what is finished there is not trained again.
        executor: where jobs run.
        plan: plans a run.
        arguments: of the command line, to go on with later.
        baseline: name of the arm to match and compare with; None = the first is matched to, and the report chooses.
        report: what is written in the end.

    Returns:
        The exit status: 0, 1 if jobs failed, 130 after Ctrl-C.

    Raises:
        ConfigError: some combination is refused; nothing was started.
    """
    match, bracket = sweep_options(candidates)
    arms = make_arms(candidates, plan)
    names = [arm.name for arm in arms]
    if baseline is not None and baseline not in names:
        raise ConfigError([Problem("hydra.sweeper.baseline", f"no arm is called {baseline}: {', '.join(names)}")])
    reference = arms[names.index(baseline)] if baseline is not None else arms[0]
    refuse_varied(match, bracket, candidates)
    if any(c.config["dry_run"] for c in candidates):
        _match(arms, reference, match, None)
        for arm in arms:
            p = plan(arm.members[0].config)
            size = f"{p.parameters['total']:,} parameters, {p.steps:,} steps, {p.tokens:,} tokens, {p.flops:.3g} FLOPs"
            say(f"{arm.name}: {len(arm.members)} run(s), {size}")
        return 0
    sweep = Sweep(folder, executor, arguments, report)
    sweep.begin()
    interrupted = False
    try:
        _match(arms, reference, match, sweep)
        if bracket.multipliers:
            _tune(arms, bracket, sweep)
        sweep.jobs = _jobs(arms, sweep)
        sweep.run(sweep.jobs, "Sweep")
    except (Interrupted, KeyboardInterrupt):
        interrupted = True
    _record_measured_time(sweep, reference.name)
    status = sweep.end(interrupted=interrupted, baseline=baseline)
    if status:
        say(f"go on with: {Path(sys.argv[0]).name} -m resume={folder}")
    return status


# --------------------------------------------------------------------------------------------------------------------
# Before anything starts


def sweep_options(candidates: Sequence[Candidate]) -> tuple[Any, Any]:
    """The one choice of `match` and `tune`; the candidates' own are set to none.

    Raises:
        ConfigError: there are several choices, or one is refused.
    """
    options = []
    for group in ("match", "tune"):
        nodes = [candidate.config[group] for candidate in candidates]
        if any(node != nodes[0] for node in nodes):
            raise ConfigError([Problem(group, "is a choice for the whole sweep and cannot be swept over")])
        if problems := configuration.check({group: nodes[0]}):
            raise ConfigError(problems)
        options.append(build(nodes[0]))
    if any(candidate.config.get("resume") for candidate in candidates):
        message = "is no sweep folder (it has no sweep.json): give logs/sweeps/<name>/<time>"
        raise ConfigError([Problem("resume", message)])
    for candidate in candidates:
        candidate.config.update(SINGLE_RUN)
    return options[0], options[1]


def make_arms(candidates: Sequence[Candidate], plan: PlanRun) -> list[Arm]:
    """Check and plan every candidate, and group them by their configurations.

    Values may follow from the seed (optimizer.lr=${…}): candidates that share a name are several arms then, and the
    seeds are added to it.

    Raises:
        ConfigError: all problems of all candidates, each once.
    """
    arms: dict[str, Arm] = {}
    found: dict[Problem, list[str]] = {}
    for candidate in candidates:
        key = arm_key(candidate.config)
        try:
            planned = plan(candidate.config)
            arm = arms.setdefault(key, Arm(name_of(without_seed(candidate.choices)), [], planned))
            if candidate.config["seed"] not in [member.config["seed"] for member in arm.members]:
                arm.members.append(candidate)
        except ConfigError as error:
            for problem in error.problems:
                found.setdefault(problem, []).append(" ".join(candidate.choices.values()))
    if found:
        where = {p: f" (in {', '.join(names)})" * (len(names) < len(candidates)) for p, names in found.items()}
        raise ConfigError([Problem(p.path, p.message + where[p]) for p in found])
    uses = Counter(arm.name for arm in arms.values())
    for arm in arms.values():
        if uses[arm.name] > 1:
            arm.name += f" seed={','.join(str(member.config['seed']) for member in arm.members)}"
    return list(arms.values())


def refuse_varied(match: Any, bracket: Any, candidates: Sequence[Candidate]) -> None:
    """Raise ConfigError where matching or tuning sets what the sweep varies."""
    problems = []
    for path in match.solves:
        for varied in candidates[0].choices:
            if varied == path or varied.startswith(f"{path}."):
                problems.append(Problem(varied, f"match={match.by} solves for {path}: leave one of them out"))
    for path in bracket.multipliers:
        if path in candidates[0].choices:
            problems.append(Problem(path, f"tune tries multiples of {path} in each arm: leave one of them out"))
    if problems:
        raise ConfigError(problems)


# --------------------------------------------------------------------------------------------------------------------
# Match and tune


def _match(arms: Sequence[Arm], reference: Arm, match: Matching, sweep: Sweep | None) -> None:
    if not match.solves:
        return
    if sweep is None and match.measures:
        say(f"match={match.by}: the number of steps is known once the speed of each arm is measured")
        return

    def measure_of(arm: Arm) -> matching.Measure:
        return lambda config: _measured_speed(arm, config, sweep)

    target = match.target(reference.members[0].config, reference.plan, measure_of(reference))
    problems = []
    for arm in arms:
        try:
            solved = [match.apply(member.config, arm.plan, target, measure_of(arm)) for member in arm.members]
        except ValueError as error:
            problems.append(Problem(arm.name, str(error)))
            continue
        arm.change([config for config, _ in solved])
        arm.matched = solved[0][1]
        say(f"match={match.by}: {arm.name}: {matching.describe(arm.matched, match.unit)}")
    if problems:
        raise ConfigError(problems)


def _measured_speed(arm: Arm, config: Config, sweep: Sweep | None) -> float:
    """Train a few steps, once in the life of a sweep; an arm's members have one speed."""
    assert sweep is not None
    short = matching.measuring_run({**config, "seed": 1}, config["budget"]["steps"])
    job = make_job(arm.varied, short, sweep.folder, "speed")
    if job.folder not in sweep.outcomes:
        sweep.run([job], "Measuring speed")
    outcome = sweep.outcomes[job.folder]
    if outcome.state != "finished":
        raise ConfigError([Problem("match", f"the speed of {arm.name} could not be measured: {outcome.message}")])
    return matching.speed(read_metrics(job.folder))


def _tune(arms: Sequence[Arm], bracket: Bracket, sweep: Sweep) -> None:
    """Run every arm's trials, and give its members the best of the values tried."""
    tried: list[tuple[Arm, list[tuning.Trial], list[Job]]] = []
    for arm in arms:
        first = arm.members[0]
        seed = first.config["seed"] if bracket.seed is None else bracket.seed
        try:
            trials = tuning.trials({**first.config, "seed": seed}, bracket.multipliers)
        except ValueError as error:
            raise ConfigError([Problem("tune", f"{error} (in {arm.name})")]) from error
        values = [arm.varied | {path: f"{value:.3g}" for path, value in trial.value.items()} for trial in trials]
        jobs = [make_job(v, trial.config, sweep.folder, "tuning") for v, trial in zip(values, trials, strict=True)]
        tried.append((arm, trials, jobs))
    seeds = sorted({str(trial.config["seed"]) for _, trials, _ in tried for trial in trials})
    say(f"Tuning on seed {', '.join(seeds)}; the comparison uses all seeds")
    sweep.run([job for _, _, jobs in tried for job in jobs], "Tuning")
    tables = {arm.name: _take_best(arm, trials, jobs, sweep) for arm, trials, jobs in tried}
    record.write_json(sweep.folder / "tuning.json", tables)
    for note in sweep.notes:
        say(note)


def _take_best(arm: Arm, trials: Sequence[tuning.Trial], jobs: Sequence[Job], sweep: Sweep) -> dict[str, Any]:
    """Give an arm the values of its best trial, note it, and return what tuning.json holds about the arm."""
    losses = [(read_summary(job.folder) or {}).get("val_loss") for job in jobs]
    tried = [{"multiplier": t.multiplier, "value": t.value} for t in trials]
    table: dict[str, Any] = {"trials": [t | {"val_loss": loss} for t, loss in zip(tried, losses, strict=True)]}
    index = tuning.best(losses)
    if index is None:
        sweep.notes.append(f"{arm.name}: no trial of its tuning has a finite loss; its default values are kept.")
        return table | {"best": None}
    chosen = trials[index]
    table["best"] = chosen.value
    values = ", ".join(f"{p}={v:.3g} (×{chosen.multiplier[p]:g})" for p, v in chosen.value.items())
    sweep.notes.append(f"{arm.name}: tuned to {values} on seed {chosen.config['seed']}.")
    if edges := tuning.at_edge(chosen, trials):
        table["at_edge"] = edges
        sweep.notes.append(
            f"{arm.name}: the best {' and '.join(edges)} lies on the edge of the bracket: a better one may lie "
            "outside. Widen tune.multipliers before you trust this arm's rank."
        )
    arm.change([tuning.with_values(member.config, chosen) for member in arm.members])
    return table


def _jobs(arms: Sequence[Arm], sweep: Sweep) -> list[Job]:
    """The jobs of the comparison, with what was matched written into their folders."""
    jobs = []
    for arm in arms:
        for member in arm.members:
            job = make_job(member.choices, member.config, sweep.folder)
            jobs.append(job)
            sweep.names[job.folder] = arm.name
            if arm.matched is not None and not (job.folder / "match.json").is_file():
                record.write_json(job.folder / "match.json", arm.matched._asdict())
    return jobs


def _record_measured_time(sweep: Sweep, reference: str) -> None:
    """Put seconds that were measured in place of those forecast: of a job, and of the mean run of the reference."""
    summaries = {job.folder: read_summary(job.folder) or {} for job in sweep.jobs}
    seconds = {folder: summary["seconds"] for folder, summary in summaries.items() if summary.get("seconds")}
    of_reference = [value for folder, value in seconds.items() if sweep.names[folder] == reference]
    for folder, reached in seconds.items():
        path = folder / "match.json"
        content = record.read_json(path) if path.is_file() else {"by": None}
        if content["by"] == "time":
            target = {"target": statistics.fmean(of_reference)} if of_reference else {}
            record.write_json(path, content | target | {"reached": reached})
