"""Search a space of settings with Optuna: which trials a sweep has follows from the trials before."""

import difflib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep, Transformer
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
)
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from thunderhead.command_line import joined, shown
from thunderhead.core.config import Config, ConfigError, Problem, first_line, unknown
from thunderhead.core.types import NonNegativeInt, PositiveInt
from thunderhead.lab.execution import PRUNED, Outcome
from thunderhead.lab.jobs import Job, key, make_job
from thunderhead.lab.report import RESULTS
from thunderhead.lab.runs import Failure, last_metrics, read_runs
from thunderhead.lab.sweep import SINGLE_RUN, Sweep
from thunderhead.terminal import say


def space_of(overrides: Sequence[Override]) -> tuple[dict[str, BaseDistribution], list[str]]:
    """What is searched, and the overrides that stay; ConfigError if that is nothing, or what cannot be searched."""
    space, fixed, problems = {}, [], []
    for override in overrides:
        if not override.is_sweep_override():
            fixed.append(str(override.input_line))
            continue
        try:
            space[override.get_key_element()] = distribution(override)
        except ValueError as error:
            problems.append(Problem("", str(error)))
    if not space and not problems:
        message = "has nothing to search: optimizer.lr=tag(log, interval(1e-4, 1e-2))"
        problems.append(Problem("hydra/sweeper=optuna", message))
    if problems:
        raise ConfigError(problems)
    return space, fixed


def distribution(override: Override) -> BaseDistribution:
    """What Optuna draws from: a,b,c · range(1, 8) · interval(0.1, 1) · tag(log, interval(1e-4, 1e-2)).

    An interval between whole numbers without a decimal point is one of whole numbers. ValueError for other sweeps.
    """
    value = override.value()
    log = "log" in getattr(value, "tags", ())
    if isinstance(value, ChoiceSweep):
        choices = [str(choice) for choice in override.sweep_iterator(transformer=Transformer.encode)]
        return CategoricalDistribution(choices)
    if isinstance(value, RangeSweep):
        start, stop, step = value.start, value.stop, value.step
        if start is None or stop is None:
            raise ValueError(f"{override.key_or_group}: a range needs a start and a stop")
        if all(isinstance(number, int) for number in (start, stop, step)):
            last = int(start) + (int(stop) - 1 - int(start)) // int(step) * int(step)  # Hydra leaves the stop out
            return IntDistribution(int(start), last, step=int(step))
        return FloatDistribution(start, stop, step=step)
    if isinstance(value, IntervalSweep):
        low, high = value.start, value.end
        assert low is not None
        assert high is not None
        if isinstance(low, int) and isinstance(high, int):
            return IntDistribution(low, high, log=log)
        return FloatDistribution(float(low), float(high), log=log)
    raise ValueError(f"{override.key_or_group}: Optuna cannot search {override.get_value_element_as_str()}")


def settings(
    *,
    n_trials: PositiveInt,
    objective: str,
    direction: Literal["minimize", "maximize"],
    seed: NonNegativeInt,
    pruner: Literal["none", "median"],
    n_startup_trials: NonNegativeInt,
) -> None:
    """The sweeper's settings, for the check: see conf/hydra/sweeper/optuna.yaml."""


def refuse_unknown(objective: str, config: Config) -> None:
    """Raise ConfigError for an objective that no run measures; data may bring columns val/… of its own."""
    metrics = [name for name in RESULTS if name not in ("precision", "device")] + ["accuracy", *config["metrics"]]
    sources = [f"loss/{source}" for source in config["data"].get("sources", {})]
    known = [*metrics, "train/loss", *(f"val/{name}" for name in ("loss", *config["metrics"], *sources))]
    is_near = difflib.get_close_matches(objective, known, n=1, cutoff=0.8)
    if objective not in known and (is_near or not objective.startswith("val/")):
        raise ConfigError([Problem("hydra.sweeper.objective", f"{objective} {unknown(objective, known)}")])


def value_of(folder: Path, objective: str) -> float | None:
    """A finished run's result, or the last value of a column; NaN if its loss is none, None if it was not measured."""
    run = read_runs([folder])[0]
    if not math.isfinite(run.number("val_loss") or math.nan):
        return math.nan
    column = run.curve(objective).loss
    return float(column[-1]) if "/" in objective and column.size else run.number(objective)


