"""One run as an object of built components: made once, before anything happens, and asked by all that follows."""

import contextlib
import inspect
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import torch
from lightning import Callback, LightningDataModule, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import Logger
from torchmetrics import Metric

from thunderhead.core.config import (
    Config,
    ConfigError,
    Problem,
    annotations,
    build,
    build_all,
    call,
    factory,
    first_line,
    placed,
    setting,
    takes,
)
from thunderhead.core.data.datamodule import asked
from thunderhead.core.metrics import as_metric, refuse_unknown, try_out
from thunderhead.core.model.decoder import Decoder
from thunderhead.core.module import ModelSpec

REFUSALS = (MisconfigurationException, ModuleNotFoundError)
"""What components of other packages say no with, beside ValueError."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run. Each attribute is the built option of the group of its name, or a factory of what must wait.

    Args:
        config: as resolved, plain containers: for the record and for checkpoints, not to be asked.
        folder: where the record goes.
        accelerator: cpu, cuda or mps; is_here: whether this machine has it, or the run is only planned.
        n_processes: on this machine; world_size: on all.
        strategy: what is divided among how many devices.
        model: factories of decoder, optimizer and schedule.
        data: any LightningDataModule; see CONTRIBUTING.md for what it may say about itself.
        metrics: makes the further metrics of validation.
        trainer: makes Lightning's Trainer from what is worked out.
        generation: (decoder, tokenizer, device) to a sample of text.
        hardware_plan: what the plan assumes about GPUs (group `plan`).
    """

    config: Config
    folder: Path
    name: str
    seed: int
    is_dry: bool
    accelerator: str
    is_here: bool
    n_processes: int
    world_size: int
    strategy: Any
    precision: Any
    compile: Any
    model: ModelSpec
    batch: Any
    budget: Any
    validation: Any
    data: Any  # a LightningDataModule
    metrics: Callable[[], Mapping[str, Metric]]
    trainer: Callable[..., Trainer]
    callbacks: Mapping[str, Callback]
    loggers: Mapping[str, Logger]
    generation: Callable[..., str]
    hardware_plan: Any
    _meta: dict[tuple[int, int | None], Decoder] = field(default_factory=dict, compare=False, repr=False)

    @property
    def context_length(self) -> int:
        return _context_length(self.config)

    @property
    def sequences_per_step(self) -> int:
        return int(self.batch.global_tokens // self.context_length)

    @property
    def decoder_meta(self) -> Decoder:
        """The decoder on the "meta" device, for questions; built once, and again if preparing changes the vocabulary.

        Raises:
            ValueError: components contradict each other.
        """
        sizes = self.data.vocab_size, asked(self.data, "eos_id")
        if sizes not in self._meta:
            with torch.device("meta"):
                self._meta[sizes] = self.model.decoder(*sizes)
        return self._meta[sizes]

    def components(self) -> Iterator[Any]:
        """Everything that may have an opinion on what goes together, as a method `problems(run)`."""
        for name in ("strategy", "precision", "compile", "batch", "budget", "validation", "data", "hardware_plan"):
            yield getattr(self, name)
        yield from (*self.callbacks.values(), *self.loggers.values())
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


def build_run(config: Config, folder: Path, **machine: Any) -> Run:
    """Build the components of a run, each once.

    Args:
        config: resolved and checked, plain containers.
        folder: where the record will go; nothing is written yet.
        machine: `accelerator`, `is_here`, `n_processes` and `world_size`.

    Raises:
        ConfigError: components refuse their settings; names all.
    """
    problems, built = Problems(), dict[str, Any](machine)

    def collect(name: str, make: Callable[[], Any], group: str | None = None) -> None:
        with problems.collect(group or name):
            built[name] = make()

    for group in ("precision", "compile", "batch", "budget", "validation"):
        collect(group, lambda group=group: build(config[group]))  # type: ignore[misc]
    collect("hardware_plan", lambda: build(config["plan"]), "plan")
    collect("strategy", lambda: factory(config["strategy"])(machine["world_size"]))
    collect("model", lambda: ModelSpec.of(config))
    collect("trainer", lambda: factory(config["trainer"]))
    collect("generation", lambda: factory(config["generation"]))
    collect("metrics", lambda: build_metrics(config.get("metrics", {})))
    collect("callbacks", lambda: build_all(config["callbacks"], "callbacks", Callback, REFUSALS))
    save_dir = str(folder)
    collect("loggers", partial(build_all, config["logger"], "logger", Logger, REFUSALS, save_dir=save_dir), "logger")  # type: ignore[type-abstract]
    if "batch" in built:
        context_length, batch = _context_length(config), built["batch"]
        sizes = {"context_length": context_length, "sequences_per_step": batch.global_tokens // context_length}
        collect("data", lambda: build_data(config, **sizes))
    if problems:
        raise ConfigError(problems)
    scalars = {"name": config["name"], "seed": config["seed"], "is_dry": config["dry_run"]}
    return Run(config=config, folder=folder, **scalars, **built)


def build_data(
    config: Config, *, context_length: int, sequences_per_step: int, micro_batch_size: int = 1
) -> LightningDataModule:
    """The data module, with those of these values that its signature names; the plan sets micro_batch_size again.

    Raises:
        ConfigError: it, its parts, the tokenizer or the filters refuse their settings; names all.
    """
    problems, kinds, tokenizer = Problems(), _kinds_of_parts(config["data"]), None
    filters: Config = {}
    with problems.collect():
        filters = build_all(config["curation"]["filters"], "curation.filters", kinds.get("filters", object))
    if config.get("tokenizer") is not None:
        with problems.collect():
            tokenizer = build(config["tokenizer"])
    for name, kind in kinds.items():  # tried by themselves first, so that all that is wrong with them is told
        if isinstance(parts := config["data"].get(name), dict):
            with problems.collect():
                build_all(parts, f"data.{name}", kind)
    if problems:
        raise ConfigError(problems)
    target = factory(config["data"], "data")
    if filters and not takes(target, "filters"):
        message = f"{config['data']['_target_']} takes no filters, which would change nothing: use curation=none"
        raise ConfigError([Problem("curation", message)])
    data = call(
        target,
        tokenizer=tokenizer,
        filters=filters,
        context_length=context_length,
        micro_batch_size=micro_batch_size,
        sequences_per_step=sequences_per_step,
        seed=config["seed"],
    )
    if not isinstance(data, LightningDataModule):
        raise ConfigError([Problem("data", "its _target_ must be a lightning.LightningDataModule")])
    if not hasattr(data, "vocab_size"):
        message = f"{type(data).__name__} does not say its vocab_size, which the model is built from"
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
    if problems:
        raise ConfigError(problems)
    return lambda: {name: made(each) for name, each in factories.items()}


def _context_length(config: Config) -> int:
    return int(setting(factory(config["model"]), "context_length"))


def problems_of(run: Run) -> Problems:
    """What does not go together, by the components' own word, and by the decoder's."""
    problems = Problems()
    with problems.collect():
        for component in run.components():
            ask = getattr(component, "problems", None)
            if callable(ask):
                with problems.collect():
                    problems.note(*ask(run))
        for name, metric in run.metrics().items():
            with problems.collect(f"metrics.{name}"):
                try_out(metric, run.decoder_meta.vocab_size)
    return problems
