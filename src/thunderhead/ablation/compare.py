"""`python compare.py`: the report of finished runs, wherever they lie."""

import contextlib
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from thunderhead import config as configuration
from thunderhead.ablation.analysis import Metric
from thunderhead.ablation.report import write_report
from thunderhead.ablation.runs import read_runs
from thunderhead.config import ConfigError, Problem


def settings(*, runs: str | list[str], metric: Metric, name: str, baseline: str | None = None) -> None:
    """The top-level settings, for the check: folders, what to compare, the report's name, the arm to compare with."""


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
    folder = configuration.output_dir()
    try:
        return _compare(configuration.plain(config), folder)
    except ConfigError:
        with contextlib.suppress(OSError):  # Hydra made it before the comparison could be refused
            folder.rmdir()
            folder.parent.rmdir()
        raise


def _compare(config: dict[str, Any], folder: Path) -> Path:
    if problems := configuration.check(config, settings):
        raise ConfigError(problems)
    folders = config["runs"].split(",") if isinstance(config["runs"], str) else config["runs"]
    try:
        runs = read_runs(path.strip() for path in folders)
    except ValueError as error:
        raise ConfigError([Problem("runs", line) for line in str(error).splitlines()]) from error
    try:
        return write_report(folder, runs, baseline=config["baseline"], metric=config["metric"])
    except ValueError as error:
        raise ConfigError([Problem("baseline", str(error))]) from error
