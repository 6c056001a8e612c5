"""`python generate.py`: a run's model and tokenizer, read back from its record."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from omegaconf import DictConfig

from thunderhead.core import config as configuration
from thunderhead.core.config import Config, ConfigError, Problem, build, factory, first_line, read_mapping
from thunderhead.core.module import GROUPS, LanguageModel
from thunderhead.core.tokenizer import Tokenizer
from thunderhead.core.tokenizer import load_tokenizer as load_kind
from thunderhead.core.trust import trust_typed
from thunderhead.core.types import PathText
from thunderhead.training import hardware
from thunderhead.training.resume import damage, recorded_config


def settings(
    *, run: PathText, checkpoint: Literal["last", "best"] = "last", accelerator: str = "auto", trust: Sequence[str] = ()
) -> None:
    """The top-level settings, for the check; conf/generate.yaml says what each does."""


def generate_text(config: DictConfig) -> str:
    """The prompt of `generation` and its continuation by the model of the run.

    Raises ConfigError if the configuration is refused, or the folder holds no run that text can be made from.
    """
    resolved = configuration.plain(config)
    if problems := configuration.check(resolved, settings):
        raise ConfigError(problems)
    try:
        accelerator = hardware.resolve_accelerator(resolved["accelerator"])
    except ValueError as error:
        message = str(error).removeprefix("trainer.").replace("trainer=auto", "accelerator=auto")
        raise ConfigError([Problem("", message)]) from error
    trust_typed(resolved)
    recorded, weights = read_record(Path(resolved["run"]), resolved["checkpoint"])
    tokenizer = load_tokenizer(Path(resolved["run"]))
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


def read_record(folder: Path, checkpoint: str) -> tuple[Config, Path]:
    """The configuration of a run, and the file of one of its checkpoints; ConfigError if one is missing or damaged."""
    recorded, weights = recorded_config(folder, "run"), folder / "checkpoints" / f"{checkpoint}.ckpt"
    if not recorded.keys() >= {*GROUPS}:
        raise ConfigError([Problem("run", f"{folder / 'config.yaml'} is not the configuration of a training run")])
    if not weights.is_file():
        there = sorted(path.stem for path in weights.parent.glob("*.ckpt"))
        has = f"it has {', '.join(there)}" if there else "it has none: it did not get that far, or had callbacks=none"
        raise ConfigError([Problem("run", f"{folder} has no checkpoint {checkpoint!r}; {has}")])
    if problem := damage(weights):
        raise ConfigError([Problem("checkpoint", f"{weights} is damaged ({problem}): give another, or copy it again")])
    return recorded, weights


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a run, of the kind that data.json names; raises ConfigError if it cannot be read."""
    file = folder / "tokenizer.json"
    try:
        return load_kind(read_mapping(folder / "data.json")["tokenizer"]["name"], file.read_text(encoding="utf-8"))
    except Exception as error:  # missing, damaged (each library has its own error), or of another kind
        raise ConfigError([Problem("run", f"{file} cannot be read: {first_line(error)}")]) from error
