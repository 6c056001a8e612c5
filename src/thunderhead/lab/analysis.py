"""What a set of runs says: which arms are compared, on what, and with which result."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from thunderhead.core.config import ConfigError, Problem
from thunderhead.lab import arms as grouping
from thunderhead.lab import statistics
from thunderhead.lab.arms import Arm
from thunderhead.lab.runs import Curve, Failure, Run, looks_of
from thunderhead.lab.statistics import Comparison, Interval
from thunderhead.training import record

Metric = Literal["auto", "val_loss", "bits_per_byte", "loss_averaged"]
UNITS = {"val_loss": "nats", "bits_per_byte": "bits a byte", "loss_averaged": "nats of averaged weights"}
MOST_ARMS_IN_PAIRS = 4
"""With more arms and no baseline, all pairs would be a list that nobody reads, and cost the correction its power."""


@dataclass(kw_only=True)
class Analysis:
    """The answer, before it is written down."""

    metric: str  # a key of the summaries
    arms: list[Arm]  # that are compared, in the order in which the runs came
    reference: Arm | None  # the baseline, or the first of them
    losses: dict[str, dict[int, float]]  # final values of the metric by arm, then seed
    comparisons: list[Comparison]
    sentences: list[str]  # of the comparisons, in their order
    warnings: list[str]  # what else the runs differ in, and remarks of the caller
    left_out: list[Failure]  # runs that are not compared
    different: dict[str, list[Any]]  # config paths in which the arms differ, with each arm's value

    @property
    def unit(self) -> str:
        return UNITS[self.metric]

    @property
    def ranking(self) -> list[Arm]:
        """The arms, the lowest loss first, by the differences that the sentences tell; where seeds diverged, last."""

        def place(arm: Arm) -> tuple[bool, float]:
            against = self.against_reference(arm)
            if self.reference is None or against is None or against.n == 0:
                return arm.n_diverged > 0, self.mean(arm)
            return arm.n_diverged > 0, self.mean(self.reference) + against.mean

        return sorted(self.arms, key=place)

    def mean(self, arm: Arm) -> float:
        """An arm's final loss, over its seeds."""
        losses = self.losses[arm.name].values()
        return sum(losses) / len(losses)

    def interval(self, arm: Arm) -> Interval | None:
        """Of that mean; None where the seeds do not tell it."""
        return statistics.mean_interval(list(self.losses[arm.name].values()))

    def validation_curve(self, run: Run) -> Curve:
        """A run's way to its final loss, in this analysis' metric."""
        return run.curve("val/loss" if self.metric == "val_loss" else f"val/{self.metric}")

    def costs_to_reach(self) -> dict[str, list[tuple[float, ...]]]:
        """What each arm took to a loss that all reach, relative to the reference: tokens, FLOPs, seconds, by seed.

        Of each seed that all arms have the highest of their final losses; empty where there is none.
        """
        seeds = sorted(set.intersection(*map(set, self.losses.values()))) if len(self.losses) > 1 else []
        if self.reference is None or not seeds:
            return {}
        aims = {seed: max(by_seed[seed] for by_seed in self.losses.values()) for seed in seeds}

        def costs(arm: Arm) -> list[tuple[float, ...] | None]:
            return [self.validation_curve(arm.runs[seed]).cost_to_reach(aim) for seed, aim in aims.items()]

        base = costs(self.reference)
        return {
            arm.name: [
                tuple(mine / theirs if theirs else math.nan for mine, theirs in zip(own, other, strict=True))
                for own, other in zip(costs(arm), base, strict=True)
                if own and other
            ]
            for arm in self.arms
        }

    def names(self, kind: Callable[[Run], Iterable[str]]) -> list[str]:
        """Names that any of the compared runs has, of metrics or of loss terms."""
        return list(dict.fromkeys(name for arm in self.arms for run in arm.runs.values() for name in kind(run)))

    def against_reference(self, arm: Arm) -> Comparison | None:
        """The comparison of an arm with the reference, if there is one."""
        name = self.reference.name if self.reference else None
        return next((c for c in self.comparisons if c.arm == arm.name and c.against == name), None)


