"""Keys of loggers from `.env` in the working directory, so that they stand in no command and no configuration."""

import itertools
import os
import shlex
from pathlib import Path

from thunderhead.core.config import ConfigError, Problem

NAMES = {
    *("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_ENTITY", "WANDB_PROJECT", "WANDB_MODE"),
    *("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"),
    *("COMET_API_KEY", "COMET_WORKSPACE", "COMET_PROJECT_NAME"),
    "HF_TOKEN",
}
"""No others: a variable of any name, as PYTHONPATH, could make the processes that we start run anything."""


def load(file: Path = Path(".env")) -> None:
    """Set the variables of `NAMES` that the file gives and the environment lacks; lines are as in a shell, without `$`.

    Raises ConfigError for a line that is not, or a file that cannot be read.
    """
    if not file.is_file():
        return
    try:
        lines = file.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError as error:
        raise ConfigError([Problem(str(file), f"cannot be read ({error.strerror})")]) from None
    for number, line in enumerate(lines, 1):
        name, _, value = line.strip().removeprefix("export ").lstrip().partition("=")
        if name not in NAMES:
            continue
        try:
            words = list(itertools.takewhile(lambda word: not word.startswith("#"), shlex.split(value)))
        except ValueError:  # no closing quotation
            words = [value, ""]
        if len(words) > 1 or value[:1].isspace():
            message = f"line {number}: the value of {name} has spaces or quotes: write {name}='…', no space after ="
            raise ConfigError([Problem(str(file), message)])
        os.environ.setdefault(name, "".join(words))
