"""Make the arms of a sweep equal: in parameters, training FLOPs or training time.

An arm's configuration goes in, and comes out with one value solved for: the feed-forward width or the number of steps.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from thunderhead.core.config import Config, Problem, values_of
from thunderhead.core.model_spec import build_decoder
from thunderhead.core.types import Count, PositiveInt, counted
from thunderhead.lab.jobs import Plan
from thunderhead.lab.runs import Match

Measure = Callable[[Config], float]
"""Trains a configuration for a while and gives its speed in tokens a second."""
USUAL = (1, 8)
"""Width of the feed-forward layer by that of the model: LLaMA has 8/3, GPT 4, Gemma (2403.08295) 8."""


class Matching(Protocol):
    """An option of the group `match`; a subclass of this.

    - by: its name, for records. unit: of what it makes equal.
    - solves: config paths that it sets, which a sweep must not vary; one that solves for nothing is not asked.
    - measures: whether it needs the speed of the arms, which only their training tells.
    """

    by: str
    unit: str
    solves: Sequence[str]
    measures: bool = False

    def target(self, config: Config, plan: Plan, measure: Measure) -> float:
        """What the baseline has."""
        ...

    def apply(self, config: Config, plan: Plan, target: float, measure: Measure) -> tuple[Config, Match]:
        """An arm's configuration, changed to meet the target as closely as it can; ValueError if it cannot."""
        ...

    def problems(self, run: Any) -> list[Problem]:
        """A single run has no arms."""
        return [Problem("match", "acts on the arms of a sweep, and this is a single run: add -m or match=none")]


@dataclass(frozen=True)
class Unmatched:
    """The arms are compared as they are."""

    by = "none"
    solves = ()


@dataclass(frozen=True, kw_only=True)
class EqualParameters(Matching):
    """Equal parameter counts (on the meta device), by the feed-forward width, which is rounded to `multiple_of`."""

    count: Count
    multiple_of: PositiveInt
    by = "params"
    unit = "parameters"
    solves = ("model.d_ff", "activation.hidden_ratio", "activation.multiple_of")

    def target(self, config: Config, plan: Plan, measure: Measure) -> float:
        return counted(plan.parameters, self.count)

    def apply(self, config: Config, plan: Plan, target: float, measure: Measure) -> tuple[Config, Match]:
        """The width whose count is nearest: the count is linear in it."""
        if counted(plan.parameters, self.count) == target:
            return config, Match(self.by, target, target, {})
        one, two = (self._parameters(_with_width(config, n), plan) for n in (self.multiple_of, 2 * self.multiple_of))
        multiples = 1 + round((target - one) / (two - one))
        if multiples < 1:
            raise ValueError(
                f"match=params cannot be met: without feed-forward layers this arm has {2 * one - two:,} parameters "
                f"already, the baseline has {target:,.0f} in all"
            )
        width = multiples * self.multiple_of
        solved = _with_width(config, width)
        return solved, Match(self.by, target, self._parameters(solved, plan), {"model.d_ff": width})

    def _parameters(self, config: Config, plan: Plan) -> int:
        with torch.device("meta"):
            return counted(build_decoder(config, plan.vocab_size, None).parameter_counts(), self.count)


def _with_width(config: Config, d_ff: int) -> Config:
    """With model.d_ff, and without the ratios that would contradict it."""
    unset = {name: None for name in ("hidden_ratio", "multiple_of") if name in config["activation"]}
    model = {**config["model"], "d_ff": d_ff}
    return {**config, "model": model, "activation": {**config["activation"], **unset}}


class _BySteps(Matching):
    """Equal in what every step of an arm costs as much of."""

    solves = ("budget",)

    def of_a_step(self, config: Config, plan: Plan, measure: Measure) -> float:
        raise NotImplementedError

    def target(self, config: Config, plan: Plan, measure: Measure) -> float:
        return plan.steps * self.of_a_step(config, plan, measure)

    def apply(self, config: Config, plan: Plan, target: float, measure: Measure) -> tuple[Config, Match]:
        of_a_step = self.of_a_step(config, plan, measure)
        steps = max(1, round(target / of_a_step))
        return with_steps(config, steps), Match(self.by, target, steps * of_a_step, {"budget.steps": steps})


@dataclass(frozen=True, kw_only=True)
class EqualFlops(_BySteps):
    """Equal training FLOPs, by the number of steps."""

    by = "flops"
    unit = "training FLOPs"

    def of_a_step(self, config: Config, plan: Plan, measure: Measure) -> float:
        return plan.flops_per_token * plan.tokens_per_step


@dataclass(frozen=True, kw_only=True)
class EqualTime(_BySteps):
    """Equal training time (without validation) on this machine, by the number of steps, from a measured speed.

    What an arm reaches is a forecast until it has trained. `steps` are those of the measured run of each arm.
    """

    steps: PositiveInt
    by = "time"
    unit = "seconds"
    measures = True

    def of_a_step(self, config: Config, plan: Plan, measure: Measure) -> float:
        return plan.tokens_per_step / measure(with_steps(config, self.steps))


def with_steps(config: Config, steps: int) -> Config:
    """A configuration that trains for a number of steps, whatever its budget was."""
    return {**config, "budget": values_of("budget", "steps") | {"steps": steps}}


def measuring_run(config: Config, steps: int) -> Config:
    """The run that measures an arm's speed: a speed each step, no checkpoints, one validation, no waiting for text."""
    csv = {"csv": {"_target_": "thunderhead.training.record.MetricsCsv"}}
    short = {**with_steps(config, steps), "callbacks": {}, "logger": csv, "sample": False}
    short["validation"] = {**config["validation"], "every": steps}
    short["trainer"] = {**config["trainer"], "log_every_n_steps": 1}
    for group, name, value in (("scheduler", "warmup", 0), ("data", "max_validation_tokens", 1024)):
        if name in config[group]:
            short[group] = {**config[group], name: value}
    return short


def speed(rows: Sequence[dict[str, float]]) -> float:
    """Tokens a second: the median over the second half of the logged steps, after compilation and warm caches."""
    speeds = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
    return statistics.median(speeds[len(speeds) // 2 :])


def odd(config: Config, match: Match) -> str:
    """What nobody would have chosen: a width that was solved for, and lies outside of USUAL. Nothing if all is well."""
    d_ff, d_model = match.set.get("model.d_ff"), config["model"]["d_model"]
    if d_ff is None or USUAL[0] <= d_ff / d_model <= USUAL[1]:
        return ""
    return (
        f"match={match.by} makes model.d_ff {d_ff:,}, {d_ff / d_model:.2g} × d_model: that may be what is measured. "
        f"Models have {USUAL[0]} to {USUAL[1]} ×; make the arms more alike, or match=flops"
    )


def describe(match: Match, unit: str) -> str:
    """One line: what was set, and by how much it misses."""
    changes = ", ".join(f"{name}={value}" for name, value in match.set.items()) or "unchanged"
    form = ".3g" if unit != "parameters" else ",.0f"
    missed = "exact" if abs(match.missed) < 5e-6 else f"{match.missed:+.3%}"
    return f"{changes} → {match.reached:{form}} {unit} for {match.target:{form}} ({missed})"
