"""Tune every arm of a sweep with the same effort: a bracket of multiples of its own default values.

Each trial runs to the end of its schedule. Trials use one seed, the comparison uses all: the seed on which an arm was
tuned flatters it a little, every arm alike.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from thunderhead.core.types import NonNegativeInt, PositiveFloat

Config = dict[str, Any]


@dataclass(frozen=True)
class Untuned:
    """Every arm trains with the values that its options give."""

    acts_on_sweeps = False


@dataclass(frozen=True, kw_only=True)
class Bracket:
    """The same multipliers for every arm.

    Args:
        multipliers: config path → multiples of the value that the arm has there.
        seed: of the trials; None = the first of the arm's seeds.
    """

    multipliers: dict[str, list[PositiveFloat]]
    seed: NonNegativeInt | None


class Trial(NamedTuple):
    """One point of a bracket."""

    multiplier: dict[str, float]  # by config path
    value: dict[str, float]
    config: Config


def trials(config: Config, multipliers: Mapping[str, Sequence[float]]) -> list[Trial]:
    """All points of the bracket around a configuration; a value of 0 stays 0 and has one point.

    Raises:
        ValueError: a path does not lead to a number.
    """
    axes = []
    for path, factors in multipliers.items():
        default = lookup(config, path)
        if isinstance(default, bool) or not isinstance(default, int | float):
            raise ValueError(f"tune.multipliers.{path}: the value there is {default!r}, not a number to multiply")
        axes.append([(path, factor, float(default * factor)) for factor in (factors if default else [1.0])])
    found = []
    for point in itertools.product(*axes):
        changed = config
        for path, factor, value in point:
            if factor != 1:
                changed = with_value(changed, path, value)
        found.append(Trial({p: f for p, f, _ in point}, {p: v for p, _, v in point}, changed))
    return found


def best(losses: Sequence[float | None]) -> int | None:
    """The index of the lowest finite loss, or None if there is none (failed and diverged trials have none)."""
    finite = [(loss, index) for index, loss in enumerate(losses) if loss is not None and math.isfinite(loss)]
    return min(finite)[1] if finite else None


def at_edge(trial: Trial, all_trials: Sequence[Trial]) -> list[str]:
    """Config paths in which the trial has the smallest or the largest of several multipliers."""
    edges = []
    for path, factor in trial.multiplier.items():
        factors = {other.multiplier[path] for other in all_trials}
        if len(factors) > 1 and factor in (min(factors), max(factors)):
            edges.append(path)
    return edges


def lookup(config: Config, path: str) -> Any:
    """The value at a config path; None if there is none."""
    value: Any = config
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def with_value(config: Config, path: str, value: Any) -> Config:
    """A copy with another value at a config path."""
    name, _, rest = path.partition(".")
    return {**config, name: with_value(config[name], rest, value) if rest else value}
