"""`python compare.py`: the report of finished runs, or the scaling law of them, wherever they lie."""

import contextlib
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from thunderhead import command_line
from thunderhead.core import config as configuration
from thunderhead.core.config import ConfigError, Problem
from thunderhead.core.types import Count, PositiveFloat
from thunderhead.lab.analysis import Metric
from thunderhead.lab.arms import UnknownArmError
from thunderhead.lab.report import write_report
from thunderhead.lab.runs import read_runs
from thunderhead.lab.scaling_report import write_law_report


def settings(
    *,
    runs: str | list[str],
    metric: Metric,
    name: str,
    baseline: str | None = None,
    scaling: Count | None = None,
    fit_up_to: PositiveFloat | None = None,
) -> None:
    """The top-level settings, for the check.

    Args:
        runs: folders.
        metric: what is compared.
        name: the report's.
        baseline: the arm to compare with.
        scaling: fit a scaling law instead, in which N counts these parameters.
        fit_up_to: training FLOPs; the law has to predict larger runs.
    """


def commas_to_list(arguments: list[str]) -> list[str]:
    """`runs=a,b` as `runs=[a,b]`: Hydra would take the first for a sweep, and refuse it."""
    return [
        f"runs=[{argument.removeprefix('runs=')}]" if argument.startswith("runs=") and "[" not in argument else argument
        for argument in arguments
    ]


def compare_runs(config: DictConfig) -> Path:
    """Write the report of the runs in `runs` into the folder that Hydra gave this comparison.

    Raises:
        ConfigError: the configuration is refused, a folder holds no run, or no arm is called `baseline`.
    """
    folder = command_line.output_dir()
    try:
        return _compare(configuration.plain(config), folder)
    except ConfigError:
        with contextlib.suppress(OSError):  # Hydra made it before the comparison could be refused
            folder.rmdir()
            folder.parent.rmdir()
        raise


def _compare(config: dict[str, Any], folder: Path) -> Path:
    if problems := configuration.check(config, settings) or _contradictions(config):
        raise ConfigError(problems)
    folders = config["runs"].split(",") if isinstance(config["runs"], str) else config["runs"]
    try:
        runs = read_runs(path.strip() for path in folders)
    except ValueError as error:
        raise ConfigError([Problem("runs", line) for line in str(error).splitlines()]) from error
    if config["scaling"] is not None:
        return write_law_report(folder, runs, count=config["scaling"], fit_up_to=config["fit_up_to"])
    try:
        return write_report(folder, runs, baseline=config["baseline"], metric=config["metric"])
    except UnknownArmError as error:
        raise ConfigError([Problem("baseline", str(error))]) from error


def _contradictions(config: dict[str, Any]) -> list[Problem]:
    if config["scaling"] is None:
        return [] if config["fit_up_to"] is None else [Problem("fit_up_to", "is of a scaling law: add scaling=total")]
    return [
        Problem(name, "is of a comparison of arms: leave it out, or scaling")
        for name, unset in (("baseline", None), ("metric", "auto"))
        if config[name] != unset
    ]