def reports(folder: Path, objective: str) -> dict[int, float]:
    """An objective's values so far by step, if validation measures it."""
    column = objective if "/" in objective else f"val/{objective.removeprefix('val_')}"
    rows = last_metrics(folder) if column.startswith("val/") else []
    return {int(row["step"]): row[column] for row in rows if column in row}


def typed(params: Mapping[str, Any]) -> dict[str, str]:
    """A trial's values as they are typed."""
    return {path: f"{v:.6g}" if isinstance(v, float) else str(v) for path, v in params.items()}


def open_study(file: Path, **options: Any) -> optuna.Study:
    """A study in a journal, as it was left; ConfigError if the file is damaged."""
    if file.exists() and not (text := file.read_bytes()).endswith(b"\n"):
        os.truncate(file, text.rfind(b"\n") + 1)  # a line cut off by a crash; Optuna would write behind it
    try:
        storage = JournalStorage(JournalFileBackend(str(file)))
        study = optuna.create_study(storage=storage, load_if_exists=True, **options)
        for trial in study.trials:
            if any(not isinstance(value, int | float) for value in trial.values or ()):
                raise ValueError(f"trial {trial.number} has the values {trial.values}")
        return study
    except Exception as error:  # Optuna believes what it reads: whatever follows from it
        message = f"{file} is damaged ({first_line(error)}): delete it, and the trials are found by their folders"
        raise ConfigError([Problem("resume", message)]) from error


