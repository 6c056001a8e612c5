"""Search a space of settings with Optuna: which trials a sweep has follows from the trials before."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import optuna
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep, Transformer
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from thunderhead.core.config import Config, ConfigError, Problem
from thunderhead.core.types import NonNegativeInt, PositiveInt
from thunderhead.lab.execution import PRUNED, Outcome
from thunderhead.lab.jobs import Job, make_job, state
from thunderhead.lab.runs import Failure, last_metrics
from thunderhead.lab.sweep import SINGLE_RUN, Sweep
from thunderhead.terminal import say
from thunderhead.training import record


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
    *, n_trials: PositiveInt, seed: NonNegativeInt, pruner: Literal["none", "median"], n_startup_trials: NonNegativeInt
) -> None:
    """The sweeper's settings, for the check: see conf/hydra/sweeper/optuna.yaml."""


def reports(folder: Path) -> dict[int, float]:
    """Validation losses so far by step."""
    return {int(row["step"]): row["val/loss"] for row in last_metrics(folder) if "val/loss" in row}


def run_search(
    space: Mapping[str, BaseDistribution],
    fixed: Sequence[str],
    compose: Callable[[Sequence[str]], Config],
    sweep: Sweep,
    *,
    n_jobs: int,
    n_trials: int,
    seed: int,
    pruner: str,
    n_startup_trials: int,
) -> int:
    """Search by TPE (Bergstra et al. 2011) for the lowest validation loss; gives the exit status, as `run_grid` does.

    Trials run in groups of `n_jobs`. The sampler is seeded and told the results in order: a search that goes on draws
    the trials that it had, finds them finished by their keys, or pruned by what they logged, and continues. The study
    is in study.json. A combination that is refused counts as a failed trial; ConfigError if it is the first one.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=n_startup_trials, constant_liar=n_jobs > 1),
        pruner=optuna.pruners.MedianPruner(n_startup_trials) if pruner == "median" else optuna.pruners.NopPruner(),
    )
    stopped = None
    trials: dict[Path, tuple[optuna.Trial, Job]] = {}  # of the group under way

    def is_hopeless(job: Job) -> bool:
        trial = trials[job.folder][0]
        known = study.trials[trial.number].intermediate_values
        for step, loss in reports(job.folder).items():
            if step not in known:
                trial.report(loss, step)
        return trial.should_prune()

    while len(study.trials) < n_trials:
        trials.clear()
        for _ in range(min(n_jobs, n_trials - len(study.trials))):
            trial = study.ask(dict(space))
            choices = {path: f"{v:.6g}" if isinstance(v, float) else str(v) for path, v in trial.params.items()}
            config = compose([*fixed, *(f"{path}={value}" for path, value in choices.items())]) | SINGLE_RUN
            job = make_job({"trial": str(trial.number), **choices}, config, sweep.folder)
            try:
                sweep.plan(config)
            except ConfigError as error:
                if trial.number == 0:  # nothing was started
                    raise
                sweep.failures.append(Failure(job.name, f"refused: {'; '.join(str(error).splitlines())}"))
                study.tell(trial, state=TrialState.FAIL)
                continue
            if job.folder in trials:  # the same point twice at once
                study.tell(trial, state=TrialState.FAIL)
            else:
                trials[job.folder] = (trial, job)

        sweep.begin()
        # pruned in an earlier start
        pruned = {p for p, (_, job) in trials.items() if state(p) == "partial" and is_hopeless(job)}
        sweep.note([trials[place][1] for place in pruned], dict.fromkeys(pruned, Outcome("pruned", PRUNED)))
        jobs = [job for _, job in trials.values()]
        sweep.jobs += [job for job in jobs if job.folder not in sweep.names]
        sweep.names |= {job.folder: job.name for job in jobs}
        try:
            waiting = [job for job in jobs if job.folder not in pruned]
            sweep.run(waiting, f"Search, {len(study.trials)} of {n_trials} trials", is_hopeless)
        except KeyboardInterrupt as signal:
            stopped = signal
            break
        for trial, job in trials.values():
            if state(job.folder) == "finished":
                is_hopeless(job)  # tells what an earlier start logged
            _tell(study, trial, job, sweep.outcomes[job.folder])
    told = [
        {"number": t.number, "state": t.state.name.lower(), "val_loss": t.value, "params": t.params}
        for t in study.trials
    ]
    record.write_json(sweep.folder / "study.json", {"trials": told})
    if any(trial.state == TrialState.COMPLETE for trial in study.trials):
        best = study.best_trial
        values = (f"{path}={v:.4g}" if isinstance(v, float) else f"{path}={v}" for path, v in best.params.items())
        say(f"best: trial {best.number}, validation loss {best.value:.4f}: {' '.join(values)}")
    return sweep.end(stopped=stopped)


def _tell(study: optuna.Study, trial: optuna.Trial, job: Job, outcome: Outcome) -> None:
    loss = (record.read_summary(job.folder) or {}).get("val_loss", math.nan)
    if math.isfinite(loss):
        study.tell(trial, loss)
    else:
        study.tell(trial, state=TrialState.PRUNED if outcome.state == "pruned" else TrialState.FAIL)
