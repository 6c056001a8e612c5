"""One run as an object of built components: made once, before anything happens, and asked by all that follows."""

import contextlib
import inspect
import random
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
from lightning import Callback, LightningDataModule, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.model_helpers import is_overridden
from torchmetrics import Metric

from thunderhead.core.components import (
    annotations,
    at,
    build,
    call,
    factory,
    having,
    of_kind,
    placed,
    setting,
    takes,
    wrong_kind,
)
from thunderhead.core.config import Config, ConfigError, Problem, first_line, show
from thunderhead.core.data.datamodule import asked
from thunderhead.core.metrics import as_metric, refuse_unknown, try_out
from thunderhead.core.model import init
from thunderhead.core.model.decoder import Decoder
from thunderhead.core.model_spec import ModelSpec
from thunderhead.core.tokenizer import Tokenizer

REFUSALS = (MisconfigurationException, ModuleNotFoundError)
"""What components of other packages say no with, beside ValueError."""
ASKED = {
    "strategy": ("name", "strategy", "data_parallel_size", "tensor_parallel_size", "gathers"),
    "precision": ("resolve", "of_kind"),
    "compile": ("resolve", "of_scope"),
    "batch": ("global_tokens", "accumulation", "micro_batch"),
    "budget": ("total_tokens",),
    "validation": ("steps",),
    "init_from": ("weights",),
    "plan": ("memory_gib", "tokens_per_day", "remarks"),
}
"""What a run asks of the options of groups whose classes are not core's."""
Result = typing.TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run. Each attribute is the built option of the group of its name, or a factory of what must wait."""

    config: Config  # as resolved, plain containers: for the record and for checkpoints, not to be asked
    folder: Path  # where the record goes
    name: str
    seed: int
    is_dry: bool
    accelerator: str  # cpu, cuda or mps
    is_here: bool  # whether this machine has it, or the run is only planned
    n_processes: int  # on this machine
    world_size: int  # on all machines
    strategy: Any  # what is divided among how many devices
    precision: Any
    compile: Any
    model: ModelSpec  # factories of decoder, optimizer and schedule
    batch: Any
    budget: Any
    validation: Any
    data: Any  # any LightningDataModule; CONTRIBUTING.md tells what it may say about itself
    metrics: Callable[[], Mapping[str, Metric]]  # makes the further metrics of validation
    trainer: Callable[..., Trainer]
    callbacks: Mapping[str, Callback]
    loggers: Mapping[str, Logger]
    generation: Callable[..., str]  # (decoder, tokenizer, device) to a sample of text
    init_from: Any  # None, or what gives a new run its weights: `weights(decoder)`, whole, by parameter name
    hardware_plan: Any  # group `plan`: what is assumed about GPUs
    _meta: dict[tuple[int, bool], Decoder] = field(default_factory=dict, compare=False, repr=False)

    @property
    def context_length(self) -> int:
        return _context_length(self.config)

    @property
    def sequences_per_step(self) -> int:
        return int(self.batch.global_tokens // self.context_length)

    @property
    def decoder_meta(self) -> Decoder:
        """The decoder on the "meta" device, for questions; built once, and again if preparing changes the vocabulary.

        Raises ValueError if components contradict each other.
        """
        vocab_size, eos_id = self.data.vocab_size, asked(self.data, "eos_id")
        if (asked_of := (vocab_size, eos_id is None)) not in self._meta:  # which token it is changes no answer
            try:
                with torch.device("meta"):
                    self._meta[asked_of] = self.model.decoder(vocab_size, eos_id)
            except RuntimeError as error:
                if "overflow" not in str(error):  # of sizes that torch cannot count
                    raise
                raise ValueError(f"model: cannot be made ({first_line(error)})") from error
        return self._meta[asked_of]

    def components(self) -> Iterator[Any]:
        """Everything that may have an opinion on what goes together, as a method `problems(run)`."""
        for name in ("strategy", "precision", "compile", "batch", "budget", "validation", "data", "hardware_plan"):
            yield getattr(self, name)
        yield from (self.init_from, *self.callbacks.values(), *self.loggers.values())
        yield from self.decoder_meta.modules()


class Problems(list[Problem]):
    """What is wrong with a configuration, found by trying: users are told everything at once."""

    @contextlib.contextmanager
    def collect(self, path: str = "") -> Iterator[None]:
        """Note what the inside, of this config path, refuses, and go on. Other errors are bugs, and stay tracebacks."""
        try:
            yield
        except ConfigError as error:
            self.note(*error.problems)
        except (ValueError, *REFUSALS) as error:
            self.note(Problem("", placed(path, first_line(error))))

    def note(self, *problems: Problem) -> None:
        """Add problems, each once: a missing path may be met twice."""
        self.extend(problem for problem in problems if problem not in self)

    def refuse(self) -> None:
        """Raise ConfigError with all problems, if there are any."""
        if self:
            raise ConfigError(self)


def build_run(config: Config, folder: Path, **machine: Any) -> Run:
    """Build the components of a run, each once, of a resolved and checked configuration; nothing is written yet.

    `machine` gives accelerator, is_here, n_processes and world_size. Raises ConfigError, which names all refusals.
    """
    problems, built = Problems(), dict[str, Any](machine, init_from=None)
    make: dict[str, Callable[[], Any]] = {
        name: partial(build, config[name]) for name in ("precision", "compile", "batch", "budget", "validation", "plan")
    }
    make["strategy"] = lambda: factory(config["strategy"])(machine["world_size"])
    make["model"] = lambda: ModelSpec.of(config)
    make |= {name: partial(factory, config[name]) for name in ("trainer", "generation")}
    make["metrics"] = lambda: build_metrics(config.get("metrics", {}))
    make["callbacks"] = lambda: build_all(config["callbacks"], "callbacks", Callback)
    make["loggers"] = lambda: build_all(config["logger"], "logger", Logger, save_dir=str(folder))
    if config.get("init_from") is not None:
        make["init_from"] = partial(build, config["init_from"])
    make["data"] = lambda: build_data(config, **_sizes(config, built["batch"]))
    for name, each in make.items():
        if name != "data" or "batch" in built:
            with problems.collect(name):
                built[name] = having(each(), *ASKED.get(name, ()))
    problems.refuse()
    scalars = {"name": config["name"], "seed": config["seed"], "is_dry": config["dry_run"]}
    return Run(config=config, folder=folder, hardware_plan=built.pop("plan"), **scalars, **built)


def build_all(nodes: Config, path: str, kind: type[Result], **supplied: Any) -> dict[str, Result]:
    """Build each node of the mapping at a config path, with those of `supplied` that it names; a built one stays.

    Raises ConfigError, which names all that refuse their settings or are no `kind`.
    """
    built, problems = {}, Problems()
    if not isinstance(nodes, dict):
        raise ConfigError([Problem(path, f"{show(nodes)} is not accepted: should be a mapping of names to settings")])
    for name, node in nodes.items():
        where, is_node = f"{path}.{name}", isinstance(node, dict) and "_target_" in node
        target = hydra.utils.get_object(node["_target_"]) if is_node else None
        is_wrong = inspect.isclass(target) and not issubclass(target, kind)  # and so is not even called
        with problems.collect(where), at(where):
            if is_wrong:
                raise ValueError(wrong_kind(target, kind))
            built[name] = of_kind(call(factory(node), **supplied) if is_node else node, kind)
    problems.refuse()
    return built


def seed_generators(seed: int) -> None:
    """Seed what has no generator of its own: Python's, NumPy's and PyTorch's."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def build_data(config: Config, *, micro_batch_size: int = 1, **sizes: int) -> LightningDataModule:
    """The data module, with those of the sizes that its signature names; the plan sets micro_batch_size again.

    Others' may draw from the global generators, as `random_split` does: they are seeded first, alike on all ranks.
    Raises ConfigError, which names all that it, its parts, the tokenizer and the filters refuse.
    """
    seed_generators(config["seed"])
    problems, kinds = Problems(), _kinds_of_parts(config["data"])
    tokenizer, filters = None, dict[str, Any]()
    with problems.collect("curation"):
        filters = build_all(config["curation"].get("filters", {}), "curation.filters", kinds.get("filters", object))
    with problems.collect("tokenizer"):
        tokenizer = of_kind(build(config["tokenizer"]), Tokenizer) if config.get("tokenizer") is not None else None
    for name, kind in kinds.items():  # tried by themselves first, so that all that is wrong with them is told
        if isinstance(parts := config["data"].get(name), dict):
            with problems.collect("data"):
                build_all(parts, f"data.{name}", kind)
    problems.refuse()
    target = factory(config["data"], "data")
    if filters and not takes(target, "filters"):
        message = f"{config['data']['_target_']} takes no filters, which would change nothing: use curation=none"
        raise ConfigError([Problem("curation", message)])
    parts = {"tokenizer": tokenizer, "filters": filters, "seed": config["seed"]}
    data = call(target, micro_batch_size=micro_batch_size, **sizes, **parts)
    if not isinstance(data, LightningDataModule):
        raise ConfigError([Problem("data", "its _target_ must be a lightning.LightningDataModule")])
    if not is_overridden("val_dataloader", data):
        message = f"{type(data).__name__} has no val_dataloader, whose loss is the result of a run"
        raise ConfigError([Problem("data", message)])
    if not hasattr(data, "vocab_size"):
        message = f"{type(data).__name__} does not say its vocab_size, which the model is built from"
        raise ConfigError([Problem("data", message)])
    if not isinstance(data.vocab_size, int) or data.vocab_size < 1:
        message = f"vocab_size is {data.vocab_size!r}: must be a whole number from 1"
        raise ConfigError([Problem("data", message)])
    return data


