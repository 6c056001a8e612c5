"""Which runs a sweep has: `hydra/sweeper=grid`, `hydra/sweeper=optuna`, IsoFLOP grids and ladders.

Hydra imports this module at every start: what is heavy is imported where it is used.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from thunderhead import disk, extras, lean
from thunderhead.core.components import check
from thunderhead.core.config import Config, ConfigError, Problem, plain
from thunderhead.core.types import NonNegativeFloat, PathText, PositiveInt

from .launchers import ThunderheadLauncher, containers

if TYPE_CHECKING:
    from thunderhead.lab.jobs import PlanRun
    from thunderhead.lab.sweep import Sweep


def planner() -> "PlanRun":
    """What plans runs for a sweep, and refuses them; those that differ in nothing but the seed have one plan."""
    from thunderhead.core.data.datamodule import asked
    from thunderhead.lab.jobs import Plan, arm_key
    from thunderhead.training.run import check_config, plan_config, prepare

    plans: dict[str, tuple[Plan, bool]] = {}  # and whether it is one of data that is prepared

    def plan(config: Config, *, prepared: bool = False) -> Plan:
        check_config(config)
        key = arm_key(config)
        if key not in plans or (prepared and not plans[key][1]):
            run, planned = plan_config(config, Path(), count_memory=False)  # each job counts its own
            planned = prepare(run, planned) if prepared else planned
            plans[key] = Plan(*(getattr(planned, name) for name in Plan._fields)), asked(run.data, "is_prepared")
        return plans[key][0]

    return plan


class ThunderheadSweeper(Sweeper):
    """What all sweepers share: composing a run's configuration, and the launcher.

    `params` are what an experiment sweeps over. `run` runs a sweep and gives its exit status; if that is not 0, `sweep`
    ends the program with it.
    """

    params: dict[str, Any]
    config: DictConfig
    hydra_context: HydraContext

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config, self.hydra_context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def begin(self, reuse: str | None = None) -> "Sweep":
        """A sweep in its folder, with what runs and plans its jobs, and what was typed, to go on with later."""
        from thunderhead.lab.sweep import Sweep

        problems = []
        if not isinstance(self.launcher, ThunderheadLauncher):
            name = type(self.launcher).__name__
            message = f"{name} cannot run this sweep: leave it out, and for two runs at a time hydra.launcher.n_jobs=2"
            problems.append(Problem("hydra/launcher", f"{message}; or hydra/launcher=slurm"))
        else:
            problems += check({"hydra.launcher": plain(self.config.hydra.launcher)})
        if reuse is not None and not Path(reuse).is_dir():
            message = f"{reuse} is no folder: give that of earlier sweeps, as logs/sweeps"
            problems.append(Problem("hydra.sweeper.reuse", message))
        if problems:
            raise ConfigError(problems)
        assert isinstance(self.launcher, ThunderheadLauncher)
        sweep = Sweep(Path(str(self.config.hydra.sweep.dir)), self.launcher.executor(), sys.argv[1:], planner())
        sweep.reuse = Path(reuse) if reuse is not None else None
        return sweep

    def overrides(self, arguments: Sequence[str]) -> list[Override]:
        """What is swept over: that of the experiment, then that of the command line."""
        lines = [*(f"{name}={value}" for name, value in self.params.items()), *arguments]
        return list(OverridesParser.create(config_loader=self.hydra_context.config_loader).parse_overrides(lines))

    def combinations(self, arguments: Sequence[str]) -> list[tuple[dict[str, str], list[str]]]:
        """Of each combination of swept values, those that vary, and all of its overrides."""
        overrides = self.overrides(arguments)
        empty = [o.key_or_group for o in overrides if o.is_sweep_override() and not any(o.sweep_string_iterator())]
        if empty:
            raise ConfigError([Problem(path, "is swept over nothing: its glob(…) matches no option") for path in empty])
        combinations = BasicSweeper.split_arguments(overrides, None)[0]
        values: dict[str, set[str]] = {}
        for line in (line for combination in combinations for line in combination):
            key, _, value = line.partition("=")
            values.setdefault(key, set()).add(value)
        found = []
        for combination in combinations:
            lines = [line.partition("=") for line in combination]
            choices = {key.lstrip("+"): value for key, _, value in lines if len(values[key]) > 1}
            found.append((choices, list(combination)))
        return found

    def compose(self, overrides: Sequence[str]) -> Config:
        """The resolved configuration of one combination."""
        composed = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        OmegaConf.set_struct(composed, False)
        del composed["hydra"]
        return plain(composed)

    def sweep(self, arguments: list[str]) -> Any:
        with disk.told():
            status = self.run(arguments)
        if status:
            sys.exit(status)

    def run(self, arguments: list[str]) -> int:
        raise NotImplementedError


class GridSweeper(ThunderheadSweeper):
    """Every combination of the swept values.

    - baseline: the arm that others are matched to and compared with; None = matched to the first.
    - metric: what arms are compared by; smallest_effect: those that surely differ by less are called practically equal.
    - until: seeds = those that are given; resolved = arms whose comparisons are open get more, up to `max_seeds`.
    - reuse: a folder of earlier sweeps, from which finished runs are taken.
    """

    def __init__(
        self,
        *,
        baseline: str | None = None,
        metric: Literal["auto", "val_loss", "bits_per_byte", "loss_averaged"] = "auto",
        smallest_effect: NonNegativeFloat = 0.005,
        until: Literal["seeds", "resolved"] = "seeds",
        max_seeds: PositiveInt = 8,
        reuse: PathText | None = None,
        params: dict[str, Any] | None = None,
    ):
        self.baseline, self.params = baseline, params or {}
        self.comparisons = {"metric": metric, "smallest_effect": smallest_effect}
        self.settings: dict[str, Any] = {**self.comparisons, "until": until, "max_seeds": max_seeds, "reuse": reuse}

    def run(self, arguments: list[str]) -> int:
        own = {"_target_": f"{__name__}.GridSweeper", **self.settings}
        if problems := check({"hydra.sweeper": own}):
            raise ConfigError(problems)
        composed = [(choices, self.compose(lines)) for choices, lines in self.combinations(arguments)]
        with lean.importing():
            from thunderhead.lab.grid import Candidate, run_grid
        candidates = [Candidate(*each) for each in composed]
        sweep = self.begin(self.settings["reuse"])
        sweep.comparisons = self.comparisons
        max_seeds = self.settings["max_seeds"] if self.settings["until"] == "resolved" else None
        return run_grid(candidates, sweep, baseline=self.baseline, max_seeds=max_seeds)


class IsoFlopSweeper(ThunderheadSweeper):
    """Sizes of the model at equal compute budgets, and a scaling law fitted to them.

    `settings` are those of `thunderhead.lab.isoflop.Settings`; of `params`, only the seed may have several values.
    """

    def __init__(
        self,
        *,
        params: dict[str, Any] | None = None,
        baseline: None = None,
        metric: None = None,
        smallest_effect: None = None,
        until: None = None,
        max_seeds: None = None,
        reuse: str | None = None,
        **settings: Any,
    ):
        self.params, self.settings, self.reuse = params or {}, containers(settings), reuse
        comparisons = {"metric": metric, "smallest_effect": smallest_effect, "until": until, "max_seeds": max_seeds}
        self.of_comparisons = {"baseline": baseline, **comparisons}

    def run(self, arguments: list[str]) -> int:
        with lean.importing():
            from thunderhead.lab.isoflop import read_settings, run_isoflop

        settings = read_settings(self.settings)
        problems, seeds, fixed = [], [], []
        for name in (name for name, value in self.of_comparisons.items() if value is not None):
            problems.append(Problem(f"hydra.sweeper.{name}", "a scaling law compares with none: leave it out"))
        for override in self.overrides(arguments):
            if override.key_or_group == "seed" and override.is_sweep_override():
                seeds = list(map(str, override.sweep_string_iterator()))
            elif override.is_sweep_override():
                message = "would mix several laws: beside sizes and budgets, only the seed may have several values"
                problems.append(Problem(override.key_or_group, message))
            else:
                fixed.append(str(override.input_line))
        if problems:
            raise ConfigError(problems)
        return run_isoflop(settings, self.begin(self.reuse), overrides=fixed, seeds=seeds, compose=self.compose)


class LadderSweeper(ThunderheadSweeper):
    """Every combination of the swept values at several sizes of the model, to see whether an effect persists.

    `settings` are those of `thunderhead.lab.ladder_sweep.Settings`; `baseline` is the arm to compare with, None = the
    first.
    """

    def __init__(
        self,
        *,
        params: dict[str, Any] | None = None,
        baseline: str | None = None,
        reuse: str | None = None,
        metric: None = None,
        smallest_effect: None = None,
        until: None = None,
        max_seeds: None = None,
        **settings: Any,
    ):
        self.params, self.baseline, self.settings = params or {}, baseline, containers(settings)
        self.reuse = reuse
        comparisons = {"metric": metric, "smallest_effect": smallest_effect, "until": until, "max_seeds": max_seeds}
        self.of_comparisons = comparisons

    def run(self, arguments: list[str]) -> int:
        with lean.importing():
            from thunderhead.lab.ladder_sweep import read_settings, run_ladder

        combinations = self.combinations(arguments)
        settings = read_settings(self.settings, [line for _, lines in combinations for line in lines])
        if given := [name for name, value in self.of_comparisons.items() if value is not None]:
            message = "is of comparisons at one size: leave it out"
            raise ConfigError([Problem(f"hydra.sweeper.{name}", message) for name in given])
        return run_ladder(
            settings, self.begin(self.reuse), arms=combinations, compose=self.compose, baseline=self.baseline
        )


class OptunaSweeper(ThunderheadSweeper):
    """A search by Optuna's TPE for the best of a result; as many trials at once as the launcher's n_jobs.

    `settings` are those of `thunderhead.lab.search.settings`.
    """

    def __init__(self, *, params: dict[str, Any] | None = None, **settings: Any):
        self.params, self.settings = params or {}, containers(settings)

    def run(self, arguments: list[str]) -> int:
        try:
            with lean.importing():
                from thunderhead.lab.search import run_search, space_of
        except ImportError as error:
            raise ConfigError([Problem("hydra/sweeper=optuna", f"needs: {extras.install('optuna')}")]) from error
        if problems := check({"hydra.sweeper": {"_target_": "thunderhead.lab.search.settings", **self.settings}}):
            raise ConfigError(problems)
        space, fixed = space_of(self.overrides(arguments))
        n_jobs = getattr(self.launcher, "n_jobs", 1)
        if n_jobs == "auto":
            message = "auto is for grids: here it is how many trials begin before the next knows how they ended"
            raise ConfigError([Problem("hydra.launcher.n_jobs", f"{message}; give a number")])
        return run_search(space, fixed, self.compose, self.begin(), n_jobs=n_jobs, **self.settings)
