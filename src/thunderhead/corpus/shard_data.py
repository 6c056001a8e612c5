"""Training on shards of several sources with weights: where they are, whose turn it is, what a run draws from each."""

import bisect
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from thunderhead.core.config import Problem
from thunderhead.core.data.datamodule import Draw, Entry
from thunderhead.core.data.manifest import Manifest, SplitName
from thunderhead.core.data.order import Sample
from thunderhead.core.data.shard_datamodule import ShardDataModule
from thunderhead.core.run import Problems
from thunderhead.core.tokenizer import Tokenizer
from thunderhead.core.types import PositiveFloat, PositiveInt
from thunderhead.corpus import mixture
from thunderhead.corpus.curation import Filter
from thunderhead.corpus.mixture import AtMaxEpochs, Mixture, Turns
from thunderhead.corpus.shard_files import VerifiedChunks, verify
from thunderhead.corpus.sources import Share

# Muennighoff et al. 2305.16264: up to 4 epochs repeated data is about as good as new; the worth of a repetition decays
# with a constant of 15.4 repetitions, so after 16 epochs it is 1/e of new data's.
LITTLE_IS_LOST_UNTIL = 4
LITTLE_IS_GAINED_AFTER = 16


@dataclass(eq=False, repr=False)
class ShardData(ShardDataModule):
    """Load blocks of several sources in the order of `thunderhead.corpus.mixture`.

    Subclasses say where the shards are (`find`), whose `shares` there are, and how shards are made (`prepare_data`).
    """

    tokenizer: Tokenizer | None  # kind and settings; once the shards are found, the trained one that lies beside them
    filters: Mapping[str, Filter]  # decide which documents are kept
    _: KW_ONLY
    max_training_tokens: PositiveInt | None = None
    """Train on so many tokens again and again: a fixed selection of blocks spread evenly over each source's training
    split, the same for all seeds; None: on all. Validation stays what it is."""
    temperature: PositiveFloat = 1.0  # weights become weight^(1/temperature) (Arivazhagan et al. 1907.05019)
    at_max_epochs: AtMaxEpochs = "redistribute"  # the other sources take the place of one used up, or the run ends
    verify: Literal["full", "first_use"] = "first_use"
    """Compare the sha256 of all chunks with the manifest at the start (full), or of each chunk before its first token
    is used (first_use: a start that does not grow with the corpus; sizes are compared at once)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.is_prepared, self.eos_id = False, 0
        self._refusal: ValueError | None = None  # why the shards are not found, which `problems` tells
        try:
            if (manifest := self.find()) is not None:
                self.use(manifest)
        except ValueError as error:
            self._refusal = error
        if not self.is_prepared:  # an untrained tokenizer knows how many tokens it will have at most
            asked = self.tokenizer.settings.get("vocab_size", 0) if self.tokenizer is not None else 2**16
            self.vocab_size = asked or self.tokenizer.vocab_size  # type: ignore[union-attr]

    def find(self) -> Manifest | None:
        """Look up the shards, reading no text; None: they are not prepared yet. Raises ValueError if they are wrong."""
        raise NotImplementedError

    def use(self, manifest: Manifest) -> None:
        self.tokenizer = manifest.load_tokenizer()
        self.manifest, self.is_prepared = manifest, True
        self.vocab_size, self.eos_id = manifest.vocab_size, manifest.eos_id
        train = manifest.splits["train"].values()
        self.unigram_entropy = sum(shard.unigram_entropy for shard in train) / len(train)  # as the loss: sources' mean

    def shares(self) -> Mapping[str, Share]:
        """Say how much the mixture takes of each source."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Compare the shards with their manifest; raises ValueError if they are damaged, or too small."""
        if not self.is_prepared:  # they were made by another process
            manifest = self.find()
            assert manifest is not None, "prepare_data comes first"
            self.use(manifest)
        check_blocks(self.manifest, self.context_length)
        self.check_files()

    def check_files(self) -> None:
        """Compare the files with the manifest, as far as is asked for at the start."""
        verify(self.manifest, "full" if self.verify == "full" else "sizes")

    def chunk_file(self, split: SplitName, source: str) -> Callable[[int], Path]:
        if self.verify == "full":
            return super().chunk_file(split, source)
        return VerifiedChunks(self.manifest.shard_folder(split, source), self.manifest.splits[split][source])

    def trained_blocks(self) -> dict[str, int]:
        available = {source: sum(sizes) for source, sizes in self.blocks("train").items()}
        return mixture.trained_blocks(available, self.context_length, self.max_training_tokens)

    def _turns(self, steps: int) -> Turns:
        return mixture.plan_turns(
            self.shares(),
            self.trained_blocks(),
            temperature=self.temperature,
            at_max_epochs=self.at_max_epochs,
            steps=steps,
            sequences_per_step=self.sequences_per_step,
        )

    def order(self, steps: int) -> Callable[[int], Sample]:
        trained, self._drawn = self.trained_blocks(), self._turns(steps)
        return Mixture(self._drawn, self.blocks("train"), seed=self.seed, window=self.shuffle_window, trained=trained)

    def order_state(self, samples: int) -> dict[str, Any]:
        state = super().order_state(samples)
        state["the weights and max_epochs of data.sources"] = self._drawn.until(samples)
        if self.max_training_tokens is not None:
            state["data.max_training_tokens"] = self.max_training_tokens
        return state

    def ledger(self, steps: int) -> Callable[[int], dict[str, Entry]]:
        return partial(mixture.ledger, self._turns(steps), self.trained_blocks(), self.context_length)

    def draw(self, steps: int) -> Draw:
        """Work out what so many steps draw from each source; fewer steps where a source that ends ends the run."""
        if not self.is_prepared or refusals(self._check_found):  # which `problems` tells
            return Draw(steps)
        asked, sequences, may_end = steps, self.sequences_per_step, self.at_max_epochs == "stop"
        notes: list[str] = []
        problems: list[Problem] = []
        try:
            turns = self._turns(steps)
            while turns.end is not None and turns.end < steps * sequences:
                steps = turns.end // sequences
                if steps == 0:
                    few = f"max_epochs leaves {turns.end} sequences, fewer than the {sequences} of one step"
                    raise ValueError(f"data.sources: {few}: raise it, or lower batch.global_tokens")
                turns = self._turns(steps)  # stages are fractions of the run, which is shorter now
        except ValueError as error:
            return Draw(asked, problems=(Problem("", str(error)),))
        limits = {name: source.max_epochs for name, source in self.shares().items() if source.max_epochs is not None}
        if steps < asked:
            told = " and ".join(f"{s} (data.sources.{s}.max_epochs={limits[s]:g})" for s in turns.used_up)
            if not may_end:
                message = f"only lasts for {steps:,} of {asked:,} steps: all with a weight are used up: {told}"
                remedy = f"raise max_epochs, or lower the budget, as budget=steps budget.steps={steps}"
                problems.append(Problem("data.sources", f"{message}; {remedy}"))
            notes.append(f"stops after {steps:,} of {asked:,} steps, when {told} is used up")
        elif not may_end:
            notes += [
                f"{s} reaches max_epochs={limits[s]:g} in step {n // sequences + 1:,}, then the others take its place"
                for s, n in turns.used_up.items()
                if n < steps * sequences
            ]
        notes += mixture.without_turns(self.shares(), turns, steps, sequences)
        available, counts = self.trained_blocks(), turns.counts(steps * sequences)
        epochs = {source: counts[source] / n for source, n in available.items()}
        shares = {source: counts[source] / (steps * sequences) for source in available}

        def is_too_long(steps: int) -> bool:
            turns = self._turns(steps)
            counts = turns.counts(min(steps * sequences, turns.end or steps * sequences))
            return any(counts[s] > LITTLE_IS_GAINED_AFTER * n for s, n in available.items() if s not in limits)

        def fitting() -> int:
            return bisect.bisect_left(range(1, steps), True, key=is_too_long)

        is_part = self.max_training_tokens is not None
        repeated, refused = repetition(epochs, limits, is_part=is_part, fitting=fitting)
        problems += [Problem("", message) for message in refused]
        return Draw(steps, epochs, shares, (*notes, *repeated), tuple(problems))

    @property
    def epoch_tokens(self) -> int | None:  # type: ignore[override]
        if not self.is_prepared or refusals(self.trained_blocks):
            return None
        return self.context_length * sum(self.trained_blocks().values())

    def problems(self, run: Any) -> list[Problem]:
        return refusals(lambda: mixture.weights_by_fraction(self.shares()), self._check_found)

    def _check_found(self) -> None:
        if self._refusal is not None:
            raise self._refusal
        if self.is_prepared:
            check_blocks(self.manifest, self.context_length)
            self.trained_blocks()

    def _lost(self) -> Iterator[str]:
        """What of the text is an unknown token, in some blocks of each source."""
        unknown = getattr(self.tokenizer, "unknown_id", None)
        for source in self.manifest.sources if self.is_prepared and unknown is not None else ():
            reader = self._reader("train", source)
            some = range(0, len(reader), max(1, len(reader) // 64))
            if share := float(np.mean([np.mean(reader.view(block) == unknown) for block in some])):
                what = f"about {share:.2%} of the tokens of {source} are unknown to the tokenizer"
                yield f"{what}: text is lost, and bits per byte, which are of all text, are too low"

    def notes(self) -> list[str]:
        if (limit := self.max_training_tokens) is None:
            return []
        return [f"an epoch is {limit:,} tokens, spread evenly over the training data: the rest is left out"]

    def summary(self) -> dict[str, Any]:
        """Return the manifest without its chunks."""
        content = self.manifest.to_dict()
        for by_source in content["splits"].values():
            for shard in by_source.values():
                del shard["chunks"]
        return content

    def validation_data(self) -> str:
        val = self.manifest.splits["val"]
        chunks = {name: [chunk.sha256 for chunk in shard.chunks] for name, shard in val.items()}
        return _hash([chunks, self._validated(), self.context_length])

    def validation_text(self) -> str:
        manifest = self.manifest
        made_from = [manifest.sources, manifest.split_rule, manifest.validation_fraction, manifest.curation]
        return _hash([made_from, self._validated()])

    def _validated(self) -> dict[str, list[Any]]:
        selected = {source: self.selection(source) for source in self.validation_sources()}
        return {source: [documents.numbers, documents.bytes] for source, documents in selected.items()}


def refusals(*checks: Callable[[], object]) -> list[Problem]:
    """Try checks, and collect what they refuse, each thing once."""
    found = Problems()
    for check in checks:
        with found.collect():
            check()
    return found


def repetition(
    epochs: Mapping[str, float], allowed: Iterable[str], *, is_part: bool, fitting: Callable[[], int]
) -> tuple[list[str], list[str]]:
    """Judge how often sources are repeated, those `allowed` on purpose: what is worth knowing, what is refused."""
    notes, refused = [], []
    for name, n in epochs.items():
        if n > LITTLE_IS_GAINED_AFTER and name not in set(allowed):
            steps = fitting()
            ways = [f"budget=steps budget.steps={steps} is within {LITTLE_IS_GAINED_AFTER}"] if steps else []
            ways += [f"lower data.sources.{name}.weight"] if len(epochs) > 1 else []
            ways += ["raise data.max_training_tokens"] if is_part else []
            ways += [f"say data.sources.{name}.max_epochs={math.ceil(n)} if it is meant"]
            refused.append(
                f"data.sources.{name} would be seen {n:.1f} times: past {LITTLE_IS_GAINED_AFTER} epochs hardly anything"
                f" is learned from repeated data (Muennighoff et al. 2305.16264): {', or '.join(ways)}"
            )
        elif n > LITTLE_IS_LOST_UNTIL:
            known = f"up to {LITTLE_IS_LOST_UNTIL} epochs are about as good as new data, more are not (2305.16264)"
            notes.append(f"{name} is seen {n:.1f} times: {known}")
    return notes, refused


def check_blocks(manifest: Manifest, context_length: int) -> None:
    """Refuse shards of which the training split of a source has no full block; the ValueError says what to change."""
    for source, shard in manifest.splits["train"].items():
        if not any(shard.blocks(context_length)):
            raise ValueError(
                f"data.sources.{source}: the training split has {shard.tokens} tokens, too few for one block of"
                f" model.context_length + 1 = {context_length + 1}: lower model.context_length, lower"
                f" data.validation_fraction={manifest.validation_fraction}, or give more text"
            )


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
