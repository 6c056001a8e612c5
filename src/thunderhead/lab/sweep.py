"""The way of one sweep: check and plan all → match → tune → run → report."""

import statistics
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from thunderhead.core import config as configuration
from thunderhead.core.config import ConfigError, Problem, build
from thunderhead.core.terminal import say
from thunderhead.lab import match as matching
from thunderhead.lab import tune as tuning
from thunderhead.lab.execution import Executor, Interrupted, Monitor, Outcome, log_file, run_jobs
from thunderhead.lab.jobs import Job, arm_key, arm_name, make_job, steps
from thunderhead.lab.match import Match, Matched
from thunderhead.lab.progress import Board
from thunderhead.lab.report import write_report
from thunderhead.lab.runs import Failure, Run, read_runs
from thunderhead.training import record
from thunderhead.training.plan import Plan
from thunderhead.training.run import find_problems

SINGLE_RUN = {
    "match": {"_target_": "thunderhead.lab.match.Unmatched"},
    "tune": {"_target_": "thunderhead.lab.tune.Untuned"},
    "resume": None,
}
"""What a job's configuration holds for the groups that act on a sweep: it is an ordinary run."""


class Candidate(NamedTuple):
    """One combination of the grid: what is varied in it, and its configuration as composed."""

    choices: Mapping[str, str]
    config: dict[str, Any]


@dataclass
class Arm:
    """Candidates that differ in nothing but the seed."""

    name: str
    members: list[Candidate]
    plan: Plan
    matched: Matched | None = None

    def change(self, configs: Sequence[dict[str, Any]]) -> None:
        """Give each member another configuration."""
        self.members = [member._replace(config=config) for member, config in zip(self.members, configs, strict=True)]


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
    ) -> Path:
        """Write it; gives the path of report.html."""
        ...


@dataclass
class Sweep:
    """A sweep's folder, where its jobs run, and what is to be said about it in the end."""

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

    def run(self, jobs: Sequence[Job], title: str, monitor: Monitor | None = None) -> dict[Path, Outcome]:
        """Run jobs, and note their failures."""
        try:
            with Board(jobs, title) as board:
                found = run_jobs(jobs, self.executor, board, monitor)
        except Interrupted as interrupted:
            self.note(jobs, interrupted.outcomes)
            raise
        self.note(jobs, found)
        return found

    def note(self, jobs: Sequence[Job], outcomes: dict[Path, Outcome]) -> None:
        """Keep how jobs ended."""
        self.outcomes |= outcomes
        for job in jobs:
            outcome = outcomes.get(job.folder)
            if outcome is not None and outcome.state == "failed":
                self.failures.append(Failure(job.name, f"{outcome.message} (see {log_file(job.folder)})"))
            elif outcome is not None and outcome.state == "pruned":
                at, of = steps(job.folder) or (0, 0)
                self.pruned.append(Failure(job.name, f"pruned at step {at:,} of {of:,}: {outcome.message}"))

    def report(self, baseline: str | None) -> None:
        """The report of the jobs that are there."""
        record.write_json(
            self.folder / "sweep.json",
            {
                "arguments": self.arguments,
                "jobs": {
                    str(job.folder.relative_to(self.folder)): {
                        "name": job.name,
                        "arm": self.names[job.folder],
                        **(outcome._asdict() if (outcome := self.outcomes.get(job.folder)) else {"state": "waiting"}),
                    }
                    for job in self.jobs
                },
            },
        )
        told = {folder for folder, outcome in self.outcomes.items() if outcome.state in ("failed", "pruned")}
        recorded = [j.folder for j in self.jobs if j.folder not in told and (j.folder / "plan.json").is_file()]
        try:
            runs = read_runs(recorded)
            known = baseline if baseline in [self.names[folder] for folder in recorded] else None
            if baseline is not None and known is None:
                self.notes.append(f"No run of the baseline {baseline} has begun yet.")
            ended = [*self.failures, *self.pruned]
            self.write_report(self.folder, runs, baseline=known, failures=ended, notes=self.notes, names=self.names)
        except ValueError as error:  # records that cannot be read
            say(f"no report: {error}")


def run_grid(
    candidates: Sequence[Candidate],
    folder: Path,
    executor: Executor,
    *,
    baseline: str | None,
    arguments: list[str],
    report: Report = write_report,
) -> int:
    """Run a grid and report.

    Args:
        candidates: all combinations, in order.
        folder: the sweep's; what is finished there is not trained again.
        executor: where jobs run.
        baseline: name of the arm to match and compare with; None = the first is matched to, and the report chooses.
        arguments: of the command line, to go on with later.
        report: what is written in the end.

    Returns:
        The exit status: 0, 1 if jobs failed, 130 after Ctrl-C.

    Raises:
        ConfigError: some combination is refused; nothing was started.
    """
    match, bracket = _sweep_options(candidates)
    arms = _make_arms(candidates)
    reference = _reference(arms, baseline)
    _refuse_varied(match, bracket, candidates)
    if any(c.config["dry_run"] for c in candidates):
        _match(arms, reference, match, None)
        _show(arms, folder)
        return 0
    sweep = Sweep(folder, executor, arguments, report)
    sweep.begin()
    try:
        _match(arms, reference, match, sweep)
        if isinstance(bracket, tuning.Bracket):
            _tune(arms, bracket, sweep)
        sweep.jobs = _jobs(arms, sweep)
        sweep.run(sweep.jobs, "Sweep")
        interrupted = False
    except (Interrupted, KeyboardInterrupt):
        interrupted = True
    _record_measured_time(sweep, reference.name)
    sweep.report(baseline)
    if interrupted or sweep.failures:
        say(f"go on with: {Path(sys.argv[0]).name} -m resume={folder}")
    return 130 if interrupted else 1 if sweep.failures else 0


