"""`python generate.py`: a run's model and tokenizer, read back from its record."""

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from omegaconf import DictConfig

from thunderhead.core import config as configuration
from thunderhead.core.config import Config, ConfigError, Problem, build, factory, first_line, read_mapping
from thunderhead.core.model.decoder import Decoder
from thunderhead.core.module import GROUPS, LanguageModel
from thunderhead.core.tokenizer import Tokenizer
from thunderhead.core.tokenizer import load_tokenizer as load_kind
from thunderhead.core.trust import trust_typed
from thunderhead.core.types import PathText
from thunderhead.release.sample import sample_text, sample_texts
from thunderhead.training import hardware
from thunderhead.training.resume import damage, recorded_config


def settings(
    *,
    run: PathText,
    checkpoint: Literal["last", "best"] = "last",
    prompts: PathText | None = None,
    json: bool = False,
    accelerator: str = "auto",
    trust: Sequence[str] = (),
) -> None:
    """The top-level settings, for the check; conf/generate.yaml says what each does."""


class Loaded(NamedTuple):
    """What a run has left, in memory."""

    decoder: Decoder
    tokenizer: Tokenizer
    device: torch.device
    autocast: Callable[[], AbstractContextManager[Any]]  # to compute as the run did


def load(resolved: Config) -> Loaded:
    """The model and tokenizer of the run that `run`, `checkpoint`, `trust` and `accelerator` ask for, checked before.

    Raises ConfigError if there is none.
    """
    try:
        accelerator = hardware.resolve_accelerator(resolved["accelerator"])
    except ValueError as error:
        message = str(error).removeprefix("trainer.").replace("trainer=auto", "accelerator=auto")
        raise ConfigError([Problem("", message)]) from error
    trust_typed(resolved)
    folder, recorded, weights = read_record(Path(resolved["run"]), resolved["checkpoint"])
    tokenizer = load_tokenizer(folder)
    model = LanguageModel.load_from_checkpoint(weights).to("cuda:0" if accelerator == "cuda" else accelerator)
    precision = build(recorded["precision"])
    kind, _ = precision.resolve(accelerator)
    autocast = partial(precision.of_kind(kind).autocast, accelerator)
    return Loaded(model.decoder, tokenizer, model.device, autocast)


def generate_text(config: DictConfig) -> str:
    """The prompt of `generation`, or each of `prompts`, and its continuation by the model of the run.

    Raises ConfigError if the configuration is refused, or there is no run that text can be made from.
    """
    resolved = configuration.plain(config)
    if problems := configuration.check(resolved, settings):
        raise ConfigError(problems)
    prompts, where = [resolved["generation"]["prompt"]], "generation.prompt"
    if resolved["prompts"] is not None:
        prompts, where = read_prompts(Path(resolved["prompts"])), "prompts"
    decoder, tokenizer, device, autocast = load(resolved)
    try:
        tokenizer.encode_batch(prompts)
    except ValueError as error:  # the symbols of a synthetic task write no other text
        raise ConfigError([Problem(where, str(error))]) from error
    sampler = factory(resolved["generation"])
    with autocast():
        if sampler.func is sample_text:  # which can take all at once
            asked = {name: value for name, value in sampler.keywords.items() if name != "prompt"}
            texts = sample_texts(decoder, tokenizer, device, prompts, **asked)
        else:
            texts = [sampler(decoder, tokenizer, device, prompt=prompt) for prompt in prompts]
    if not resolved["json"]:
        return "\n\n".join(texts)
    lines = [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)]
    return "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)


def read_prompts(file: Path) -> list[str]:
    """Those of a file: a line each, or of .jsonl the `prompt` of each line. ConfigError if there are none."""
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        prompts = [json.loads(line)["prompt"] for line in lines] if file.suffix == ".jsonl" else lines
        if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError("it holds no prompts: write one a line")
    except (OSError, ValueError, KeyError, TypeError) as error:
        wanted = 'a text file with a prompt a line, or .jsonl with {"prompt": "…"}'
        raise ConfigError(
            [Problem("prompts", f"{file} cannot be read ({first_line(error)}): give {wanted}")]
        ) from error
    return prompts


def read_record(place: Path, checkpoint: str) -> tuple[Path, Config, Path]:
    """The folder of a run, its configuration, and the file of one of its checkpoints, which `place` may be itself.

    Raises ConfigError if one is missing or damaged.
    """
    folder = place.parent.parent if place.is_file() else place
    recorded, weights = recorded_config(folder, "run"), folder / "checkpoints" / f"{checkpoint}.ckpt"
    weights = place if place.is_file() else weights
    if not recorded.keys() >= {*GROUPS}:
        raise ConfigError([Problem("run", f"{folder / 'config.yaml'} is not the configuration of a training run")])
    if not weights.is_file():
        there = sorted(path.stem for path in weights.parent.glob("*.ckpt"))
        has = f"it has {', '.join(there)}" if there else "it has none: it did not get that far, or had callbacks=none"
        raise ConfigError([Problem("run", f"{folder} has no checkpoint {checkpoint!r}; {has}")])
    if problem := damage(weights):
        raise ConfigError([Problem("checkpoint", f"{weights} is damaged ({problem}): give another, or copy it again")])
    return folder, recorded, weights


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a run, of the kind that data.json names; raises ConfigError if it cannot be read."""
    file = folder / "tokenizer.json"
    try:
        return load_kind(read_mapping(folder / "data.json")["tokenizer"]["name"], file.read_text(encoding="utf-8"))
    except Exception as error:  # missing, damaged (each library has its own error), or of another kind
        raise ConfigError([Problem("run", f"{file} cannot be read: {first_line(error)}")]) from error
