"""`python compare.py`: the report of finished runs, or the scaling law of them, wherever they lie."""

from pathlib import Path

from omegaconf import DictConfig

from thunderhead import command_line
from thunderhead.core import config as configuration
from thunderhead.core.config import ConfigError, Problem
from thunderhead.core.types import Count, FolderName, NonNegativeFloat, PositiveFloat
from thunderhead.lab.analysis import Metric
from thunderhead.lab.report import write_report
from thunderhead.lab.runs import read_runs
from thunderhead.lab.scaling_report import write_law_report


def settings(
    *,
    runs: str | list[str],
    metric: Metric,
    smallest_effect: NonNegativeFloat,
    name: FolderName,
    baseline: str | None = None,
    scaling: Count | None = None,
    fit_up_to: PositiveFloat | None = None,
) -> None:
    """The top-level settings, for the check: see conf/compare.yaml."""


def compare_runs(config: DictConfig) -> Path:
    """Write the report of the runs in `runs` into the folder that Hydra gave this comparison.

    ConfigError if the configuration is refused, a folder holds no run, or no arm is called `baseline`.
    """
    folder, chosen = command_line.output_dir(), configuration.plain(config)
    try:
        problems = configuration.check(chosen, settings)
        law = {"count": chosen["scaling"], "fit_up_to": chosen["fit_up_to"]}
        arms = {name: chosen[name] for name in ("baseline", "metric", "smallest_effect")}
        if chosen["scaling"] is None and chosen["fit_up_to"] is not None:
            problems.append(Problem("fit_up_to", "is of a scaling law: add scaling=total"))
        elif chosen["scaling"] is not None:
            given = [name for name in ("baseline", "metric") if chosen[name] not in (None, "auto")]
            problems += [Problem(name, "is of a comparison of arms: leave it out, or scaling") for name in given]
        if problems:
            raise ConfigError(problems)
        folders = chosen["runs"].split(",") if isinstance(chosen["runs"], str) else chosen["runs"]
        runs = read_runs(path.strip() for path in folders)
        return write_law_report(folder, runs, **law) if law["count"] else write_report(folder, runs, **arms)
    except ConfigError:
        command_line.remove_if_empty(folder)
        raise