def _kinds_of_parts(node: Config) -> dict[str, type]:
    """Of which class the values must be of those parameters of a target that are mappings by name."""
    found = {}
    for name, hint in annotations(hydra.utils.get_object(node["_target_"])).items():
        for choice in (hint, *typing.get_args(hint)):
            if typing.get_origin(choice) is Mapping and inspect.isclass(kind := typing.get_args(choice)[1]):
                found[name] = kind
    return found


def build_metrics(nodes: Config) -> Callable[[], Mapping[str, Metric]]:
    """Makes the metrics of the group `metrics`: torchmetrics' classes, or functions; see `thunderhead.core.metrics`."""
    factories: dict[str, Any] = {name: factory(node, f"metrics.{name}") for name, node in nodes.items()}

    def made(each: Any) -> Metric:
        return as_metric(each() if inspect.isclass(each.func) else each)

    problems = Problems()
    for name, each in factories.items():  # refused now rather than later
        with problems.collect(f"metrics.{name}"):
            refuse_unknown(name, made(each))
    problems.refuse()
    return lambda: {name: made(each) for name, each in factories.items()}


def validation_metrics(data: Any, further: Callable[[], Mapping[str, Metric]]) -> Callable[[str], dict[str, Metric]]:
    """Makes all that a validation source is measured by beside the loss: the data's own, and those of `metrics`."""

    def made(source: str) -> dict[str, Metric]:
        own = {name: as_metric(metric) for name, metric in asked(data, "validation_metrics")(source).items()}
        others = further()
        if both := own.keys() & others.keys():
            raise ConfigError([Problem(f"metrics.{name}", "the data measures it: rename it") for name in both])
        return {**own, **others}

    return made


def _context_length(config: Config) -> int:
    return int(setting(factory(config["model"]), "context_length"))


def _sizes(config: Config, batch: Any) -> dict[str, int]:
    context_length = _context_length(config)
    return {"context_length": context_length, "sequences_per_step": batch.global_tokens // context_length}


def problems_of(run: Run) -> Problems:
    """What does not go together, by the components' own word, and by the decoder's."""
    problems = Problems()
    with problems.collect("model"):
        init.refuse_without_rule(run.decoder_meta)
    with problems.collect():
        for component in run.components():
            ask = getattr(component, "problems", None)
            if callable(ask):
                with problems.collect():
                    problems.note(*(ask(run) or ()))  # loggers may answer any name with None
        for name, metric in run.metrics().items():
            with problems.collect(f"metrics.{name}"):
                try_out(metric, run.decoder_meta.vocab_size)
    return problems