# --------------------------------------------------------------------------------------------------------------------
# Before anything starts


def _sweep_options(candidates: Sequence[Candidate]) -> tuple[Any, Any]:
    """The one choice of `match` and `tune`; the candidates' own are set to none."""
    options = []
    for group in ("match", "tune"):
        nodes = [candidate.config[group] for candidate in candidates]
        if any(node != nodes[0] for node in nodes):
            raise ConfigError([Problem(group, "is a choice for the whole sweep and cannot be swept over")])
        if problems := configuration.check({group: nodes[0]}):
            raise ConfigError(problems)
        options.append(build(nodes[0]))
    if any(candidate.config.get("resume") for candidate in candidates):
        raise ConfigError(
            [Problem("resume", "is no sweep folder (it has no sweep.json): give logs/sweeps/<name>/<time>")]
        )
    for candidate in candidates:
        candidate.config.update(SINGLE_RUN)
    return options[0], options[1]


def _make_arms(candidates: Sequence[Candidate]) -> list[Arm]:
    """Check and plan every candidate, all problems at once, and group them by their configurations.

    Values may follow from the seed (optimizer.lr=${…}): candidates that share a name are several arms then, and the
    seeds are added to it.
    """
    arms: dict[str, Arm] = {}
    found: dict[Problem, list[str]] = {}
    for candidate in candidates:
        key = arm_key(candidate.config)
        problems = find_problems(candidate.config)
        if not problems:
            try:
                if key not in arms:
                    arms[key] = Arm(arm_name(candidate.choices), [], plan_run(candidate.config).plan)
                if candidate.config["seed"] not in [member.config["seed"] for member in arms[key].members]:
                    arms[key].members.append(candidate)
            except ConfigError as error:
                problems = error.problems
        for problem in problems:
            found.setdefault(problem, []).append(" ".join(candidate.choices.values()))
    if found:
        everywhere = len(candidates)
        raise ConfigError(
            [
                p if len(n) == everywhere else Problem(p.path, f"{p.message} (in {', '.join(n)})")
                for p, n in found.items()
            ]
        )
    uses = Counter(arm.name for arm in arms.values())
    for arm in arms.values():
        if uses[arm.name] > 1:
            arm.name += f" seed={','.join(str(member.config['seed']) for member in arm.members)}"
    return list(arms.values())


def _reference(arms: Sequence[Arm], baseline: str | None) -> Arm:
    names = [arm.name for arm in arms]
    if baseline is not None and baseline not in names:
        raise ConfigError([Problem("hydra.sweeper.baseline", f"no arm is called {baseline}: {', '.join(names)}")])
    return arms[names.index(baseline)] if baseline is not None else arms[0]


def _refuse_varied(match: Any, bracket: Any, candidates: Sequence[Candidate]) -> None:
    """What matching or tuning sets must not be what the sweep varies."""
    problems = []
    for path in getattr(match, "solves", ()):
        for varied in candidates[0].choices:
            if varied == path or varied.startswith(f"{path}."):
                problems.append(Problem(varied, f"match={match.by} solves for {path}: leave one of them out"))
    for path in getattr(bracket, "multipliers", None) or ():
        if path in candidates[0].choices:
            problems.append(Problem(path, f"tune tries multiples of {path} in each arm: leave one of them out"))
    if problems:
        raise ConfigError(problems)


def _show(arms: Sequence[Arm], folder: Path) -> None:
    for arm in arms:
        plan = plan_run(arm.members[0].config).plan
        say(
            f"{arm.name}: {len(arm.members)} run(s), {plan.parameters['total']:,} parameters, {plan.steps:,} steps, "
            f"{plan.tokens:,} tokens, {plan.flops:.3g} FLOPs"
        )


# --------------------------------------------------------------------------------------------------------------------
# Match and tune


def _match(arms: Sequence[Arm], reference: Arm, match: Match, sweep: Sweep | None) -> None:
    if isinstance(match, matching.Unmatched):
        return
    if sweep is None and match.by == "time":
        say("match=time: the number of steps is known once the speed of each arm is measured")
        return

    def measure_of(arm: Arm) -> Callable[[dict[str, Any]], float]:
        assert sweep is not None or match.by != "time"
        return lambda config: _measured_speed(arm, config, sweep)  # type: ignore[arg-type]

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
        say(f"match={match.by}: {arm.name}: {matching.describe(arm.matched)}")
    if problems:
        raise ConfigError(problems)


