"""`python generate.py`: a run's model and tokenizer, read back from its record."""

from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import DictConfig

from thunderhead.core import config as configuration
from thunderhead.core.config import ConfigError, Problem, build, factory
from thunderhead.core.module import GROUPS, LanguageModel
from thunderhead.core.tokenizer import Tokenizer
from thunderhead.core.tokenizer import load_tokenizer as load_kind
from thunderhead.training import hardware
from thunderhead.training.record import read_json


def settings(*, run: str, checkpoint: Literal["last", "best"] = "last", accelerator: str = "auto") -> None:
    """The top-level settings, for the check: the run's folder, which of its checkpoints, and on what to compute."""


def generate_text(config: DictConfig) -> str:
    """The prompt of `generation` and its continuation by the model of the run.

    Raises:
        ConfigError: the configuration is refused, or the folder holds no run that text can be made from.
    """
    resolved = configuration.plain(config)
    if problems := configuration.check(resolved, settings):
        raise ConfigError(problems)
    try:
        accelerator = hardware.resolve_accelerator(resolved["accelerator"])
    except ValueError as error:
        raise ConfigError(
            [Problem("", str(error).replace("trainer=auto", "accelerator=auto").removeprefix("trainer."))]
        ) from error
    recorded, weights = read_record(Path(resolved["run"]), resolved["checkpoint"])
    tokenizer = load_tokenizer(recorded, Path(resolved["run"]))
    try:
        tokenizer.encode(resolved["generation"]["prompt"])
    except ValueError as error:  # the symbols of a synthetic task write no other text
        raise ConfigError([Problem("generation.prompt", str(error))]) from error
    model = LanguageModel.load_from_checkpoint(weights).to("cuda:0" if accelerator == "cuda" else accelerator)
    precision = build(recorded["precision"])
    kind, _ = precision.resolve(accelerator)
    with precision.of_kind(kind).autocast(accelerator):
        text: str = factory(resolved["generation"])(model.decoder, tokenizer, model.device)
    return text


def read_record(folder: Path, checkpoint: str) -> tuple[dict[str, Any], Path]:
    """The configuration of a run, and the file of one of its checkpoints.

    Raises:
        ConfigError: the folder is no run's, or the run has no such checkpoint.
    """
    file, weights = folder / "config.yaml", folder / "checkpoints" / f"{checkpoint}.ckpt"
    if not file.is_file():
        message = f"{folder} is no run folder (it has no config.yaml): give one of logs/runs/<name>/<time>"
        raise ConfigError([Problem("run", message)])
    recorded = yaml.safe_load(file.read_text())
    if not isinstance(recorded, dict) or not set(GROUPS) <= {*recorded}:
        raise ConfigError([Problem("run", f"{file} is not the configuration of a training run")])
    if not weights.is_file():
        there = sorted(path.stem for path in weights.parent.glob("*.ckpt"))
        has = f"it has {', '.join(there)}" if there else "it has none: it did not get that far, or had callbacks=none"
        raise ConfigError([Problem("run", f"{folder} has no checkpoint {checkpoint!r}; {has}")])
    return recorded, weights


def load_tokenizer(recorded: dict[str, Any], folder: Path) -> Tokenizer:
    """The tokenizer of a run.

    Raises:
        ConfigError: tokenizer.json is not in the run's folder, or is of another kind.
    """
    if "task" in recorded["data"]:
        return build(recorded["data"]["task"]).load_tokenizer()  # type: ignore[no-any-return]
    file = folder / "tokenizer.json"
    try:
        if recorded.get("tokenizer") is None:  # prepared shards brought theirs
            kind = read_json(folder / "data.json")["tokenizer"]["name"]
            return load_kind(kind, file.read_text())
        tokenizer: Tokenizer = factory(recorded["tokenizer"]).func.from_json(file.read_text())  # type: ignore[attr-defined]
    except Exception as error:  # missing, damaged (each library has its own error), or of another kind
        raise ConfigError([Problem("run", f"{file} cannot be read: {str(error).splitlines()[0]}")]) from error
    return tokenizer
