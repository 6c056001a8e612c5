"""`python generate.py`: a model and its tokenizer, read back from a run or an exported folder, and text from them."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from omegaconf import DictConfig

from thunderhead import command_line
from thunderhead.core import components
from thunderhead.core import config as configuration
from thunderhead.core.components import build, factory
from thunderhead.core.config import Config, ConfigError, Problem, first_line, read_mapping
from thunderhead.core.model.decoder import Decoder
from thunderhead.core.module import LanguageModel, NoAverageError
from thunderhead.core.tokenizer import Tokenizer
from thunderhead.core.tokenizer import load_tokenizer as load_kind
from thunderhead.core.trust import trust_typed
from thunderhead.core.types import PathText
from thunderhead.release.exported import ExportedModel, is_exported, load_exported
from thunderhead.release.sample import Outcome, sample_text, sample_texts
from thunderhead.terminal import complain
from thunderhead.training import hardware, record
from thunderhead.training.resume import damage, recorded_config


def settings(
    *,
    run: PathText,
    checkpoint: Literal["last", "best"] = "last",
    averaged: bool = False,
    prompts: PathText | None = None,
    json: bool = False,
    report: bool = False,
    accelerator: str = "auto",
    trust: Sequence[str] = (),
) -> None:
    """The top-level settings, for the check; conf/generate.yaml says what each does."""


class Loaded(NamedTuple):
    """What a run or an export has left, in memory."""

    decoder: Decoder | ExportedModel
    tokenizer: Tokenizer
    device: torch.device
    autocast: Callable[[], AbstractContextManager[Any]]  # to compute as the run did; of an export nothing is known


def load(resolved: Config) -> Loaded:
    """The model and tokenizer that `run`, `checkpoint`, `trust` and `accelerator` ask for, checked before.

    Raises ConfigError if there is none.
    """
    accelerator = accelerator_of(resolved)
    trust_typed(resolved)
    place, device = Path(resolved["run"]), torch.device("cuda:0" if accelerator == "cuda" else accelerator)
    if is_exported(place):
        if resolved["checkpoint"] != "last":
            raise ConfigError([Problem("checkpoint", f"{place} is an exported model, and holds one: give the run")])
        if resolved["averaged"]:
            raise ConfigError([Problem("averaged", f"{place} is an exported model, and has what was exported")])
        exported, tokenizer = load_exported(place)
        return Loaded(exported.to(device), tokenizer, device, contextlib.nullcontext)
    folder, recorded, weights = read_record(place, resolved["checkpoint"])
    tokenizer = load_tokenizer(folder)
    model = load_model(weights, resolved["averaged"]).to(device)
    precision = build(recorded["precision"])
    kind, _ = precision.resolve(accelerator)
    return Loaded(model.decoder, tokenizer, device, partial(precision.of_kind(kind).autocast, accelerator))


def accelerator_of(resolved: Config) -> str:
    """The kind of device to compute on; raises ConfigError if it is not there."""
    try:
        return hardware.resolve_accelerator(resolved["accelerator"])
    except ValueError as error:
        message = str(error).removeprefix("trainer.").replace("trainer=auto", "accelerator=auto")
        raise ConfigError([Problem("", message)]) from error


def load_model(weights: Path, averaged: bool, **more: Any) -> LanguageModel:
    """The model of a checkpoint, on the CPU; raises ConfigError if averaged weights are asked for and not there."""
    try:
        return LanguageModel.load_from_checkpoint(weights, averaged=averaged, **more)
    except NoAverageError as error:
        raise ConfigError([Problem("", str(error))]) from error


def generate_text(config: DictConfig) -> str:
    """Print and return the prompt of `generation`, or each of `prompts`, with its continuation by the model of `run`.

    On a terminal the text of one prompt appears as it is made. If no prompt was typed and stdin is a terminal, too,
    prompts are asked for until Ctrl-D, and nothing is returned.

    Raises ConfigError if the configuration is refused, or there is no model that text can be made from.
    """
    resolved = configuration.plain(config)
    if problems := components.check(resolved, settings):
        raise ConfigError(problems)
    if resolved["report"] and factory(resolved["generation"]).func is not sample_text:
        raise ConfigError([Problem("report", "measures generation=default only: leave it out")])
    prompts, where = [resolved["generation"]["prompt"]], "generation.prompt"
    if resolved["prompts"] is not None:
        prompts, where = read_prompts(Path(resolved["prompts"])), "prompts"
    given = {"generation.prompt", "prompts", "json"} & command_line.chosen(command_line.invocation_overrides())
    if given >= {"generation.prompt", "prompts"}:
        raise ConfigError([Problem("generation.prompt", "changes nothing beside prompts: put it into that file")])
    loaded = load(resolved)
    with loaded.autocast():
        if given or not (sys.stdin.isatty() and sys.stdout.isatty()):
            return _continued(loaded, resolved, prompts, where)
        for prompt in _asked():
            try:
                _continued(loaded, resolved, [prompt], "the prompt")
            except ConfigError as error:
                complain(" ".join(error.problems[0]))
    return ""


def _asked() -> Iterator[str]:
    """Lines typed at the terminal, until Ctrl-D."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - lets `input` edit lines and remember them
    with contextlib.suppress(EOFError):
        while True:
            try:
                prompt = input("prompt> ")
            except (EOFError, KeyboardInterrupt):
                print()  # what follows has a line of its own
                raise
            yield prompt


