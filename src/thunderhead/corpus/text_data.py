"""Training on text: its shards are made if they are not there."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Gt, Lt, MinLen

from thunderhead.core.config import Problem
from thunderhead.core.data.manifest import Manifest
from thunderhead.core.types import FolderName, PathText
from thunderhead.corpus import prepare
from thunderhead.corpus.engines import Engine
from thunderhead.corpus.preparation import Preparation, load
from thunderhead.corpus.shard_data import ShardData, refusals
from thunderhead.corpus.sources import Source, check_sources
from thunderhead.processes import global_rank
from thunderhead.terminal import say


@dataclass(eq=False, repr=False)
class TextData(ShardData):
    """Prepare the shards of some text if need be, and load their blocks."""

    _: KW_ONLY
    sources: Mapping[str, Source]  # where the text comes from, by name
    path: PathText | None = None  # a place for data.path=…, for sources to refer to as ${data.path}
    shards_dir: PathText = "data/shards"  # for shards of all corpora, each under its own key
    fingerprint: Literal["full", "sampled"] = "full"
    """How shards know the files that they were made from: by all bytes, or by the size and 1 MB of each."""
    shards_key: FolderName | None = None  # use these, if they are there, whatever became of the text since
    validation: Annotated[str, MinLen(1)] = "hash"  # which text is never trained on: hash, tail, or names of files
    validation_fraction: Annotated[float, Gt(0), Lt(1)] = 0.05  # how much of it, for hash and tail
    near_duplicates: Literal["report", "together"] = "report"
    """What becomes of near duplicates that fall on both sides of the split: they are counted; or all are on the side of
    the first, for which all documents are compared before (of validation=hash)."""

    def shares(self) -> Mapping[str, Source]:
        return self.sources

    def problems(self, run: Any) -> list[Problem]:
        missing = [Problem("tokenizer", "needs an option: tokenizer=bpe")] if self.tokenizer is None else []
        needs_text = not self.is_prepared or self.manifest.key != self.shards_key
        found = refusals(lambda: check_sources(self.sources, self.path)) if needs_text else []
        if self.near_duplicates == "together" and self.validation != "hash":
            found.append(Problem("data.near_duplicates", "together is for data.validation=hash: leave one out"))
        found += super().problems(run)
        return missing + list(dict.fromkeys(found))

    def notes(self) -> list[str]:
        return [*super().notes(), *self._lost(), *(note for source in self.sources.values() for note in source.notes())]

    def find(self) -> Manifest | None:
        if self.tokenizer is None or not self.sources:  # `problems` tells
            return None
        if self.shards_key is not None and (folder := Path(self.shards_dir, self.shards_key)).is_dir():
            return load(folder)
        return self._preparation().find()

    def _preparation(self) -> Preparation:
        assert self.tokenizer is not None, "problems() tells"
        for source in self.sources.values():
            source.sampled = self.fingerprint == "sampled"
        return Preparation(
            self.sources,
            self.tokenizer,
            self.shards_dir,
            self.validation_fraction,
            validation=self.validation,
            near_duplicates_together=self.near_duplicates == "together",
            filters=self.filters,
        )

    def prepare_data(self, engine: Engine | None = None) -> None:
        """Make the shards if they are not there, as `prepare.run` does and raises; they may be under way afterwards."""
        if self.is_prepared:
            return
        told = global_rank() == 0
        if told:
            say(f"Preparing data: {', '.join(self.sources)} → {self.shards_dir} (once; the next run finds it)")
        if (made := prepare.run(self._preparation(), engine)) is None:
            return
        self.use(made)
        for source, train in self.manifest.splits["train"].items() if told else ():
            bytes_per_token = f"{train.bytes / train.tokens:.2f} bytes per token"
            held_out = self.manifest.splits["val"][source].tokens
            say(f"  {source}: {train.tokens:,} tokens to train on ({bytes_per_token}), {held_out:,} held out")
        if told and (overlap := prepare.told_overlap(self.manifest.folder)):
            say(f"  {overlap}")