def _measured_speed(arm: Arm, config: dict[str, Any], sweep: Sweep) -> float:
    """Train a few steps, once in the life of a sweep; an arm's members have one speed."""
    short = matching.measuring_run({**config, "seed": 1}, config["budget"]["steps"])
    varied = {name: value for name, value in arm.members[0].choices.items() if name != "seed"}
    job = make_job(varied, short, sweep.folder, "speed")
    if job.folder not in sweep.outcomes:
        sweep.run([job], "Measuring speed")
    outcome = sweep.outcomes[job.folder]
    if outcome.state != "finished":
        raise ConfigError([Problem("match", f"the speed of {arm.name} could not be measured: {outcome.message}")])
    return matching.speed(record.read_rows(job.folder / "metrics.csv")[1])


def _tune(arms: Sequence[Arm], bracket: tuning.Bracket, sweep: Sweep) -> None:
    """Run every arm's trials, and give its members the best of the values tried."""
    tried: list[tuple[Arm, list[tuning.Trial], list[Job]]] = []
    for arm in arms:
        first = arm.members[0]
        seed = first.config["seed"] if bracket.seed is None else bracket.seed
        try:
            trials = tuning.trials({**first.config, "seed": seed}, bracket.multipliers)
        except ValueError as error:
            raise ConfigError([Problem("tune", f"{error} (in {arm.name})")]) from error
        varied = {name: value for name, value in first.choices.items() if name != "seed"}
        jobs = [
            make_job(
                varied | {path: f"{value:.3g}" for path, value in trial.value.items()},
                trial.config,
                sweep.folder,
                "tuning",
            )
            for trial in trials
        ]
        tried.append((arm, trials, jobs))
    seeds = sorted({str(trial.config["seed"]) for _, trials, _ in tried for trial in trials})
    say(f"Tuning on seed {', '.join(seeds)}; the comparison uses all seeds")
    sweep.run([job for _, _, jobs in tried for job in jobs], "Tuning")
    tables: dict[str, dict[str, Any]] = {}
    for arm, trials, jobs in tried:
        summaries = [record.read_summary(job.folder) for job in jobs]
        losses = [summary["val_loss"] if summary else None for summary in summaries]
        index = tuning.best(losses)
        tables[arm.name] = {
            "trials": [
                {"multiplier": t.multiplier, "value": t.value, "val_loss": loss}
                for t, loss in zip(trials, losses, strict=True)
            ],
            "best": None if index is None else trials[index].value,
        }
        if index is None:
            sweep.notes.append(f"{arm.name}: no trial of its tuning has a finite loss; its default values are kept.")
            continue
        chosen = trials[index]
        values = ", ".join(f"{p}={v:.3g} (×{chosen.multiplier[p]:g})" for p, v in chosen.value.items())
        sweep.notes.append(f"{arm.name}: tuned to {values} on seed {chosen.config['seed']}.")
        if edges := tuning.at_edge(chosen, trials):
            tables[arm.name]["at_edge"] = edges
            sweep.notes.append(
                f"{arm.name}: the best {' and '.join(edges)} lies on the edge of the bracket: a better one may lie "
                "outside. Widen tune.multipliers before you trust this arm's rank."
            )
        changed = []
        for member in arm.members:
            config = member.config
            for path, factor in chosen.multiplier.items():
                config = config if factor == 1 else tuning.with_value(config, path, chosen.value[path])
            changed.append(config)
        arm.change(changed)
    record.write_json(sweep.folder / "tuning.json", tables)
    for note in sweep.notes:
        say(note)


def _jobs(arms: Sequence[Arm], sweep: Sweep) -> list[Job]:
    """The jobs of the comparison, with what was matched written into their folders."""
    jobs = []
    for arm in arms:
        for member in arm.members:
            job = make_job(member.choices, member.config, sweep.folder)
            jobs.append(job)
            sweep.names[job.folder] = arm.name
            if arm.matched is not None and not (job.folder / "match.json").is_file():
                record.write_json(job.folder / "match.json", matching.to_json(arm.matched))
    return jobs


def _record_measured_time(sweep: Sweep, reference: str) -> None:
    """Put seconds that were measured in place of those forecast: of a job, and of the mean run of the reference."""
    seconds = {job.folder: summary["seconds"] for job in sweep.jobs if (summary := record.read_summary(job.folder))}
    of_reference = [value for folder, value in seconds.items() if sweep.names[folder] == reference]
    for folder, reached in seconds.items():
        path = folder / "match.json"
        content = record.read_json(path) if path.is_file() else {"by": None}
        if content["by"] == "time":
            target = {"target": statistics.fmean(of_reference)} if of_reference else {}
            record.write_json(path, content | target | {"reached": reached})
