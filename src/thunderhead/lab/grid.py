"""The way of a grid of runs: check and plan all → match → tune → run → report."""

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from thunderhead.core import components
from thunderhead.core.components import build
from thunderhead.core.config import Config, ConfigError, Problem, leaves, read_mapping
from thunderhead.lab import match as matching
from thunderhead.lab import tune as tuning
from thunderhead.lab.arms import NO_DIFFERENCE, is_in, of_seed
from thunderhead.lab.jobs import Job, Plan, PlanRun, arm_key, make_job, name_of, without_seed
from thunderhead.lab.match import Matching
from thunderhead.lab.runs import LOOKS, SPEED, TUNED, TUNING, Match, read_metrics
from thunderhead.lab.statistics import unresolved
from thunderhead.lab.sweep import SINGLE_RUN, Sweep
from thunderhead.lab.tune import Bracket
from thunderhead.terminal import quantity, say
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
    candidates: Sequence[Candidate], sweep: Sweep, *, baseline: str | None = None, max_seeds: int | None = None
) -> int:
    """Run all combinations, in order, and report; gives the exit status: 0, 1 if jobs failed, 130 after Ctrl-C.

    What is finished in the sweep's folder is not trained again. `baseline` names the arm to match and compare with;
    None = the first is matched to, and the report chooses. With `max_seeds`, arms whose comparisons are open get more
    seeds, one at a time. ConfigError if some combination is refused, before any runs.
    """
    match, bracket = sweep_options(candidates)
    arms = make_arms(candidates, sweep.plan)
    names = [arm.name for arm in arms]
    if baseline is not None and baseline not in names:
        raise ConfigError([Problem("hydra.sweeper.baseline", f"no arm is called {baseline}: {', '.join(names)}")])
    reference = arms[names.index(baseline)] if baseline is not None else arms[0]
    if max_seeds is not None:
        sweep.looks = _looks(arms, max_seeds)
    if any(c.config["dry_run"] for c in candidates):
        if match.solves and match.measures:
            say(f"match={match.by}: the number of steps is known once the speed of each arm is measured")
        else:
            _match(arms, reference, match, sweep)
        for arm in arms:
            size = sweep.plan(arm.members[0].config).size
            more = f" and up to {max_seeds - len(arm.members)} more seeds" if max_seeds is not None else ""
            if bracket.multipliers:
                more += f" and {math.prod(map(len, bracket.multipliers.values()))} trials to tune it"
            say(f"{arm.name}: {len(arm.members)} run(s){more}, {size}")
        return 0
    sweep.begin()
    stopped = None
    seeds = {member.config["seed"] for arm in arms for member in arm.members}
    try:
        if match.solves:  # by numbers that follow from the vocabulary, and from how much text there is
            for arm in arms:
                arm.plan = sweep.plan(arm.members[0].config, prepared=True)
        _match(arms, reference, match, sweep)
        if bracket.multipliers:
            seeds.add(_tune(arms, bracket, sweep))
        sweep.jobs = _jobs(arms, sweep)
        sweep.run_all()
        for n in sweep.looks[1:]:
            found = sweep.analyse(baseline).comparisons
            given_up = [f"{c.arm} − {c.against}" for c in found if c.is_given_up]
            unclear = unresolved(found)
            if not unclear:
                if given_up:
                    say(f"Not resolved, and hardly to be by {max_seeds} seeds: {', '.join(given_up)}")
                break
            seeds.add(seed := max(seeds) + 1)
            say(f"Not resolved: {', '.join(sorted(unclear))}; seed {seed} is added, {n} of {max_seeds} at most")
            for arm in (arm for arm in arms if arm.name in unclear):
                choices, config = arm.members[0]
                arm.members.append(Candidate({**choices, "seed": str(seed)}, {**config, "seed": seed}))
            jobs = _jobs(arms, sweep)
            added = [job for job in jobs if job not in sweep.jobs]
            sweep.jobs = jobs
            sweep.run(added, f"Seed {seed}")
    except KeyboardInterrupt as signal:
        stopped = signal
    if match.by == "time":
        _record_measured_time(sweep, reference.name)
    return sweep.end(stopped=stopped, baseline=baseline)


# --- before anything starts -------------------------------------------------------------------------------------------


