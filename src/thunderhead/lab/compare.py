"""`python compare.py`: the report of finished runs, their scaling law or ladder, or one of them trained again."""

from pathlib import Path

from omegaconf import DictConfig

from thunderhead import command_line
from thunderhead.core import components
from thunderhead.core import config as configuration
from thunderhead.core.config import ConfigError, Problem
from thunderhead.core.types import Count, FolderName, NonNegativeFloat, PathText, PositiveFloat
from thunderhead.lab.analysis import Metric
from thunderhead.lab.ladder_report import places_of, write_ladder_report
from thunderhead.lab.report import write_report
from thunderhead.lab.runs import read_runs, recorded_names
from thunderhead.lab.scaling_report import write_law_report
from thunderhead.lab.verify import verify


def settings(
    *,
    metric: Metric,
    smallest_effect: NonNegativeFloat,
    name: FolderName,
    runs: str | list[str] | None = None,
    verify: PathText | None = None,
    baseline: str | None = None,
    scaling: Count | None = None,
    fit_up_to: PositiveFloat | None = None,
    ladder: bool = False,
    project: PositiveFloat | None = None,
) -> None:
    """The top-level settings, for the check: see conf/compare.yaml."""


def compare_runs(config: DictConfig) -> Path:
    """Write the report of the runs in `runs` into the folder that Hydra gave this comparison, or verify one there.

    The program ends with status 1 if a verified run got other losses. ConfigError if the configuration is refused, a
    folder holds no run, none can be read, or no arm is called `baseline`.
    """
    folder, chosen = command_line.output_dir(), configuration.plain(config)
    try:
        problems = components.check(chosen, settings)
        law = {"count": chosen["scaling"], "fit_up_to": chosen["fit_up_to"]}
        arms = {name: chosen[name] for name in ("baseline", "metric", "smallest_effect")}
        if chosen["scaling"] is not None and chosen["ladder"]:
            problems.append(Problem("ladder", "is one report, and scaling another: leave out one of them"))
        if chosen["project"] is not None and not chosen["ladder"]:
            problems.append(Problem("project", "is of a ladder: add ladder=true"))
        if chosen["scaling"] is None and not chosen["ladder"] and chosen["fit_up_to"] is not None:
            problems.append(Problem("fit_up_to", "is of a scaling law or a ladder: add scaling=total, or ladder=true"))
        elif chosen["scaling"] is not None:
            given = [name for name in ("baseline", "metric") if chosen[name] not in (None, "auto")]
            problems += [Problem(name, "is of a comparison of arms: leave it out, or scaling") for name in given]
        asked = chosen["runs"] or ""
        asked = asked.split(",") if isinstance(asked, str) else asked
        folders = [folder.strip() for folder in asked if folder.strip()]  # none of runs=$UNSET
        if bool(folders) == (chosen["verify"] is not None):
            message = "give the folders of runs or sweeps to compare: runs=logs/sweeps/<name>/<time>"
            both = "is for one report, or verify for checking one: leave out one of them"
            problems.append(Problem("runs", both if folders else message))
        if problems:
            raise ConfigError(problems)
        if chosen["verify"] is not None:
            if status := verify(Path(chosen["verify"]), folder):
                raise SystemExit(status)
            return folder
        runs = read_runs(folders)
        if all(run.broken for run in runs):
            raise ConfigError([Problem("runs", f"{run.folder} {run.broken}") for run in runs])
        if chosen["ladder"]:
            places = places_of(runs, chosen["fit_up_to"])
            return write_ladder_report(folder, runs, places, baseline=arms["baseline"], project=chosen["project"])
        return (
            write_law_report(folder, runs, **law)
            if law["count"]
            else write_report(folder, runs, names=recorded_names(runs), **arms)
        )
    except ConfigError:
        command_line.remove_if_empty(folder)
        raise
