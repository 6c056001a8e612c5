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
from collections.abc import Mapping, Sequence
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


# --- turns -----------------------------------------------------------------------------------------------------------


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


# --- weights ---------------------------------------------------------------------------------------------------------


def weights_by_fraction(sources: Mapping[str, Share]) -> dict[float, dict[str, float]]:
    """Collect the sources' weights, by the fraction of the run from which on they hold.

    Raises:
        ValueError: a source's stages do not begin at 0 or lie outside of the run, or at some time no source has a
            weight; names all such.
    """
    problems, by_source = [], {}
    for name, source in sources.items():
        stages = source.weight if isinstance(source.weight, Mapping) else {0.0: source.weight}
        if 0 not in stages or not all(0 <= begin < 1 for begin in stages):
            given = ", ".join(f"{begin:g}" for begin in stages)
            problems.append(
                f"data.sources.{name}.weight: stages begin at fractions of the run, from 0 to below 1 and one of them"
                f" at 0, as {{0: 0.9, 0.8: 0.5}}; found {given or 'none'}"
            )
        else:
            by_source[name] = dict(sorted(stages.items()))
    fractions = sorted({float(begin) for stages in by_source.values() for begin in stages})
    found = {fraction: {s: _last(by_source[s], fraction) for s in by_source} for fraction in fractions}
    problems += [
        f"data.sources: no source has a weight from {begin:g} of the run on: give {' or '.join(weights)} more than 0"
        for begin, weights in found.items()
        if not any(weights.values())
    ]
    if problems:
        raise ValueError("; ".join(problems))
    return found


def _last(stages: Mapping[float, float], fraction: float) -> float:
    return [weight for begin, weight in stages.items() if begin <= fraction][-1]


def stages(sources: Mapping[str, Share], temperature: float, steps: int, sequences_per_step: int) -> list[Stage]:
    """Lay the sources' weights over a run; a stage begins with the step nearest to its fraction.

    Args:
        sources: with their weights.
        temperature: shares become proportional to share^(1/temperature), as multilingual models sample languages
            (Arivazhagan et al. 1907.05019): 1 leaves them, more makes them more equal.
        steps: of the run.
        sequences_per_step: samples of a step.

    Raises:
        ValueError: see `weights_by_fraction`.
    """
    found = []
    for fraction, weights in weights_by_fraction(sources).items():
        largest = max(weights.values())  # so that no power underflows
        tempered = {name: (weight / largest) ** (1 / temperature) for name, weight in weights.items()}
        found.append(Stage(round(fraction * steps) * sequences_per_step, tempered))
    return found


# --- part of the data ------------------------------------------------------------------------------------------------


def trained_blocks(
    available: Mapping[str, int], context_length: int, max_training_tokens: int | None
) -> dict[str, int]:
    """Say how many blocks of each source are trained on: all, or so many in all, the same part of each source.

    Args:
        available: blocks of each source's training split.
        context_length: tokens trained on in a block.
        max_training_tokens: data.max_training_tokens; None: no limit.

    Raises:
        ValueError: it leaves a source without a block, or leaves nothing out.
    """
    if max_training_tokens is None:
        return dict(available)
    total, wanted = sum(available.values()), max_training_tokens // context_length
    if wanted >= total:
        raise ValueError(
            f"data.max_training_tokens={max_training_tokens} leaves nothing out, there are {total * context_length}"
            " tokens: lower it, or set it to null"
        )
    some = {source: count for source, count in available.items() if count}  # `check_blocks` names the others
    found = counts(some, wanted)
    if not all(found.values()):
        enough = bisect.bisect_left(range(total), 1, key=lambda n: min(counts(some, n).values()))
        raise ValueError(
            f"data.max_training_tokens={max_training_tokens} leaves no block of model.context_length={context_length}"
            f" tokens of {' and '.join(name for name, n in found.items() if not n)}: use at least"
            f" {enough * context_length}, or null"
        )
    return dict.fromkeys(available, 0) | found