def sweep_options(candidates: Sequence[Candidate]) -> tuple[Any, Any]:
    """The one choice of `match` and `tune`; the candidates' own are set to none.

    ConfigError if there are several choices, one is refused, or sets what the sweep varies.
    """
    options = []
    for group in ("match", "tune"):
        nodes = [candidate.config[group] for candidate in candidates]
        if any(node != nodes[0] for node in nodes):
            raise ConfigError([Problem(group, "is a choice for the whole sweep and cannot be swept over")])
        if problems := components.check({group: nodes[0]}):
            raise ConfigError(problems)
        options.append(build(nodes[0]))
    if any(candidate.config.get("resume") for candidate in candidates):
        message = "is no sweep folder (it has no sweep.json): give logs/sweeps/<name>/<time>"
        raise ConfigError([Problem("resume", message)])
    match, bracket = options
    varied = candidates[0].choices
    message = "changes no loss, so that its values are no arms to compare: leave it out, or start a run for each"
    if problems := [Problem(path, message) for path in varied if path != "seed" and is_in(path, NO_DIFFERENCE)]:
        raise ConfigError(problems)
    solved = {path: own for own in match.solves for path in varied if is_in(path, [own])}
    problems = [Problem(path, f"match={match.by} solves for {own}: leave one out") for path, own in solved.items()]
    tried = [path for path in bracket.multipliers if path in varied]
    problems += [Problem(path, f"tune tries multiples of {path} in each arm: leave one out") for path in tried]
    if problems:
        raise ConfigError(problems)
    for candidate in candidates:
        candidate.config.update(SINGLE_RUN)
    return match, bracket


def plan_all(named: Sequence[tuple[str, Config]], plan: PlanRun) -> list[Plan]:
    """Check and plan configurations; ConfigError with all their problems, each once, and whose they are."""
    plans: list[Plan] = []
    found: dict[Problem, list[str]] = {}
    for name, config in named:
        try:
            plans.append(plan(config))
        except ConfigError as error:
            for problem in error.problems:
                found.setdefault(problem, []).append(name)
    if found:
        where = {p: f" (in {', '.join(names)})" * (len(names) < len(named)) for p, names in found.items()}
        raise ConfigError([Problem(p.path, p.message + where[p]) for p in found])
    return plans


def make_arms(candidates: Sequence[Candidate], plan: PlanRun) -> list[Arm]:
    """Check and plan every candidate, and group them by their configurations; ConfigError with all their problems.

    Values may follow from the seed (optimizer.lr=${…}): candidates that share a name are several arms then, and the
    seeds are added to it; but a seed or a text that holds it (`${seed}`) tells no arm from another.
    """
    arms, called = dict[str, Arm](), defaultdict[str, list[str]](list)
    plans = plan_all([(" ".join(candidate.choices.values()), candidate.config) for candidate in candidates], plan)
    alike = defaultdict[str, list[Config]](list)
    for candidate in candidates:
        alike[name_of(without_seed(candidate.choices))].append(candidate.config)
    follow = {name: of_seed(configs) for name, configs in alike.items()}
    for candidate, planned in zip(candidates, plans, strict=True):
        name = name_of(without_seed(candidate.choices))
        key = arm_key({path: v for path, v in leaves(candidate.config) if path not in follow[name]})
        arm = arms.setdefault(key, Arm(name, [], planned))
        called[key].append(name)
        if candidate.config["seed"] not in [member.config["seed"] for member in arm.members]:
            arm.members.append(candidate)
    for name, *others in map(dict.fromkeys, called.values()):
        if others:
            say(f"{name}: the same configuration as {', '.join(others)}, and trained once")
    uses = Counter(arm.name for arm in arms.values())
    for arm in arms.values():
        if uses[arm.name] > 1:
            arm.name += f" seed={','.join(str(member.config['seed']) for member in arm.members)}"
    return list(arms.values())


def _looks(arms: Sequence[Arm], max_seeds: int) -> tuple[int, ...]:
    """Numbers of seeds at which to look: those that are given, then one more at a time."""
    given = {tuple(member.config["seed"] for member in arm.members) for arm in arms}
    n = min(map(len, given))
    if len(given) > 1 or n < 2:
        message = "adds seeds to two at least, the same for all arms: give them, as seed=1,2,3"
        raise ConfigError([Problem("hydra.sweeper.until", message)])
    if max_seeds < n:
        raise ConfigError([Problem("hydra.sweeper.max_seeds", f"{max_seeds} is less than the {n} given seeds")])
    return tuple(range(n, max_seeds + 1))


# --- match and tune ---------------------------------------------------------------------------------------------------


def _match(arms: Sequence[Arm], reference: Arm, match: Matching, sweep: Sweep) -> None:
    if not match.solves:
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
        if odd := matching.odd(solved[0][0], arm.matched):
            sweep.notes.append(f"{arm.name}: {odd}")
        say(f"match={match.by}: {arm.name}: {matching.describe(arm.matched, match.unit)}")
    if problems:
        raise ConfigError(problems)


