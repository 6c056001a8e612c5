"""`init_from=<folder or hub id>`: a model of transformers as the beginning of a run: its options, and its weights."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf

from thunderhead import extras, familiar, suggestions
from thunderhead.core import config as configuration
from thunderhead.core.config import Config, ConfigError, Problem, first_line, quoted, show, values_of
from thunderhead.core.model.decoder import Decoder
from thunderhead.core.types import PathText
from thunderhead.processes import global_rank
from thunderhead.release.exported import is_exported, read_model, refuse_damaged
from thunderhead.release.facts import facts_of
from thunderhead.release.huggingface import configured
from thunderhead.release.inverse import (
    LENGTHS,
    Options,
    Source,
    options_of,
    read_source,
    reference,
    refused,
    restored,
    settings_of,
)
from thunderhead.release.rearrange import Weights
from thunderhead.terminal import say


class Pretrained:
    """Weights to begin with, of a model of transformers whose options the run has; the seed changes none of them.

    - path: a folder with config.json and *.safetensors, as export.py writes it. It is read by a new run only.
    - architecture: its class of transformers, which export.py takes again if that can be what has become of it.
    """

    def __init__(self, *, path: PathText, architecture: str | None = None) -> None:
        self.folder = Path(path)

    def problems(self, run: Any) -> list[Problem]:
        """Options that are not the model's, a vocabulary of other tokens, and a folder that has no whole weights."""
        if run.config["resume"] is not None:  # it has weights of its own
            return []
        try:
            source = read_source(self.folder)
            options = options_of(source, min(run.context_length, source.context_length))
        except ConfigError as error:
            return error.problems
        found = self._contradictions(run, source, options) + self._other_tokens(run)
        if run.decoder_meta.growth:
            message = "would give learning rates for weights that it drew itself: use parametrization=standard"
            found.append(Problem("parametrization", f"{message} with init_from"))
        try:
            from safetensors import safe_open

            for file in (files := sorted(self.folder.glob("*.safetensors"))):
                with safe_open(file, "pt"):  # whether it is whole
                    pass
            if not files:
                raise ValueError("it has no *.safetensors")
            refuse_damaged(self.folder)
        except Exception as error:  # safetensors' own
            found.append(Problem("init_from", f"the weights in {self.folder} cannot be read: {first_line(error)}"))
        return found

    def _contradictions(self, run: Any, source: Source, options: Options) -> list[Problem]:
        found, (_, architecture, _) = [], source
        longest, asked = source.context_length, run.context_length
        if asked > longest or (asked != longest and options["position"] == "learned"):
            where = "has a learned vector for each of" if options["position"] == "learned" else "is made for"
            message = f"{asked} is not what init_from {where}: {longest} tokens: model.context_length={longest}"
            found.append(Problem("model.context_length", message))
        theirs, decoder = reference(source, options), run.decoder_meta
        if facts_of(theirs) == facts_of(decoder) and (theirs.head is None) == (decoder.head is None):
            ours, its = (settings_of(configured(architecture, each, tied=False)) for each in (decoder, theirs))
            if not [key for key in ours if key not in LENGTHS and ours[key] != its[key]]:
                return found
        wanted: Options = {}
        for path, option in options.items():
            own = values_of(path, option) if "." not in path else {}
            wanted |= {f"{path}.{key}": value for key, value in own.items()} if own else {path: option}
        for path, value in wanted.items():
            group, _, key = path.partition(".")
            now = run.config[group].get(key)
            if now != value and key not in ("vocab_multiple", "context_length", "dropout", "document_mask", "backend"):
                use = f"{group}={options[group]}" if key == "_target_" else f"{path}={show(value)}"
                found.append(Problem(path, f"{show(now)} is not what init_from has: leave it out, or give {use}"))
        return found

    def _other_tokens(self, run: Any) -> list[Problem]:
        """Whether a text would have other ids than it had when the model was trained."""
        file, tokenizer = self.folder / "tokenizer.json", getattr(run.data, "tokenizer", None)
        if not file.is_file() or tokenizer is None:
            return []
        import tokenizers

        try:
            theirs = tokenizers.Tokenizer.from_file(str(file)).get_vocab()
            wrong = len(tokenizer.as_fast().get_vocab().items() - theirs.items())
            if wrong == 0:
                return []
            message = f"{wrong:,} of its tokens are not those of init_from"
        except Exception as error:  # damaged, of a kind that has no counterpart, or not trained yet
            message = f"cannot be compared with that of init_from ({first_line(error)})"
        own = f"tokenizer=huggingface tokenizer.path={quoted(self.folder)}"
        return [Problem("tokenizer", f"{message}: leave it out, or give {own}")]

    def weights(self, decoder: Decoder) -> Weights:
        """All weights of a decoder, whole, by name. Raises ValueError if they are damaged or do not fit."""
        try:
            model = read_model(self.folder, torch.float32)
        except Exception as error:  # transformers and safetensors have errors of their own
            raise ValueError(f"init_from: the weights in {self.folder} cannot be read: {first_line(error)}") from error
        with torch.device("cpu"):
            return restored(decoder, read_source(self.folder).architecture, model.state_dict())