def analyse(
    runs: Sequence[Run],
    *,
    baseline: str | None = None,
    failures: Sequence[Failure] = (),
    notes: Sequence[str] = (),
    names: Mapping[Path, str] | None = None,
    metric: Metric = "auto",
    smallest_effect: float = statistics.SMALLEST_EFFECT,
) -> Analysis:
    """Compare runs; arguments and errors are those of `thunderhead.lab.report.write_report`."""
    broken = [run for run in runs if run.broken]
    arms = grouping.make_arms([run for run in runs if not run.broken], names)
    warnings, diverged = list(notes), dict[str, str]()
    left_out = [*failures, *(Failure(str(run.folder), run.broken) for run in broken)]
    for arm in arms:
        left_out += [_left_out(arm, run, str(run.unfinished)) for run in arm.incomplete]
        if n := arm.n_diverged:
            diverged[arm.name] = f"{n} of {n + len(arm.runs)} seeds of {arm.name} diverged"
            flatters = "; what is shown of the others flatters it" if arm.runs else ""
            warnings.append(f"{diverged[arm.name]}: that is its result{flatters}.")
    chosen = _metric([arm for arm in arms if arm.runs], metric)
    for arm in arms:
        if len(arm.values(chosen)) < len(arm.runs):
            left_out += [_left_out(arm, run, f"has no {chosen}") for run in arm.runs.values()]
            arm.runs = {}
    reference = _reference(arms, baseline, set((names or {}).values()), warnings)
    compared = []
    for arm in arms:
        if arm.runs and (reason := _why_not(arm, reference, chosen)):
            left_out += [_left_out(arm, run, reason) for run in arm.runs.values()]
        elif arm.runs:
            compared.append(arm)
        for seed, run in arm.runs.items():
            if told := record.changes(run.folder):
                warnings.append(
                    f"{arm.name}: seed {seed} went on with other settings than it began with ({', '.join(told)}), so it"
                    " did not train as the others."
                )
        spikes = [step for run in arm.runs.values() for step in run.result("loss_spikes") or ()]
        if spikes:
            warnings.append(f"{arm.name}: the training loss jumped in {len(spikes)} logged step(s): {spikes[:8]}.")
    if chosen != "val_loss" and metric == "auto":
        warnings.append(
            "The arms read the same text in other tokens or another context, so bits per byte are compared: losses per"
            " token cannot be."
        )

    pairs = _pairs([arm.name for arm in compared], reference.name if reference else None, baseline is not None)
    losses = {arm.name: dict(zip(arm.runs, arm.values(chosen), strict=True)) for arm in compared}
    looks = sorted(looks_of(run.folder for run in runs))
    try:
        comparisons = statistics.compare(losses, pairs, smallest_effect, diverged, looks)
    except ValueError as error:
        raise ConfigError([Problem("runs", str(error))]) from error
    if looks:
        at = ", ".join(map(str, looks))
        warnings.append(
            f"Seeds were added while they could resolve it; looks at {at} seeds were planned, and all hold at once."
        )
    by_name = {arm.name: arm for arm in compared}
    return Analysis(
        metric=chosen,
        arms=compared,
        reference=reference,
        losses=losses,
        comparisons=comparisons,
        sentences=[
            statistics.sentence(c, UNITS[chosen], _conditions(by_name[c.arm], by_name[c.against])) for c in comparisons
        ],
        warnings=warnings + grouping.warnings(compared),
        left_out=left_out,
        different=grouping.differences(arm.first.config for arm in compared),
    )


def _conditions(a: Arm, b: Arm) -> str:
    """What was equal in both arms, and what was not, for a sentence."""
    matched, unequal = grouping.listed(grouping.matched(a, b)), grouping.listed(grouping.unequal(a, b))
    told = f"matched {matched}" if matched else "budgets not matched"
    return f"{told}; {unequal}" if unequal else told


def _left_out(arm: Arm, run: Run, reason: str) -> Failure:
    return Failure(f"{arm.name} seed={run.seed} ({run.folder})", reason)


def _why_not(arm: Arm, reference: Arm | None, metric: str) -> str:
    """Why an arm cannot be compared with the reference; nothing if it can."""
    identify = grouping.validation_text if metric == "bits_per_byte" else grouping.validation_data
    if reference is None or identify(arm.first) == identify(reference.first):
        return ""
    same_text = grouping.validation_text(arm.first) == grouping.validation_text(reference.first)
    other = "in other tokens or another context" if same_text else "on other data"
    return f"validated {other} than {reference.name}: their losses say nothing about each other"


def _reference(arms: Sequence[Arm], baseline: str | None, planned: set[str], warnings: list[str]) -> Arm | None:
    """The baseline; the first arm with a result where none is given, or the given one, which was planned, has none."""
    first = next((arm for arm in arms if arm.runs), None)
    if baseline is None:
        return first
    found = [arm for arm in arms if arm.name == baseline]
    if arms and not found and baseline not in planned:
        found = [grouping.find(arms, baseline)]
    if found and found[0].runs:
        return found[0]
    instead = f"; {first.name} stands in" if first else ""
    warnings.append(f"The baseline {baseline} has no finished run{instead}.")
    return first


def _metric(arms: Sequence[Arm], metric: Metric) -> Metric:
    if metric != "auto":
        return metric
    tokens = {grouping.validation_data(arm.first) for arm in arms}
    texts = {grouping.validation_text(arm.first) for arm in arms}
    return "bits_per_byte" if len(tokens) > len(texts) else "val_loss"


def _pairs(names: Sequence[str], reference: str | None, baseline_given: bool) -> list[tuple[str, str]]:
    """(arm, against): each with the baseline, or each with those before it, those with the reference first."""
    if reference is None:
        return []
    if baseline_given or len(names) > MOST_ARMS_IN_PAIRS:
        return [(name, reference) for name in names if name != reference]
    pairs = [(name, before) for index, name in enumerate(names) for before in names[:index]]
    return sorted(pairs, key=lambda pair: pair[1] != reference)