def _measured_speed(arm: Arm, config: Config, sweep: Sweep) -> float:
    """Train a few steps, once in the life of a sweep; an arm's members have one speed."""
    short = matching.measuring_run({**config, "seed": 1}, config["budget"]["steps"])
    job = make_job(arm.varied, short, sweep.folder, SPEED)
    if job.folder not in sweep.outcomes:
        sweep.run([job], "Measuring speed")
    outcome = sweep.outcomes[job.folder]
    if outcome.state != "finished":
        raise ConfigError([Problem("match", f"the speed of {arm.name} could not be measured: {outcome.message}")])
    return matching.speed(read_metrics(job.folder))


def _tune(arms: Sequence[Arm], bracket: Bracket, sweep: Sweep) -> int:
    """Run every arm's trials, and give its members the best of the values tried; returns the seed that they had."""
    tried: list[tuple[Arm, list[tuning.Trial], list[Job]]] = []
    compared = {member.config["seed"] for arm in arms for member in arm.members}
    seed = bracket.seed if bracket.seed is not None else min({*range(len(compared) + 1)} - compared)
    if seed in compared:
        sweep.notes.append(f"Tuned on seed {seed}, which is compared, too: that flatters arms whose loss varies more.")
    others = tuning.nonzero((arm.members[0].config for arm in arms), bracket.multipliers)
    for arm in arms:
        config = {**arm.members[0].config, "seed": seed, "sample": False}
        elsewhere = {path: value for path, value in others.items() if path not in arm.varied}  # a 0 asked for stays 0
        try:
            trials = tuning.trials(config, bracket.multipliers, elsewhere)
        except ValueError as error:
            raise ConfigError([Problem("tune", f"{error} (in {arm.name})")]) from error
        values = [arm.varied | {path: f"{value:.3g}" for path, value in trial.value.items()} for trial in trials]
        jobs = [make_job(v, trial.config, sweep.folder, TUNING) for v, trial in zip(values, trials, strict=True)]
        tried.append((arm, trials, jobs))
    say(f"Tuning on seed {seed}; compared are seeds {', '.join(map(str, sorted(compared)))}")
    sweep.run([job for _, _, jobs in tried for job in jobs], "Tuning")
    tables = {arm.name: _take_best(arm, trials, jobs, sweep) for arm, trials, jobs in tried}
    record.write_json(sweep.folder / TUNED, tables)
    for note in sweep.notes:
        say(note)
    return int(seed)


def _take_best(arm: Arm, trials: Sequence[tuning.Trial], jobs: Sequence[Job], sweep: Sweep) -> dict[str, Any]:
    """Give an arm the values of its best trial, note it, and return what tuning.json holds about the arm."""
    summaries = [record.read_summary(job.folder) or {} for job in jobs]
    losses = [summary.get("val_loss") for summary in summaries]
    cost = quantity(sum(summary.get("flops", 0) for summary in summaries))
    tried = [
        {"multiplier": trial.multiplier, "value": trial.value, "val_loss": loss}
        for trial, loss in zip(trials, losses, strict=True)
    ]
    table: dict[str, Any] = {"trials": tried, "best": None}
    spent = f"{len(jobs)} trials, {cost} FLOPs beside those of the comparison"
    index = tuning.best(losses)
    if index is None:
        sweep.notes.append(f"{arm.name}: no trial has a finite loss; its default values are kept ({spent}).")
        return table
    chosen = trials[index]
    table["best"] = chosen.value
    values = ", ".join(f"{p}={v:.3g} (×{chosen.multiplier[p]:g})" for p, v in chosen.value.items())
    sweep.notes.append(f"{arm.name}: tuned to {values} on seed {chosen.config['seed']} ({spent}).")
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
        for n, member in enumerate(arm.members):
            config = member.config if n == 0 else {**member.config, "sample": False}
            job = make_job(member.choices, config, sweep.folder)
            jobs.append(job)
            sweep.names[job.folder] = arm.name
            if sweep.looks and not (job.folder / LOOKS).is_file():  # there may be more, of where a run was taken from
                record.write_json(job.folder / LOOKS, {"looks": sweep.looks})
            if arm.matched is not None and not (job.folder / "match.json").is_file():
                record.write_json(job.folder / "match.json", arm.matched._asdict())
    return jobs


def _record_measured_time(sweep: Sweep, reference: str) -> None:
    """Put seconds that were measured in place of those forecast: of a job, and of the mean run of the reference."""
    summaries = {job.folder: record.read_summary(job.folder) for job in sweep.jobs}
    seconds = {folder: summary["seconds"] for folder, summary in summaries.items() if summary}
    of_reference = [value for folder, value in seconds.items() if sweep.names[folder] == reference]
    target = {"target": statistics.fmean(of_reference)} if of_reference else {}
    for folder, reached in seconds.items():
        content = read_mapping(folder / "match.json")
        record.write_json(folder / "match.json", content | target | {"reached": reached})