def _continued(loaded: Loaded, resolved: Config, prompts: Sequence[str], where: str) -> str:
    """Print prompts with their continuations, and return them; raises ConfigError for one that cannot be continued."""
    decoder, tokenizer, device, _ = loaded
    sampler, room, outcome = factory(resolved["generation"]), decoder.context_length, Outcome()
    try:
        longest = max(map(len, tokenizer.encode_batch(prompts)))
    except ValueError as error:  # the symbols of a synthetic task write no other text
        raise ConfigError([Problem(where, str(error))]) from error
    if sampler.keywords.get("beyond_context") == "stop" and longest >= room:
        message = f"leaves no room in the model's context ({longest:,} of {room:,} tokens): shorten it, or"
        raise ConfigError([Problem(where, f"{message} generation.beyond_context=slide")])
    streams = sampler.func is sample_text and len(prompts) == 1 and not resolved["json"] and sys.stdout.isatty()
    try:
        if sampler.func is sample_text:  # which can take all at once
            asked = {name: value for name, value in sampler.keywords.items() if name != "prompt"}
            show = partial(print, end="", flush=True) if streams else None
            texts = sample_texts(decoder, tokenizer, device, prompts, show=show, outcome=outcome, **asked)
        else:
            texts = [sampler(decoder, tokenizer, device, prompt=prompt) for prompt in prompts]
    finally:
        if streams:  # also if a signal ends it
            print(flush=True)
    text = "\n\n".join(texts)
    if resolved["json"]:
        lines = [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)]
        text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    if not streams:
        print(text, flush=True)
    if outcome.rows_cut:
        what = "the text ends" if len(prompts) == 1 else f"{outcome.rows_cut} of {len(prompts)} texts end"
        print(f"{what} at the model's context of {room:,} tokens (generation.beyond_context=stop)", file=sys.stderr)
    if resolved["report"]:
        print(outcome, file=sys.stderr)
    return text


def read_prompts(file: Path) -> list[str]:
    """Those of a file: a line each, or of .jsonl the `prompt` of each line. ConfigError if there are none.

    Lines that are empty are left out, and told.
    """
    try:
        text = file.read_bytes().decode("utf-8-sig").removesuffix("\n")
        all_lines = [line.removesuffix("\r") for line in text.split("\n")]  # splitlines would cut at U+2028, too
        lines = [line for line in all_lines if line.strip()]
        if lines and len(lines) < len(all_lines):
            empty = [str(number) for number, line in enumerate(all_lines, start=1) if not line.strip()]
            print(f"left out, as there is nothing to go on from: line {', '.join(empty)} of {file}", file=sys.stderr)
        prompts = [json.loads(line)["prompt"] for line in lines] if file.suffix == ".jsonl" else lines
        if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError("it holds no prompts: write one a line")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        wanted = 'a text file with a prompt a line, or .jsonl with {"prompt": "…"}'
        raise ConfigError(
            [Problem("prompts", f"{file} cannot be read ({first_line(error)}): give {wanted}")]
        ) from error
    return prompts


def read_record(place: Path, checkpoint: str) -> tuple[Path, Config, Path]:
    """The folder of a run, its configuration, and the file of one of its checkpoints, which `place` may be itself.

    Raises ConfigError if one is missing or damaged.
    """
    if place.is_file() and place.suffix != ".ckpt":
        raise ConfigError([Problem("run", f"{place} is no checkpoint: give the run's folder, or a .ckpt file of it")])
    if place.is_file() and checkpoint not in ("last", place.stem):
        raise ConfigError([Problem("checkpoint", f"{checkpoint!r} is not {place.name}, which run= names")])
    folder = place.parent.parent if place.is_file() else place
    recorded, weights = recorded_config(folder, "run"), folder / "checkpoints" / f"{checkpoint}.ckpt"
    weights = place if place.is_file() else weights
    if not weights.is_file():
        there = sorted(path.stem for path in weights.parent.glob("*.ckpt"))
        has = f"it has {', '.join(there)}" if there else "it has none: it did not get that far, or had callbacks=none"
        raise ConfigError([Problem("run", f"{folder} has no checkpoint {checkpoint!r}; {has}")])
    if problem := damage(weights):
        raise ConfigError([Problem("checkpoint", f"{weights} is damaged ({problem}): give another, or copy it again")])
    return folder, recorded, weights


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a run, of the kind that data.json names; raises ConfigError if it cannot be read."""
    file, data = folder / "tokenizer.json", read_mapping(folder / "data.json", "run", record.Data)
    if "tokenizer" not in data:
        raise ConfigError([Problem("run", f"{folder} has no tokenizer: its data are not of text")])
    try:
        return load_kind(data["tokenizer"]["name"], file.read_text(encoding="utf-8"))
    except Exception as error:  # missing, damaged (each library has its own error), or of another kind
        raise ConfigError([Problem("run", f"{file} cannot be read: {first_line(error)}")]) from error
