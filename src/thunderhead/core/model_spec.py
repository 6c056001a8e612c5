"""ModelSpec: what a LanguageModel is made of, as factories with the settings of their groups."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, Self

import torch
from torch.optim import Optimizer

from thunderhead.core.components import at, build, factory, having, of_kind, results
from thunderhead.core.config import Config, first_line
from thunderhead.core.environment import texts
from thunderhead.core.model.decoder import Decoder

COMPONENTS = ("attention", "position", "activation", "norm", "dropout", "block", "loss", "activation_checkpointing")
"""Groups whose nodes are factories that the decoder itself calls."""
GROUPS = ("model", *COMPONENTS, "optimizer", "scheduler", "parameter_groups", "parametrization")
"""Groups that a LanguageModel is made of, and that a checkpoint keeps."""


@dataclass(frozen=True)
class ModelSpec:
    """What a LanguageModel is made of: factories with their settings."""

    config: Config  # the groups in GROUPS as plain containers, for checkpoints
    decoder: Callable[[int, int | None], Decoder]  # of (vocabulary, EOS token or None); weights are not yet drawn
    optimizer: Callable[[Decoder], Optimizer]  # over the decoder's parameter groups
    schedule: Callable[[int, int], float]  # (step from 0, total steps) to the factor of the peak learning rate

    @classmethod
    def of(cls, config: Config) -> Self:
        """Build the factories of a resolved configuration. Raises ValueError, which names the config paths."""
        config = {group: texts(config[group], str) for group in GROUPS}
        return cls(config, decoder_factory(config), optimizer_factory(config), _schedule(config["scheduler"]))


def _schedule(node: Config) -> Callable[[int, int], float]:
    """A function with its settings, or an object of a class, which is called."""
    made = factory(node, "scheduler")
    schedule = made() if inspect.isclass(made.func) else made
    try:
        inspect.signature(schedule).bind(0, 1)
    except TypeError as error:
        raise ValueError(f"scheduler: is called with step and total_steps, and takes others ({error})") from None
    return schedule


def decoder_factory(config: Config) -> Callable[[int, int | None], Decoder]:
    """Of the groups `model`, COMPONENTS and `parametrization`; see `ModelSpec`."""

    def assembled(config: Config) -> Callable[[int, int | None], Decoder]:
        target = factory(config["model"])
        kinds = results(target.func)
        parts = {name: at(name)(_checked(factory(config[name], name), kinds.get(name))) for name in COMPONENTS}
        made = partial(target, **parts)
        return lambda vocab_size, eos_id: made(tokenizer_vocab_size=vocab_size, eos_id=eos_id)

    parametrization, make = _parametrization(config), assembled(config)
    base_config = parametrization.base({name: config[name] for name in ("model", *COMPONENTS)})
    if base_config is None:
        return make
    make_base = assembled(base_config)

    def scaled(vocab_size: int, eos_id: int | None) -> Decoder:
        decoder = make(vocab_size, eos_id)
        try:
            with torch.device("meta"):
                parametrization.scale(decoder, make_base(vocab_size, eos_id))
        except ValueError as error:
            raise ValueError(
                f"parametrization: the base model (model.d_model={base_config['model']['d_model']}) cannot be made: "
                f"{error} (change parametrization.base_d_model, or set its values in parametrization.base_values)"
            ) from error
        return decoder

    return scaled


def _checked(make: Callable[..., Any], kind: Any) -> Callable[..., Any]:
    """A factory, with its signature, of what must be of a kind."""

    @wraps(make)
    def made(*args: Any, **kwargs: Any) -> Any:
        return of_kind(make(*args, **kwargs), kind)

    return made


def _parametrization(config: Config) -> Any:
    with at("parametrization"):
        return having(build(config["parametrization"]), "base", "scale", "scale_learning_rates")


def optimizer_factory(config: Config) -> Callable[[Decoder], Optimizer]:
    """Of the groups `parameter_groups`, `optimizer` and `parametrization`; see `ModelSpec`."""
    make_groups, make = factory(config["parameter_groups"]), factory(config["optimizer"])
    parametrization = _parametrization(config)

    def optimizer(decoder: Decoder) -> Optimizer:
        groups = make_groups(decoder)
        with at("optimizer"):  # torch's and others' own words do not say where
            try:
                made: Optimizer = of_kind(make(groups), Optimizer)
            except RuntimeError as error:  # torch's word on settings that exclude each other
                raise ValueError(first_line(error)) from error
        stepped = {id(parameter) for group in made.param_groups for parameter in group["params"]}
        if left := [name for name, p in decoder.named_parameters() if p.requires_grad and id(p) not in stepped]:
            also = f" and {len(left) - 1} more" if len(left) > 1 else ""
            raise ValueError(f"parameter_groups: {left[0]}{also} would never be trained: each belongs in one group")
        parametrization.scale_learning_rates(made, decoder)
        return made

    return optimizer


def build_decoder(config: Config, vocab_size: int, eos_id: int | None) -> Decoder:
    """The decoder that a resolved configuration describes, with weights not yet drawn."""
    return decoder_factory(config)(vocab_size, eos_id)


def build_optimizer(config: Config, decoder: Decoder) -> Optimizer:
    """The optimizer that a resolved configuration describes, over a decoder's parameter groups."""
    return optimizer_factory(config)(decoder)
