"""A run's data, built once from the groups `data`, `tokenizer` and `curation`."""

import inspect
import typing
from collections.abc import Mapping
from typing import Any

import hydra
from lightning import LightningDataModule

from thunderhead.core.config import ConfigError, Problem, _hints, build, build_all, build_offering
from thunderhead.training.problems import Problems


def build_data(config: dict[str, Any], problems: Problems) -> LightningDataModule | None:
    """Build the data module, which is asked for everything from then on; None: something refuses its settings."""
    tokenizer, kinds = None, _kinds_of_parts(config["data"])
    filters: dict[str, Any] = {}
    with problems.collect():
        filters = build_all(config["curation"]["filters"], "curation.filters", kinds.get("filters", object))
    if config.get("tokenizer") is not None:
        with problems.collect():
            tokenizer = build(config["tokenizer"])
    for name, kind in kinds.items():
        if isinstance(parts := config["data"].get(name), dict):
            with problems.collect():
                build_all(parts, f"data.{name}", kind)
    if any(problem.path.startswith("data.") or problem.message.startswith("data.") for problem in problems):
        return None
    with problems.collect():
        data = build_offering(
            config["data"],
            tokenizer=tokenizer,
            filters=filters,
            context_length=config["model"]["context_length"],
            micro_batch_size=1,  # set once more when the run is planned
            sequences_per_step=config["batch"]["global_tokens"] // config["model"]["context_length"],
            seed=config["seed"],
        )
        if not isinstance(data, LightningDataModule):
            raise ConfigError([Problem("data", "is no LightningDataModule")])
        return data
    return None


def _kinds_of_parts(node: dict[str, Any]) -> dict[str, type]:
    """Of which class the values must be of those parameters of a target that take several by name."""
    target: Any = hydra.utils.get_object(node["_target_"])
    found = {}
    for name, hint in _hints(target).items():
        for choice in (hint, *typing.get_args(hint)):
            if typing.get_origin(choice) is Mapping and inspect.isclass(kind := typing.get_args(choice)[1]):
                found[name] = kind
    return found
