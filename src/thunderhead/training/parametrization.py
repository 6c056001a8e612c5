"""The parametrization group: what a model's width does to its initial weights and learning rates."""

import difflib
import math
from dataclasses import dataclass
from typing import Any, Protocol

from thunderhead.types import PositiveInt

Config = dict[str, Any]


class Parametrization(Protocol):
    """An option of the group `parametrization`."""

    def base(self, config: Config) -> Config | None:
        """The configuration of the model to scale from (see `thunderhead.model.growth`); None: nothing is scaled.

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
            grows with the width, as {attention.n_kv_heads: 2}.
    """

    base_d_model: PositiveInt
    base_values: dict[str, Any]

    def base(self, config: Config) -> Config:
        """The model's configuration in the sizes of the base model."""
        values = self._proportional(config["model"]) | self.base_values
        for path, value in values.items():
            config = _with_value(config, path, value)
        return config

    def _proportional(self, model: Config) -> Config:
        d_model, n_heads, d_ff = model["d_model"], model["n_heads"], model.get("d_ff")
        values: Config = {"model.d_model": self.base_d_model}
        if d_ff is not None:  # match=params solves for any number: the nearest one is a base as good
            values["model.d_ff"] = max(1, round(d_ff * self.base_d_model / d_model))
        if "model.n_heads" not in self.base_values:
            heads, rest = divmod(n_heads * self.base_d_model, d_model)
            if rest:
                raise ValueError(
                    f"parametrization.base_d_model={self.base_d_model} is no whole number of heads of the size that "
                    f"model.n_heads={n_heads} gives at model.d_model={d_model}: use a multiple of "
                    f"{math.lcm(d_model, n_heads) // n_heads}, or say parametrization.base_values={{model.n_heads: …}}"
                )
            values["model.n_heads"] = heads
        return values


def _with_value(config: Config, path: str, value: Any, where: str = "") -> Config:
    """A copy with another value at a config path that is there."""
    name, _, rest = path.partition(".")
    if not isinstance(config, dict) or name not in config:
        near = difflib.get_close_matches(name, config, n=1) if isinstance(config, dict) else []
        hint = f"; did you mean {where}{near[0]}?" if near else ""
        raise ValueError(f"parametrization.base_values: {where}{path} is no setting of the model{hint}")
    return {**config, name: _with_value(config[name], rest, value, f"{where}{name}.") if rest else value}