def run_search(
    space: Mapping[str, BaseDistribution],
    fixed: Sequence[str],
    compose: Callable[[Sequence[str]], Config],
    sweep: Sweep,
    *,
    n_jobs: int,
    n_trials: int,
    objective: str,
    direction: str,
    seed: int,
    pruner: str,
    n_startup_trials: int,
) -> int:
    """Search by TPE (Bergstra et al. 2011) for the best objective; gives the exit status, as `run_grid` does.

    Trials run in groups of `n_jobs`. The study is in study.log, and goes on from there: a trial that was stopped or
    failed is made again, with the same values, as another one. What is drawn depends on `seed`, how many trials came
    before and what they gave, not on when the search was stopped. Another objective, space or configuration is another
    study in the same file, which finds the runs that both have. A combination that is refused is a failed trial;
    ConfigError if it is the first one.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def sampler(position: int) -> optuna.samplers.TPESampler:
        (drawn,) = np.random.SeedSequence([seed, position]).generate_state(1)
        liar = n_jobs > 1
        return optuna.samplers.TPESampler(seed=int(drawn), n_startup_trials=n_startup_trials, constant_liar=liar)

    search = _Search(space, fixed, compose, sweep, objective)
    first = search.job_of(optuna.create_study(sampler=sampler(0)).ask(dict(space)))
    plan = sweep.plan(first.config)
    if first.config["dry_run"]:
        say(f"{n_trials} trials for {objective} ({direction}); {first.name}: {plan.size}")
        return 0
    sweep.begin()
    searched = {path: distribution_to_json(each) for path, each in space.items()}
    study = open_study(
        sweep.folder / "study.log",
        study_name=f"{direction} {objective} {key({**first.config, 'space': searched})}",
        direction=direction,
        pruner=optuna.pruners.MedianPruner(n_startup_trials) if pruner == "median" else optuna.pruners.NopPruner(),
    )
    replaced, stopped = search.take_up(study), None
    while (n := sum(t.state != TrialState.WAITING and t.number not in replaced for t in study.trials)) < n_trials:
        group: list[tuple[optuna.Trial, Job]] = []
        for position in range(n, min(n + n_jobs, n_trials)):
            study.sampler = sampler(position)
            group += search.ask(study)
        try:
            search.run(study, group, n, n_trials)
        except KeyboardInterrupt as signal:
            stopped = signal
            break
    if any(trial.state == TrialState.COMPLETE for trial in study.trials):
        search.say_best(study.best_trial)
    return sweep.end(stopped=stopped)


@dataclass
class _Search:
    """Between a study and its sweep: trials become jobs, and what became of the jobs is told to the study."""

    space: Mapping[str, BaseDistribution]
    fixed: Sequence[str]
    compose: Callable[[Sequence[str]], Config]
    sweep: Sweep
    objective: str

    def job_of(self, trial: optuna.Trial | FrozenTrial) -> Job:
        """ConfigError if its configuration goes together with no search."""
        choices = typed(trial.params)
        config = self.compose([*self.fixed, *(f"{path}={value}" for path, value in choices.items())])
        refuse_unknown(self.objective, config)
        if acting := [group for group, none in SINGLE_RUN.items() if config[group] != none]:
            message = "acts on a grid, and a search is none: leave it out, or hydra/sweeper=grid"
            raise ConfigError([Problem(group, message) for group in acting])
        return make_job({"trial": str(trial.number), **choices}, config, self.sweep.folder)

    def take_up(self, study: optuna.Study) -> set[int | None]:
        """Note what earlier starts ended, and queue again what they left or failed; gives the numbers replaced so."""
        replaced = {trial.user_attrs.get("again") for trial in study.trials}
        for old in study.trials:
            if old.state in (TrialState.COMPLETE, TrialState.PRUNED):
                job = self.job_of(old)
                is_pruned = old.state == TrialState.PRUNED
                outcome = Outcome("pruned", PRUNED) if is_pruned else Outcome("finished", already=True)
                self._add([job])
                self.sweep.note([job], {job.folder: outcome})
                continue
            if old.state == TrialState.RUNNING:
                study.tell(old.number, state=TrialState.FAIL)
            if old.state != TrialState.WAITING and old.number not in replaced:
                study.enqueue_trial(old.params, user_attrs={"again": old.number})
                replaced.add(old.number)
        return replaced

    def ask(self, study: optuna.Study) -> list[tuple[optuna.Trial, Job]]:
        """The next trial; none if its configuration is refused."""
        trial = study.ask(dict(self.space))
        job = self.job_of(trial)
        trial.set_user_attr("folder", job.folder.name)
        try:
            self.sweep.plan(job.config)
        except ConfigError as error:
            self.sweep.failures.append(Failure(job.name, f"refused: {'; '.join(str(error).splitlines())}"))
            study.tell(trial, state=TrialState.FAIL)
            return []
        return [(trial, job)]

    def run(self, study: optuna.Study, group: Sequence[tuple[optuna.Trial, Job]], n_before: int, n_trials: int) -> None:
        """Run trials, after others, and tell what became of them; Stopped if a signal ended them."""
        reported: set[tuple[int, int]] = set()

        def is_hopeless(job: Job) -> bool:
            trial = next(trial for trial, its in group if its.folder == job.folder)
            for step, value in reports(job.folder, self.objective).items():
                if (trial.number, step) not in reported:
                    trial.report(value, step)
                    reported.add((trial.number, step))
            return bool(trial.should_prune())

        jobs = [job for _, job in group]
        self._add(jobs)
        self.sweep.run(jobs, "Search", is_hopeless, n_before, n_trials)
        for trial, job in group:
            is_hopeless(job)  # tells what was logged since, or by an earlier start
            outcome = self.sweep.outcomes[job.folder]
            value = value_of(job.folder, self.objective) if outcome.state == "finished" else math.nan
            if value is None:
                self.sweep.failures.append(Failure(job.name, f"has no {self.objective} to go by"))
            if value is not None and math.isfinite(value):
                study.tell(trial, value)
            else:
                study.tell(trial, state=TrialState.PRUNED if outcome.state == "pruned" else TrialState.FAIL)

    def _add(self, jobs: Sequence[Job]) -> None:
        once = {job.folder: job for job in jobs}
        self.sweep.jobs += [job for folder, job in once.items() if folder not in self.sweep.names]
        self.sweep.names |= {folder: job.name for folder, job in once.items()}

    def say_best(self, best: FrozenTrial) -> None:
        """Its values, as a command that trains it alone."""
        flags = [a for a in joined(self.sweep.arguments) if a.startswith(("--config", "-c", "hydra.searchpath"))]
        if {"-m", "--multirun"}.isdisjoint(self.sweep.arguments):
            flags.append("hydra.mode=RUN")  # the experiment is a sweep by itself
        lines = [*flags, *self.fixed, *(f"{path}={value}" for path, value in typed(best.params).items())]
        say(f"best: trial {best.number}, {self.objective} {best.value:.6g}; by itself: {shown('train.py', *lines)}")
