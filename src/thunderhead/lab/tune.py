"""Tune every arm of a sweep with the same effort: a bracket of multiples of its own default values.

Each trial runs to the end of its schedule, on a seed that is not compared: on one that is, the best of several trials
would flatter the arm whose loss varies most, or that has most trials.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from thunderhead.core.config import Config, Problem, leaves, set_value
from thunderhead.core.types import NonNegativeInt, PositiveFloat


@dataclass(frozen=True)
class Untuned:
    """Every arm trains with the values that its options give."""

    multipliers: ClassVar[dict[str, list[float]]] = {}


@dataclass(frozen=True, kw_only=True)
class Bracket:
    """The same multiples, by config path, of the value that each arm has there.

    `seed` is of the trials; None = the lowest that no run of the sweep has.
    """

    multipliers: dict[str, list[PositiveFloat]]
    seed: NonNegativeInt | None

    def problems(self, run: Any) -> list[Problem]:
        """A single run has no arms."""
        return [Problem("tune", "acts on the arms of a sweep, and this is a single run: add -m or tune=none")]


class Trial(NamedTuple):
    """One point of a bracket."""

    multiplier: dict[str, float]  # by config path
    value: dict[str, float]
    config: Config


def trials(
    config: Config, multipliers: Mapping[str, Sequence[float]], others: Mapping[str, float] | None = None
) -> list[Trial]:
    """All points of the bracket around a configuration, as many for each arm of a sweep.

    Where its value is 0, multiples of what `others` have there by path, with 0 in place of the smallest; if they have
    nothing but 0, that is the one point. ValueError if a path does not lead to a number.
    """
    axes, values, others = [], dict(leaves(config)), others or {}
    for path, factors in multipliers.items():
        default = values.get(path)
        if isinstance(default, bool) or not isinstance(default, int | float):
            raise ValueError(f"tune.multipliers.{path}: the value there is {default!r}, not a number to multiply")
        if default:
            axes.append([(path, factor, float(default * factor)) for factor in factors])
        elif other := others.get(path):
            tried = [0.0 if factor == min(factors) else factor for factor in factors]
            axes.append([(path, factor, float(other * factor)) for factor in tried])
        else:
            axes.append([(path, 1.0, 0.0)])
    found = []
    for point in itertools.product(*axes):
        trial = Trial({path: factor for path, factor, _ in point}, {path: value for path, _, value in point}, config)
        found.append(trial._replace(config=with_values(config, trial)))
    return found


def with_values(config: Config, trial: Trial) -> Config:
    """A configuration with a trial's values; those that it has stay as they are."""
    values = dict(leaves(config))
    for path, value in trial.value.items():
        config = config if values[path] == value else set_value(config, path, value)
    return config


def nonzero(configs: Iterable[Config], paths: Iterable[str]) -> dict[str, float]:
    """By path, the first value that is a number other than 0."""
    found: dict[str, float] = {}
    for values in map(dict, map(leaves, configs)):
        for path in paths:
            if isinstance(value := values.get(path), int | float) and value and not isinstance(value, bool):
                found.setdefault(path, value)
    return found


def best(losses: Sequence[float | None]) -> int | None:
    """The index of the lowest finite loss, or None if there is none (failed and diverged trials have none)."""
    finite = [(loss, index) for index, loss in enumerate(losses) if loss is not None and math.isfinite(loss)]
    return min(finite)[1] if finite else None


def at_edge(trial: Trial, all_trials: Sequence[Trial]) -> list[str]:
    """Config paths in which the trial has the smallest or the largest of several multipliers, and not 0."""
    tried = {path: {other.multiplier[path] for other in all_trials} for path in trial.multiplier}
    several = {path: factors for path, factors in tried.items() if len(factors) > 1}
    return [path for path, found in several.items() if trial.multiplier[path] in (min(found) or None, max(found))]
