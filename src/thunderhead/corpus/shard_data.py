"""Training on shards of several sources with weights: where they are, whose turn it is, what a run draws from each."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Literal

from typing_extensions import override

from thunderhead.core.config import Problem, first_line
from thunderhead.core.data.datamodule import Draw, Entry
from thunderhead.core.data.manifest import Manifest, SplitName
from thunderhead.core.data.order import Sample
from thunderhead.core.data.shard_datamodule import ShardDataModule
from thunderhead.core.metrics import BitsPerByte
from thunderhead.core.tokenizer import Tokenizer
from thunderhead.core.types import PositiveFloat, PositiveInt
from thunderhead.corpus.curation import Filter
from thunderhead.corpus.draw import draw
from thunderhead.corpus.mixture import (
    AtMaxEpochs,
    Ledger,
    Mixture,
    Turns,
    plan_turns,
    trained_blocks,
    weights_by_fraction,
)
from thunderhead.corpus.shard_files import VerifiedChunks, verify
from thunderhead.corpus.sources import Share


@dataclass(eq=False, repr=False)
class ShardData(ShardDataModule):
    """Load blocks of several sources in the order of `thunderhead.corpus.mixture`.

    Subclasses say where the shards are (`find`), whose `shares` there are, and how shards are made (`prepare_data`).

    Args:
        tokenizer: kind and settings; once the shards are found, the trained one that lies beside them.
        filters: decide which documents are kept.
        max_training_tokens: train on so many tokens again and again: a fixed selection of blocks spread evenly over
            each source's training split, the same for all seeds; None: on all. Validation stays what it is.
        temperature: weights become proportional to weight^(1/temperature) (Arivazhagan et al. 1907.05019).
        at_max_epochs: when a source reaches its max_epochs, the others take its place (redistribute), or the run ends
            (stop).
        verify: compare the sha256 of all chunks with the manifest at the start (full), or of each chunk before its
            first token is used (first_use: a start that does not grow with the corpus; sizes are compared at once).
    """

    tokenizer: Tokenizer | None
    filters: Mapping[str, Filter]
    _: KW_ONLY
    max_training_tokens: PositiveInt | None = None
    temperature: PositiveFloat = 1.0
    at_max_epochs: AtMaxEpochs = "redistribute"
    verify: Literal["full", "first_use"] = "first_use"

    @override
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
        """Look up the shards, reading no text; None: they are not prepared yet.

        Raises:
            ValueError: they cannot be there, or are not right.
        """
        raise NotImplementedError

    def use(self, manifest: Manifest) -> None:
        """Train on these shards."""
        self.tokenizer = manifest.load_tokenizer()
        self.manifest, self.is_prepared = manifest, True
        self.vocab_size, self.eos_id = manifest.vocab_size, manifest.eos_id
        train = manifest.splits["train"].values()
        self.unigram_entropy = sum(shard.unigram_entropy for shard in train) / len(train)  # as the loss: sources' mean

    def shares(self) -> Mapping[str, Share]:
        """Say how much the mixture takes of each source."""
        raise NotImplementedError

    @override
    def setup(self, stage: str) -> None:
        """Compare the shards with their manifest.

        Raises:
            ValueError: they are damaged (a `ShardError`), or too small for the context length.
        """
        if not self.is_prepared:  # they were made by another process
            manifest = self.find()
            assert manifest is not None, "prepare_data comes first"
            self.use(manifest)
        check_blocks(self.manifest, self.context_length)
        self.check_files()

    def check_files(self) -> None:
        """Compare the files with the manifest, as far as is asked for at the start."""
        verify(self.manifest, "full" if self.verify == "full" else "sizes")

    @override
    def chunk_file(self, split: SplitName, source: str) -> Callable[[int], Path]:
        if self.verify == "full":
            return super().chunk_file(split, source)
        return VerifiedChunks(self.manifest, split, source)

    # --- the mixture --------------------------------------------------------------------------------------------------

    def trained_blocks(self) -> dict[str, int]:
        """Count the blocks of each source that are trained on."""
        available = {source: sum(sizes) for source, sizes in self.blocks("train").items()}
        return trained_blocks(available, self.context_length, self.max_training_tokens)

    def _turns(self, steps: int) -> Turns:
        return plan_turns(
            self.shares(),
            self.trained_blocks(),
            temperature=self.temperature,
            at_max_epochs=self.at_max_epochs,
            steps=steps,
            sequences_per_step=self.sequences_per_step,
        )

    @override
    def order(self, steps: int) -> Callable[[int], Sample]:
        trained, self._drawn = self.trained_blocks(), self._turns(steps)
        return Mixture(self._drawn, self.blocks("train"), seed=self.seed, window=self.shuffle_window, trained=trained)

    @override
    def order_state(self, samples: int) -> dict[str, Any]:
        return super().order_state(samples) | {
            "the weights and max_epochs of data.sources": self._drawn.until(samples),
            **({"data.max_training_tokens": limit} if (limit := self.max_training_tokens) is not None else {}),
        }

    @override
    def ledger(self, steps: int) -> Callable[[int], dict[str, Entry]]:
        return Ledger(self._turns(steps), self.trained_blocks(), self.context_length)

    @override
    def draw(self, steps: int) -> Draw:
        if not self.is_prepared or refusals(self._check_found):  # which `problems` tells
            return Draw(steps)
        return draw(
            self.shares(),
            self.trained_blocks(),
            self._turns,
            steps=steps,
            sequences=self.sequences_per_step,
            may_end=self.at_max_epochs == "stop",
            is_part=self.max_training_tokens is not None,
        )

    # --- what a run wants to know -------------------------------------------------------------------------------------

    @property
    @override
    def epoch_tokens(self) -> int | None:  # type: ignore[override]
        if not self.is_prepared or refusals(self.trained_blocks):
            return None
        return self.context_length * sum(self.trained_blocks().values())

    @override
    def problems(self, run: Any) -> list[Problem]:
        return refusals(lambda: weights_by_fraction(self.shares()), self._check_found)

    def _check_found(self) -> None:
        if self._refusal is not None:
            raise self._refusal
        if self.is_prepared:
            check_blocks(self.manifest, self.context_length)
            self.trained_blocks()

    @override
    def notes(self) -> list[str]:
        if (limit := self.max_training_tokens) is None:
            return []
        return [f"an epoch is {limit:,} tokens, spread evenly over the training data: the rest is left out"]

    @override
    def summary(self) -> dict[str, Any]:
        """Return the manifest without its chunks."""
        content = self.manifest.to_dict()
        for by_source in content["splits"].values():
            for shard in by_source.values():
                del shard["chunks"]
        return content

    @override
    def validation_metrics(self) -> dict[str, Any]:
        assert self.tokenizer is not None
        return {"bits_per_byte": BitsPerByte(self.tokenizer.token_bytes().tolist())}

    @override
    def validation_data(self) -> str:
        val = self.manifest.splits["val"]
        chunks = {name: [chunk.sha256 for chunk in shard.chunks] for name, shard in val.items()}
        return _hash([chunks, self.max_validation_tokens])

    @override
    def validation_text(self) -> str:
        manifest = self.manifest
        made_from = [manifest.sources, manifest.split_rule, manifest.validation_fraction, self.max_validation_tokens]
        return _hash(made_from if manifest.curation is None else [*made_from, manifest.curation])


def refusals(*checks: Callable[[], object]) -> list[Problem]:
    """Try checks, and collect what they refuse with a ValueError, each thing once."""
    found: dict[Problem, None] = {}
    for check in checks:
        try:
            check()
        except ValueError as error:
            found[Problem("", first_line(error))] = None
    return list(found)


def check_blocks(manifest: Manifest, context_length: int) -> None:
    """Refuse shards that are too small for the context length.

    Raises:
        ValueError: a split of a source has no full block; says what to change.
    """
    for split, source, shard in manifest.shards():
        if any(shard.blocks(context_length)):
            continue
        name, change = ("validation", "raise") if split == "val" else ("training", "lower")
        cut = manifest.sources[source].get("max_document_bytes")
        smaller = f", lower data.sources.{source}.max_document_bytes={cut}" if cut and split == "val" else ""
        raise ValueError(
            f"data.sources.{source}: the {name} split has {shard.tokens} tokens, too few for one block of"
            f" model.context_length + 1 = {context_length + 1}: lower model.context_length, {change}"
            f" data.validation_fraction={manifest.validation_fraction}{smaller}, or give more text"
        )


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