# --- the command line -------------------------------------------------------------------------------------------------


def with_options(arguments: Sequence[str]) -> list[str]:
    """Arguments of train.py in which `init_from=<folder or hub id>` has become options; others have the last word.

    Raises ConfigError if the folder cannot be begun with.
    """
    parse = OverridesParser.create().parse_overrides
    asked = next((a for a in arguments if a.startswith("init_from=")), None)
    try:
        typed = parse([a for a in arguments if "=" in a and not a.startswith("-")])
        place = None if asked is None else parse([asked])[0].value()
    except HydraException:  # which Hydra will say
        return [*arguments]
    resumed = next((o.value() for o in typed if o.key_or_group == "resume"), None)
    if not isinstance(place, str) or place in suggestions.options("init_from") or resumed not in (None, "auto"):
        return [*arguments]
    folder = located(place)
    source = read_source(folder)
    keys = {o.key_or_group: None if o.is_sweep_override() else o.value() for o in typed}
    asked_length = keys.get("model.context_length")
    length = min(asked_length, source.context_length) if isinstance(asked_length, int) else None
    options = options_of(source, length) | {"tokenizer": "huggingface", "tokenizer.path": str(folder)}
    other = _other_groups([str(o.input_line) for o in typed if not o.is_sweep_override()])
    other = {g for g in other if g not in keys} | {g for g in options if g in keys}
    other -= {group for group, option in options.items() if keys.get(group) == option}
    taken = {k: v for k, v in options.items() if k not in keys and k.partition(".")[0] not in other}
    overrides = [f"{path}={quoted(v) if isinstance(v, str) else show(v)}" for path, v in taken.items()]
    if global_rank() == 0:
        say(f"init_from: the {source.architecture.name} in {folder} is {' '.join(overrides)}")
    begin = arguments.index(str(asked))
    ours = [
        "init_from=pretrained",
        f"init_from.path={quoted(folder)}",
        f"init_from.architecture={source.architecture.name}",
    ]
    return [*arguments[:begin], *ours, *overrides, *arguments[begin + 1 :]]


def _other_groups(typed: Sequence[str]) -> set[str]:
    """Groups that choices of options, as of an experiment or of data, have changed."""

    def composed(overrides: Sequence[str]) -> Config:
        content = OmegaConf.to_container(configuration.compose(overrides), resolve=False)
        assert isinstance(content, dict)
        return {str(group): value for group, value in content.items()}

    chosen = [line for line in typed if (configuration.CONF_DIR / line.partition("=")[0]).is_dir()]
    try:
        before, after = composed([]), composed([line for line in chosen if not line.startswith("init_from=")])
    except HydraException:  # options of the user's own, or unknown ones, which Hydra will say
        return {line.partition("=")[0] for line in chosen}
    return {group for group in before | after if before.get(group) != after.get(group)}


def located(place: str) -> Path:
    """The folder that is meant: one that is here, or a snapshot from the hub, which is fetched after saying so."""
    folder = Path(place).expanduser()
    if is_exported(folder):
        return folder
    if (folder / "config.yaml").is_file() or folder.suffix == ".ckpt":
        if is_exported(folder / "huggingface"):
            return folder / "huggingface"
        run = folder if folder.is_dir() else folder.parent.parent
        raise refused(f"{place} is a run: go on with it by resume={place}, or python export.py run={run} first")
    if place in ("scratch", "resume"):  # nanoGPT's
        said = familiar.REMARKS.get(place) or f"type {familiar.option('init_from', place)}"
        raise refused(f"{place} is no folder here; {said}")
    if folder.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", place) or place.startswith("."):
        raise refused(f"{place} holds no config.json: give a folder of export.py, or a model of the hub as user/name")
    try:
        from huggingface_hub import constants, snapshot_download

        if global_rank() == 0:
            to = f"fetching it from the Hugging Face hub to {constants.HF_HUB_CACHE}"
            say(f"init_from: {place} is no folder here: {to}")
        return Path(snapshot_download(place, allow_patterns=["*.json", "*.safetensors"]))
    except ImportError as error:
        raise refused(f"needs transformers: {extras.install('huggingface')}") from error
    except Exception as error:  # the hub's, of the network, of the id
        message = f"{place} is no folder here, and could not be fetched from the hub: {first_line(error)}"
        raise refused(message) from error
