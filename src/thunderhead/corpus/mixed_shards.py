"""Several sources with weights: whose turn it is, and what a run draws from each."""

import bisect
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

from typing_extensions import override

from thunderhead.core.config import Problem
from thunderhead.core.data.datamodule import Draw, Entry, ShardDataModule, refusals
from thunderhead.core.data.order import Sample
from thunderhead.core.types import PositiveFloat, PositiveInt
from thunderhead.corpus.mixture import (
    LITTLE_IS_GAINED_AFTER,
    AtMaxEpochs,
    Ledger,
    Mixture,
    Turns,
    plan_turns,
    repetition,
    trained_blocks,
    weights_by_fraction,
)
from thunderhead.corpus.sources import Share


@dataclass(eq=False, repr=False)
class MixedShards(ShardDataModule):
    """Load blocks of several sources in the order of `thunderhead.corpus.mixture`; subclasses say whose `shares`.

    Args:
        max_training_tokens: train on so many tokens again and again: a fixed selection of blocks spread evenly over
            each source's training split, the same for all seeds; None: on all. Validation stays what it is.
        temperature: weights become proportional to weight^(1/temperature) (Arivazhagan et al. 1907.05019).
        at_max_epochs: when a source reaches its max_epochs, the others take its place (redistribute), or the run ends
            (stop).
    """

    _: KW_ONLY
    max_training_tokens: PositiveInt | None = None
    temperature: PositiveFloat = 1.0
    at_max_epochs: AtMaxEpochs = "redistribute"

    def shares(self) -> Mapping[str, Share]:
        """Say how much the mixture takes of each source."""
        raise NotImplementedError

    @override
    def problems(self, run: Any) -> list[Problem]:
        return refusals(
            lambda: weights_by_fraction(self.shares()), self._is_found, self._has_blocks, self._has_trained_blocks
        )

    def _has_trained_blocks(self) -> None:
        if self.manifest is not None:
            self._trained_blocks()

    @override
    def _trained_blocks(self) -> dict[str, int]:
        return trained_blocks(super()._trained_blocks(), self.context_length, self.max_training_tokens)

    def _turns(self, steps: int) -> Turns:
        return plan_turns(
            self.shares(),
            self._trained_blocks(),
            temperature=self.temperature,
            at_max_epochs=self.at_max_epochs,
            steps=steps,
            sequences_per_step=self.sequences_per_step,
        )

    @override
    def order(self, steps: int) -> Callable[[int], Sample]:
        trained, turns = self._trained_blocks(), self._turns(steps)
        return Mixture(turns, self.blocks(), seed=self.seed, window=self.shuffle_window, trained=trained)

    @override
    def order_state(self, samples: int) -> dict[str, Any]:
        assert isinstance(self._place, Mixture)
        return super().order_state(samples) | {
            "the weights and max_epochs of data.sources": self._place.turns.until(samples),
            **({"data.max_training_tokens": limit} if (limit := self.max_training_tokens) is not None else {}),
        }

    @override
    def ledger(self, steps: int) -> Callable[[int], dict[str, Entry]]:
        return Ledger(self._turns(steps), self._trained_blocks(), self.context_length)

    @override
    def notes(self) -> list[str]:
        if (limit := self.max_training_tokens) is None:
            return []
        return [f"an epoch is {limit:,} tokens, spread evenly over the training data: the rest is left out"]

    @override
    def draw(self, steps: int) -> Draw:
        """Work out what so many steps draw from each source; fewer steps where a source that ends ends the run."""
        if not self.is_prepared:
            return Draw(steps)
        sources, available, sequences = self.shares(), self._trained_blocks(), self.sequences_per_step
        asked, notes, problems = steps, [], []
        try:
            turns = self._turns(steps)
            while turns.end is not None and turns.end < steps * sequences:
                steps = turns.end // sequences
                if steps == 0:
                    raise ValueError(
                        f"data.sources: max_epochs leaves {turns.end} sequences, fewer than the {sequences} of one"
                        " step: raise it, or lower batch.global_tokens"
                    )
                turns = self._turns(steps)  # stages are fractions of the run, which is shorter now
        except ValueError as error:
            return Draw(asked, problems=(Problem("", str(error)),))
        if steps < asked:
            told = " and ".join(f"{s} (data.sources.{s}.max_epochs={sources[s].max_epochs:g})" for s in turns.used_up)
            if self.at_max_epochs == "redistribute":
                message = (
                    f"only lasts for {steps:,} of {asked:,} steps: all with a weight are used up: {told}; raise"
                    f" max_epochs, or lower the budget, as budget=steps budget.steps={steps}"
                )
                problems.append(Problem("data.sources", message))
            notes.append(f"stops after {steps:,} of {asked:,} steps, when {told} is used up")
        elif self.at_max_epochs == "redistribute":
            notes += [
                f"{source} reaches max_epochs={sources[source].max_epochs:g} in step {n // sequences + 1:,}, then the"
                " others take its place"
                for source, n in turns.used_up.items()
                if n < steps * sequences
            ]
        counts = turns.counts(steps * sequences)
        epochs = {source: counts[source] / n for source, n in available.items()}
        allowed = [name for name, source in sources.items() if source.max_epochs is not None]

        def is_too_long(steps: int) -> bool:
            turns = self._turns(steps)
            counts = turns.counts(min(steps * sequences, turns.end or steps * sequences))
            return any(counts[s] > LITTLE_IS_GAINED_AFTER * n for s, n in available.items() if s not in allowed)

        repeated, refused = repetition(
            epochs,
            allowed,
            is_part=self.max_training_tokens is not None,
            fitting=lambda: bisect.bisect_left(range(1, steps), True, key=is_too_long),
        )
        return Draw(
            steps,
            epochs,
            {source: counts[source] / (steps * sequences) for source in available},
            (*notes, *repeated),
            (*problems, *(Problem("", message) for message in refused)),
        )