def spread_over_chunks(sizes: Sequence[int], count: int) -> list[int]:
    """Count those of `count` evenly spread blocks that lie in each chunk, of which `sizes` tells all blocks."""
    ends = [0, *itertools.accumulate(sizes)]
    before = [-(-end * count // ends[-1]) for end in ends]  # those whose spread() is below
    return [after - first for first, after in itertools.pairwise(before)]


# --- the whole run ---------------------------------------------------------------------------------------------------


class Turns:
    """Sample n of a run → (source, k): it is that source's sample k.

    Args:
        stages: weights from sample numbers on, the first from 0.
        limits: samples that a source has at most; None: no limit.
        at_limit: what happens when a source with a weight has given all it has: the others take its turns in
            proportion to their weights, or nothing comes any more.
    """

    def __init__(self, stages: Sequence[Stage], limits: Mapping[str, int | None], at_limit: AtMaxEpochs):
        self.phases: list[Phase] = []
        self.end: int | None = None
        """Samples there are in all; None: no end."""
        self.used_up: dict[str, int] = {}
        """After how many samples of the run a source had given all it has."""
        self._sources = sorted(limits)
        self._known: tuple[int, list[tuple[str, int]]] = (-1, [])
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

    def _phase(self, n: int) -> Phase:
        return self.phases[bisect.bisect_right(self._firsts, n) - 1]

    def counts(self, n: int) -> dict[str, int]:
        """Say how many of the first n samples are of each source."""
        assert self.end is None or n <= self.end
        phase = self._phase(n)
        turns = counts(phase.weights, n - phase.first)
        return {source: before + turns.get(source, 0) for source, before in phase.taken.items()}

    def __call__(self, n: int) -> tuple[str, int]:
        """Say whose sample n is, and which of its samples."""
        window, offset = divmod(n, _WINDOW)
        if self._known[0] != window:
            self._known = (window, self._window(window * _WINDOW))
        return self._known[1][offset]

    def _window(self, first: int) -> list[tuple[str, int]]:
        """Samples first … first + _WINDOW - 1, fewer at the end."""
        found: list[tuple[str, int]] = []
        stop = first + _WINDOW if self.end is None else min(first + _WINDOW, self.end)
        taken = self.counts(min(first, stop))
        while (n := first + len(found)) < stop:
            phase = self._phase(n)
            following = bisect.bisect_right(self._firsts, n)
            until = min(stop, self._firsts[following]) if following < len(self._firsts) else stop
            in_phase = {source: taken[source] - phase.taken[source] for source in phase.weights}
            for source in turns(phase.weights, in_phase, until - n):
                found.append((source, taken[source]))
                taken[source] += 1
        return found

    def until(self, n: int) -> list[list[Any]]:
        """Return what the first n samples depend on, as plain values: [first sample, weights] of each phase."""
        return [[phase.first, phase.weights] for phase in self.phases if phase.first < n]


def _turns_until(weights: Mapping[str, int], source: str, count: int) -> int:
    """Say after how many turns a source had `count`."""
    enough = count * sum(weights.values()) // weights[source] + len(weights) + 1
    low, high = 0, enough
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if counts(weights, middle)[source] >= count else (middle + 1, high)
    return low


def plan_turns(
    sources: Mapping[str, Share],
    blocks: Mapping[str, int],
    *,
    temperature: float,
    at_max_epochs: AtMaxEpochs,
    steps: int,
    sequences_per_step: int,
) -> Turns:
    """Work out whose turn it is in a run.

    Args:
        sources: with weights and max_epochs.
        blocks: of each source that are trained on.
        temperature: see `stages`.
        at_max_epochs: see `Turns`.
        steps: of the run.
        sequences_per_step: samples of a step.

    Raises:
        ValueError: the weights are refused (see `weights_by_fraction`), or max_epochs is less than a block.
    """
    limits: dict[str, int | None] = {}
    for name, source in sources.items():
        limits[name] = None if source.max_epochs is None else math.floor(source.max_epochs * blocks[name])
        if limits[name] == 0:
            raise ValueError(
                f"data.sources.{name}.max_epochs={source.max_epochs:g} of its {blocks[name]} blocks is less than one:"
                f" raise it, or set data.sources.{name}.weight=0 to leave the source out"
            )
    return Turns(stages(sources, temperature, steps, sequences_per_step), limits, at_max_epochs)


class Mixture:
    """Sample n of a run → (source, epoch, block), for any n ≥ 0.

    Args:
        turns: whose sample n is.
        blocks: number of blocks in each chunk, by source.
        seed: of the order within the sources; the turns have none.
        window: blocks that are shuffled together (see `Order`).
        trained: number of blocks of each source that take part, spread evenly over it; None: all.
    """

    def __init__(
        self,
        turns: Turns,
        blocks: Mapping[str, Sequence[int]],
        *,
        seed: int,
        window: int,
        trained: Mapping[str, int] | None = None,
    ):
        self.turns = turns
        self._blocks = {name: sum(sizes) for name, sizes in blocks.items()}
        self._trained = dict(trained or self._blocks)
        self._orders = {
            name: Order(name, spread_over_chunks(sizes, self._trained[name]), seed=seed, window=window)
            for name, sizes in blocks.items()
        }

    def __call__(self, n: int) -> Sample:
        """Say which block sample n is."""
        source, k = self.turns(n)
        _, epoch, number = self._orders[source](k)
        return Sample(source, epoch, spread(number, self._trained[source], self._blocks[source]))


class Ledger:
    """What each source gave to the samples until now, by arithmetic on their number.

    Args:
        turns: whose sample n is.
        blocks: of each source that are trained on.
        context_length: tokens trained on in a sample.
    """

    def __init__(self, turns: Turns, blocks: Mapping[str, int], context_length: int):
        self._turns, self._blocks, self._context_length = turns, blocks, context_length

    def __call__(self, samples: int) -> dict[str, Entry]:
        """Say what the first `samples` samples were."""
        return {
            source: Entry(count * self._context_length, count / max(samples, 1), count / self._blocks[source])
            for source, count in self._turns.counts(samples).items()
        }
