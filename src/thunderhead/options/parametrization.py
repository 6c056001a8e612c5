"""The parametrization group: what a model's width does to its initial weights and learning rates."""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from thunderhead.core.types import PositiveInt

Config = dict[str, Any]


class Parametrization(Protocol):
    """An option of the group `parametrization`."""

    def base(self, config: Config) -> Config | None:
        """The configuration of the model to scale from (see `thunderhead.options.growth`); None: nothing is scaled.

        Raises:
            ValueError: it cannot be derived.
        """
        ...


@dataclass(frozen=True)
class Standard:
    """Nothing depends on the width: init_std and learning rates hold as configured."""

    def base(self, config: Config) -> None:
        """None."""
        return


@dataclass(frozen=True, kw_only=True)
class MaximalUpdate:
    """muP: init_std and learning rates are those of a base model, and are scaled for the model that is trained.

    Args:
        base_d_model: width of the base model. Its n_heads and d_ff follow in proportion, so that heads keep their size.
        base_values: further values of the base model by config path: of what is given as an absolute number and yet
            grows with the width, as {attention.n_kv_heads: 2}. None is no more.
    """

    base_d_model: PositiveInt
    base_values: dict[str, Any] | None

    def base(self, config: Config) -> Config:
        """The model's configuration in the sizes of the base model."""
        return at_width(config, self.base_d_model, self.base_values, "parametrization.base_")


def at_width(config: Config, d_model: int, values: Mapping[str, Any] | None = None, prefix: str = "") -> Config:
    """A model's configuration at another width: heads of the same size, feed-forward layers in proportion.

    Args:
        config: with the group `model`, and those that `values` reaches into.
        d_model: the width.
        values: further settings by config path; they come before what is in proportion.
        prefix: what the user calls `d_model` and `values`, without these words: for errors.

    Raises:
        ValueError: heads do not fit the width, or a path in `values` leads nowhere.
    """
    model, values = config["model"], values or {}
    sizes: Config = {"model.d_model": d_model}
    if model.get("d_ff") is not None:  # match=params solves for any number: the nearest one is a base as good
        sizes["model.d_ff"] = max(1, round(model["d_ff"] * d_model / model["d_model"]))
    if "model.n_heads" not in values:
        heads, rest = divmod(model["n_heads"] * d_model, model["d_model"])
        if rest:
            raise ValueError(
                f"{prefix}d_model={d_model} is no whole number of heads of the size that model.n_heads="
                f"{model['n_heads']} gives at model.d_model={model['d_model']}: use a multiple of "
                f"{math.lcm(model['d_model'], model['n_heads']) // model['n_heads']}, or say "
                f"{prefix}values={{model.n_heads: …}}"
            )
        sizes["model.n_heads"] = heads
    for path, value in {**sizes, **values}.items():
        config = _with_value(config, path, value, f"{prefix}values: ")
    return config


def _with_value(config: Config, path: str, value: Any, said_by: str, above: str = "") -> Config:
    """A copy with another value at a config path that is there."""
    name, _, rest = path.partition(".")
    if not isinstance(config, dict) or name not in config:
        near = difflib.get_close_matches(name, config, n=1) if isinstance(config, dict) else []
        hint = f"; did you mean {above}{near[0]}?" if near else ""
        raise ValueError(f"{said_by}{above}{path} is no setting of the model{hint}")
    below = _with_value(config[name], rest, value, said_by, f"{above}{name}.") if rest else value
    return {**config, name: below}
