"""Make the arms of a sweep equal: in parameters, training FLOPs or training time.

An arm's configuration goes in, and comes out with one value solved for: the feed-forward width or the number of steps.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from thunderhead.core.module import build_decoder
from thunderhead.core.types import Count, PositiveInt, counted
from thunderhead.training.plan import Plan

Config = dict[str, Any]
Measure = Callable[[Config], float]
"""Trains a configuration for a while and gives its speed in tokens a second."""
STEPS_BUDGET = "thunderhead.training.plan.StepsBudget"


class Matched(NamedTuple):
    """What was solved for in an arm, and how well: the content of match.json (thunderhead.lab.runs.Match)."""

    by: str
    target: float
    reached: float
    set: dict[str, Any]

    @property
    def missed(self) -> float:
        """Relative to the target; above 0 = more."""
        return self.reached / self.target - 1


class Match(Protocol):
    """An option of the group `match`."""

    by: str
    solves: tuple[str, ...]  # config paths, which a sweep must not vary

    def target(self, config: Config, plan: Plan, measure: Measure) -> float:
        """What the baseline has."""
        ...

    def apply(self, config: Config, plan: Plan, target: float, measure: Measure) -> tuple[Config, Matched]:
        """An arm's configuration, changed to meet the target as closely as it can.

        Raises:
            ValueError: it cannot.
        """
        ...


@dataclass(frozen=True)
class Unmatched:
    """The arms are compared as they are."""

    by = "none"
    acts_on_sweeps = False
    solves = ()


@dataclass(frozen=True, kw_only=True)
class EqualParameters:
    """Equal parameter counts, by the feed-forward width; counted on the meta device.

    Args:
        count: which parameters: `total`, or `non_embedding` (without token and position tables and an untied head).
        multiple_of: the width is rounded to it.
    """

    count: Count
    multiple_of: PositiveInt
    by = "params"
    solves = ("model.d_ff", "activation.hidden_ratio", "activation.multiple_of")

    def target(self, config: Config, plan: Plan, measure: Measure) -> float:
        """The baseline's parameters."""
        return self._counted(plan.parameters)

    def apply(self, config: Config, plan: Plan, target: float, measure: Measure) -> tuple[Config, Matched]:
        """The width whose count is nearest: the count is linear in it."""
        if self._counted(plan.parameters) == target:
            return config, Matched(self.by, target, target, {})
        one, two = (self._parameters(_with_width(config, n), plan) for n in (self.multiple_of, 2 * self.multiple_of))
        multiples = 1 + round((target - one) / (two - one))
        if multiples < 1:
            raise ValueError(
                f"match=params cannot be met: without feed-forward layers this arm has {2 * one - two:,} parameters "
                f"already, the baseline has {target:,.0f} in all"
            )
        solved = _with_width(config, multiples * self.multiple_of)
        settings = {"model.d_ff": multiples * self.multiple_of}
        return solved, Matched(self.by, target, self._parameters(solved, plan), settings)

    def _parameters(self, config: Config, plan: Plan) -> int:
        with torch.device("meta"):
            return self._counted(build_decoder(config, plan.vocab_size, None).parameter_counts())

    def _counted(self, parameters: dict[str, int]) -> int:
        return counted(parameters, self.count)


def _with_width(config: Config, d_ff: int) -> Config:
    """With model.d_ff, and without the ratios that would contradict it."""
    unset = {name: None for name in ("hidden_ratio", "multiple_of") if name in config["activation"]}
    return {
        **config,
        "model": {**config["model"], "d_ff": d_ff},
        "activation": {**config["activation"], **unset},
    }


@dataclass(frozen=True, kw_only=True)
class EqualFlops:
    """Equal training FLOPs, by the number of steps."""

    by = "flops"
    solves = ("budget",)

    def target(self, config: Config, plan: Plan, measure: Measure) -> float:
        """The baseline's training FLOPs."""
        return plan.flops

    def apply(self, config: Config, plan: Plan, target: float, measure: Measure) -> tuple[Config, Matched]:
        """The number of steps whose FLOPs are nearest."""
        a_step = plan.flops_per_token * plan.tokens_per_step
        steps = max(1, round(target / a_step))
        return with_steps(config, steps), Matched(self.by, target, steps * a_step, {"budget.steps": steps})


@dataclass(frozen=True, kw_only=True)
class EqualTime:
    """Equal training time (without validation) on this machine, by the number of steps, from a measured speed.

    Args:
        steps: of the measured run of each arm.
    """

    steps: PositiveInt
    by = "time"
    solves = ("budget",)

    def target(self, config: Config, plan: Plan, measure: Measure) -> float:
        """The baseline's seconds, as its measured speed has it."""
        return plan.tokens / measure(with_steps(config, self.steps))

    def apply(self, config: Config, plan: Plan, target: float, measure: Measure) -> tuple[Config, Matched]:
        """The number of steps that the time allows. `reached` is a forecast until the arm has trained."""
        a_step = plan.tokens_per_step / measure(with_steps(config, self.steps))
        steps = max(1, round(target / a_step))
        return with_steps(config, steps), Matched(self.by, target, steps * a_step, {"budget.steps": steps})


def with_steps(config: Config, steps: int) -> Config:
    """A configuration that trains for a number of steps, whatever its budget was."""
    return {**config, "budget": {"_target_": STEPS_BUDGET, "steps": steps}}


def measuring_run(config: Config, steps: int) -> Config:
    """The run that measures an arm's speed: a speed each step, no checkpoints, one validation, no waiting for text."""
    return {
        **with_steps(config, steps),
        "callbacks": {},
        "logger": {"csv": {"_target_": "thunderhead.training.record.MetricsCsv"}},
        "validation": {**config["validation"], "every": steps},
        "trainer": {**config["trainer"], "log_every_n_steps": 1},
        "scheduler": {**config["scheduler"], **({"warmup": 0} if "warmup" in config["scheduler"] else {})},
        "data": {**config["data"], "max_validation_tokens": 1024},
    }


def speed(rows: list[dict[str, str]]) -> float:
    """Tokens a second: the median over the second half of the logged steps, after compilation and warm caches."""
    speeds = [float(row["tokens_per_second"]) for row in rows if row.get("tokens_per_second")]
    return statistics.median(speeds[len(speeds) // 2 :])


def to_json(matched: Matched, **changes: Any) -> dict[str, Any]:
    """The content of match.json."""
    return matched._asdict() | changes


def describe(matched: Matched) -> str:
    """One line: what was set, and by how much it misses."""
    unit = {"params": "parameters", "flops": "training FLOPs", "time": "seconds"}[matched.by]
    changes = ", ".join(f"{name}={value}" for name, value in matched.set.items()) or "unchanged"
    form = ".3g" if matched.by != "params" else ",.0f"
    missed = "exact" if abs(matched.missed) < 5e-6 else f"{matched.missed:+.3%}"
    return f"{changes} → {matched.reached:{form}} {unit} for {matched.target:{form}} ({missed})"
