"""Training on text: its shards are made if they are not there."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Any

from annotated_types import Gt, Lt
from lightning.fabric.utilities.rank_zero import rank_zero_only
from typing_extensions import override

from thunderhead.core.config import Problem
from thunderhead.core.data.datamodule import refusals
from thunderhead.core.data.manifest import Manifest
from thunderhead.core.terminal import say
from thunderhead.corpus.curation import Filter
from thunderhead.corpus.mixed_shards import MixedShards
from thunderhead.corpus.prepare import check_sources, find_manifest, prepare
from thunderhead.corpus.sources import Source
from thunderhead.corpus.tokenizer import Tokenizer


@dataclass(eq=False, repr=False)
class TextData(MixedShards):
    """Prepare the shards of some text if need be, and load their blocks.

    Args:
        tokenizer: kind and settings; once the shards are there, the trained one that lies beside them.
        filters: decide in their order which documents are kept.
        sources: where the text comes from, by name.
        path: a place for data.path=…, for sources to refer to as ${data.path}.
        shards_dir: folder for shards of all corpora, each under its own key.
        validation_fraction: share of the documents, chosen by hash, that is never trained on.
    """

    tokenizer: Tokenizer | None
    filters: Mapping[str, Filter]
    _: KW_ONLY
    sources: Mapping[str, Source]
    path: str | None = None
    shards_dir: str = "data/shards"
    validation_fraction: Annotated[float, Gt(0), Lt(1)] = 0.05

    @override
    def shares(self) -> Mapping[str, Source]:
        return self.sources

    @override
    def problems(self, run: Any) -> list[Problem]:
        missing = [Problem("tokenizer", "needs an option: tokenizer=bpe")] if self.tokenizer is None else []
        found = [*refusals(lambda: check_sources(self.sources, self.path)), *super().problems(run)]
        return missing + list(dict.fromkeys(found))

    @override
    def find(self) -> Manifest | None:
        if self.tokenizer is None or not self.sources:
            return None
        return find_manifest(self.sources, self.tokenizer, filters=self.filters, **self._place_of_shards())

    def _place_of_shards(self) -> dict[str, Any]:
        return {"shards_dir": self.shards_dir, "validation_fraction": self.validation_fraction}

    @override
    def prepare_data(self) -> None:
        self.prepare()

    def prepare(self, processes: int | None = None) -> Manifest:
        """Make the shards if they are not there, with so many processes (None: one for each core).

        Raises:
            ValueError: see `thunderhead.corpus.prepare.prepare`.
            ConnectionError: the network failed; what was done is kept.
        """
        if (manifest := self.look_up()) is not None:
            return manifest
        assert self.tokenizer is not None, "problems() tells"
        tell = say if getattr(rank_zero_only, "rank", 0) == 0 else _say_nothing
        tell(f"Preparing data: {', '.join(self.sources)} → {self.shards_dir} (once; the next run finds it)")
        place = self._place_of_shards()
        manifest = prepare(self.sources, self.tokenizer, filters=self.filters, processes=processes, **place)
        self.use(manifest)
        for source, train in manifest.splits["train"].items():
            tell(
                f"  {source}: {train.tokens:,} tokens to train on ({train.bytes / train.tokens:.2f} bytes per token), "
                f"{manifest.splits['val'][source].tokens:,} held out"
            )
        return manifest


def _say_nothing(text: str) -> None:
    """Leave it to rank 0."""
