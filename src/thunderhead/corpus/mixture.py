"""Which sample of which source is sample n of a run: a function of weights and limits, in closed form for any n.

Sources take turns by the divisor method of Webster and Sainte-Laguë, which gives seats to parties: the next sample is
of the source with the highest weight / (2 · samples so far + 1). So at any n each source has its weight's share to
within about one sample (|count - share · n| ≤ ½ + share · sources / 2), evenly spread. Counts after n samples follow
without going through these: of a source whose samples are due at (i + ½) / share, about share · n + ½ are.
"""

import bisect
import heapq
import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from fractions import Fraction
from typing import Any, Literal, NamedTuple

from thunderhead.core.data.datamodule import Entry
from thunderhead.core.data.order import Order, Sample, spread
from thunderhead.corpus.sources import Share

AtMaxEpochs = Literal["redistribute", "stop"]
_WINDOW = 1024  # samples whose turns are worked out at once


class Stage(NamedTuple):
    """From sample `first` on, sources have these weights."""

    first: int
    weights: dict[str, float]


class Phase(NamedTuple):
    """From sample `first` on, sources take turns by fixed weights, after `taken` samples of each."""

    first: int
    taken: dict[str, int]
    weights: dict[str, int]  # relative, exact, and positive: only those that take turns


def exact(weights: Mapping[str, float]) -> dict[str, int]:
    """Integers in the proportion of the weights, shares rounded to fractions with denominators up to 10^9."""
    total = math.fsum(weights.values())
    shares = {name: Fraction(weight / total).limit_denominator(10**9) for name, weight in sorted(weights.items())}
    common = math.lcm(*(share.denominator for share in shares.values()))
    whole = {name: int(share * common) for name, share in shares.items() if share}
    return {name: share // math.gcd(*whole.values()) for name, share in whole.items()}


def counts(weights: Mapping[str, int], n: int) -> dict[str, int]:
    """Say how many of the first n turns each source gets."""
    total = sum(weights.values())
    time = max(2 * n - len(weights), 0)  # twice: at n - sources / 2, n samples are due at most, and all but a few
    taken = {name: (weight * time + total) // (2 * total) for name, weight in weights.items()}
    for name in turns(weights, taken, n - sum(taken.values())):
        taken[name] += 1
    return taken


def turns(weights: Mapping[str, int], taken: Mapping[str, int], n: int) -> list[str]:
    """Say whose the n turns are that follow when each source had `taken`; equals take turns by name."""
    common = math.lcm(*weights.values())
    due = [((2 * taken[name] + 1) * (common // weight), name, 2 * common // weight) for name, weight in weights.items()]
    heapq.heapify(due)
    names = []
    for _ in range(n):
        time, name, interval = due[0]
        heapq.heapreplace(due, (time + interval, name, interval))
        names.append(name)
    return names


def weights_by_fraction(sources: Mapping[str, Share]) -> dict[float, dict[str, float]]:
    """Collect the weights by the fraction of the run from which on they hold; a ValueError names all that cannot be."""
    problems, by_source = [], {}
    for name, source in sources.items():
        stages = source.weight if isinstance(source.weight, Mapping) else {0.0: source.weight}
        if 0 not in stages or not all(0 <= begin < 1 for begin in stages):
            given = ", ".join(f"{begin:g}" for begin in stages) or "none"
            rule = "stages begin at fractions of the run below 1, one of them at 0, as {0: 0.9, 0.8: 0.5}"
            problems.append(f"data.sources.{name}.weight: {rule}; found {given}")
        else:
            by_source[name] = stages
    fractions = sorted({float(begin) for stages in by_source.values() for begin in stages})
    found = {fraction: {s: _at(fraction, stages) for s, stages in by_source.items()} for fraction in fractions}
    problems += [
        f"data.sources: no source has a weight from {begin:g} of the run on: give {' or '.join(weights)} more than 0"
        for begin, weights in found.items()
        if not any(weights.values())
    ]
    if problems:
        raise ValueError("; ".join(problems))
    return found


def _at(fraction: float, stages: Mapping[float, float]) -> float:
    return stages[max(begin for begin in stages if begin <= fraction)]


def stages(sources: Mapping[str, Share], temperature: float, steps: int, sequences_per_step: int) -> list[Stage]:
    """Lay the sources' weights over a run; a stage begins with the step nearest to its fraction.

    Shares become proportional to share^(1/temperature): more makes them more equal (Arivazhagan et al. 1907.05019).
    """
    found = []
    for fraction, weights in weights_by_fraction(sources).items():
        largest = max(weights.values())  # so that no power underflows
        tempered = {name: (weight / largest) ** (1 / temperature) for name, weight in weights.items()}
        found.append(Stage(round(fraction * steps) * sequences_per_step, tempered))
    return found


def trained_blocks(
    available: Mapping[str, int], context_length: int, max_training_tokens: int | None
) -> dict[str, int]:
    """Say how many of the `available` blocks of each source are trained on: all, or the same part of each source.

    Raises ValueError if that leaves a source without a block, or leaves nothing out.
    """
    if max_training_tokens is None:
        return dict(available)
    asked = f"data.max_training_tokens={max_training_tokens}"
    total, wanted = sum(available.values()), max_training_tokens // context_length
    if wanted >= total:
        there = f"there are {total * context_length} tokens"
        raise ValueError(f"{asked} leaves nothing out, {there}: lower it, or set it to null")
    some = {source: count for source, count in available.items() if count}  # `check_blocks` names the others
    found = counts(some, wanted)
    if not all(found.values()):
        enough = bisect.bisect_left(range(total), 1, key=lambda n: min(counts(some, n).values()))
        without = f"no block of model.context_length={context_length} tokens of "
        without += " and ".join(name for name, n in found.items() if not n)
        raise ValueError(f"{asked} leaves {without}: use at least {enough * context_length}, or null")
    return dict.fromkeys(available, 0) | found


def spread_over_chunks(sizes: Sequence[int], count: int) -> list[int]:
    """Count those of `count` evenly spread blocks that lie in each chunk, of which `sizes` tells all blocks."""
    ends = [0, *itertools.accumulate(sizes)]
    before = [-(-end * count // ends[-1]) for end in ends]  # those whose spread() is below
    return [after - first for first, after in itertools.pairwise(before)]


class Turns:
    """Sample n of a run → (source, k): it is that source's sample k.

    Weights hold from sample numbers on (`stages`), the first from 0. When a source with a weight has given all it has
    (`limits`; None: no limit), the others take its turns in proportion to their weights, or nothing comes any more.
    """

    def __init__(self, stages: Sequence[Stage], limits: Mapping[str, int | None], at_limit: AtMaxEpochs):
        self.phases: list[Phase] = []
        self.end: int | None = None  # samples there are in all; None: no end
        self.used_up: dict[str, int] = {}  # after how many samples of the run a source had given all it has
        self._sources = sorted(limits)
        self._known: tuple[int, int, list[tuple[str, int]]] = (-1, -1, [])  # the turns of a window of a phase
        self._plan(stages, limits, at_limit)
        self._firsts = [phase.first for phase in self.phases]

    def _plan(self, stages: Sequence[Stage], limits: Mapping[str, int | None], at_limit: AtMaxEpochs) -> None:
        first, taken = 0, dict.fromkeys(self._sources, 0)
        for stage, until in zip(stages, [*(stage.first for stage in stages[1:]), None], strict=True):
            while until is None or first < until:
                left = {s: math.inf if (limit := limits[s]) is None else limit - taken[s] for s in self._sources}
                weighted = {s: weight for s, weight in stage.weights.items() if weight > 0}
                able = {s: weight for s, weight in weighted.items() if left[s] > 0}
                if not able or (at_limit == "stop" and able != weighted):
                    self.end = first
                    return
                weights = exact(able)
                self.phases.append(Phase(first, dict(taken), weights))
                needed = {s: _turns_until(weights, s, int(left[s])) for s in weights if left[s] < math.inf}
                length = min([*needed.values(), *([until - first] if until is not None else [])], default=None)
                if length is None:
                    return
                self.used_up |= {s: first + length for s, n in needed.items() if n == length}
                first += length
                for source, count in counts(weights, length).items():
                    taken[source] += count

    def counts(self, n: int) -> dict[str, int]:
        """Say how many of the first n samples are of each source."""
        assert self.end is None or n <= self.end
        phase = self.phases[bisect.bisect_right(self._firsts, n) - 1]
        turns = counts(phase.weights, n - phase.first)
        return {source: before + turns.get(source, 0) for source, before in phase.taken.items()}

    def __call__(self, n: int) -> tuple[str, int]:
        """Say whose sample n is, and which of its samples."""
        assert self.end is None or n < self.end
        number = bisect.bisect_right(self._firsts, n) - 1
        window, offset = divmod(n - self._firsts[number], _WINDOW)
        if self._known[:2] != (number, window):
            phase = self.phases[number]
            before = counts(phase.weights, window * _WINDOW)
            taken, found = {source: phase.taken[source] + before[source] for source in before}, []
            for source in turns(phase.weights, before, _WINDOW):
                found.append((source, taken[source]))
                taken[source] += 1
            self._known = number, window, found
        return self._known[2][offset]

    def until(self, n: int) -> list[list[Any]]:
        """Return what the first n samples depend on, as plain values: [first sample, weights] of each phase."""
        return [[phase.first, phase.weights] for phase in self.phases if phase.first < n]


def _turns_until(weights: Mapping[str, int], source: str, count: int) -> int:
    """Say after how many turns a source had `count`."""
    enough = count * sum(weights.values()) // weights[source] + len(weights) + 1
    return bisect.bisect_left(range(min(enough, sys.maxsize)), count, key=lambda n: counts(weights, n)[source])


def plan_turns(
    sources: Mapping[str, Share],
    blocks: Mapping[str, int],
    *,
    temperature: float,
    at_max_epochs: AtMaxEpochs,
    steps: int,
    sequences_per_step: int,
) -> Turns:
    """Work out whose turn it is in a run over so many `blocks` of each source; raises ValueError if there is none."""
    limits: dict[str, int | None] = {}
    for name, source in sources.items():
        limits[name] = None if source.max_epochs is None else math.floor(source.max_epochs * blocks[name])
        if limits[name] == 0:
            asked = f"data.sources.{name}.max_epochs={source.max_epochs:g} of its {blocks[name]} blocks"
            raise ValueError(f"{asked} is less than one: raise it, or set weight=0 to leave the source out")
    return Turns(stages(sources, temperature, steps, sequences_per_step), limits, at_max_epochs)


def without_turns(sources: Mapping[str, Share], turns: Turns, steps: int, sequences_per_step: int) -> list[str]:
    """Tell of each source that has a weight, but gets no sequence in the run, or in a stage in which data is left."""
    stages = list(weights_by_fraction(sources).items())
    begins = [*(fraction for fraction, _ in stages), 1.0]
    firsts = [round(begin * steps) * sequences_per_step for begin in begins]
    taken = [turns.counts(n) for n in firsts]
    notes = [
        f"weights from {begin:g} of the run on hold for none of its {steps:,} steps"
        for begin, _ in stages
        if begin and round(begin * steps) == steps
    ]
    for name in sources:
        idle = [
            f"from {begins[i]:g} to {begins[i + 1]:g} of it"
            for i, (_, weights) in enumerate(stages)
            if weights[name]
            and firsts[i] < firsts[i + 1]
            and taken[i][name] == taken[i + 1][name]
            and turns.used_up.get(name, math.inf) > firsts[i]
        ]
        if not taken[-1][name] and any(weights[name] for _, weights in stages):
            idle = [f"of {firsts[-1]:,}"]
        if idle:
            remedy = f"raise data.sources.{name}.weight or the budget, or leave the source out by weight=0"
            notes.append(f"{name} gets no sequence in this run {' and '.join(idle)}: {remedy}")
    return notes


@dataclass
class Mixture:
    """Sample n of a run → (source, epoch, block), for any n ≥ 0."""

    turns: Turns
    blocks: Mapping[str, Sequence[int]]  # in each chunk, by source
    _: KW_ONLY
    seed: int  # of the order within the sources; the turns have none
    window: int  # blocks that are shuffled together (see `Order`)
    trained: Mapping[str, int]  # blocks of each source that take part, spread evenly over it

    def __post_init__(self) -> None:
        self._totals = {name: sum(sizes) for name, sizes in self.blocks.items()}
        self._orders = {
            name: Order(name, spread_over_chunks(sizes, self.trained[name]), seed=self.seed, window=self.window)
            for name, sizes in self.blocks.items()
        }

    def __call__(self, n: int) -> Sample:
        source, k = self.turns(n)
        _, epoch, number = self._orders[source](k)
        return Sample(source, epoch, spread(number, self.trained[source], self._totals[source]))


def ledger(turns: Turns, blocks: Mapping[str, int], context_length: int, samples: int) -> dict[str, Entry]:
    """Say what each source of so many blocks gave to the first `samples` samples, by arithmetic on their number."""
    return {
        source: Entry(count * context_length, count / max(samples, 1), count / blocks[source])
        for source, count in turns.counts(samples).items()
    }
