"""Training on text: its shards are made if they are not there."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Any

from annotated_types import Gt, Lt
from typing_extensions import override

from thunderhead.core.config import Problem
from thunderhead.core.data.manifest import Manifest
from thunderhead.core.processes import global_rank
from thunderhead.core.terminal import say
from thunderhead.corpus.document_batches import check_sources
from thunderhead.corpus.prepare import find_manifest, prepare
from thunderhead.corpus.shard_data import ShardData, refusals
from thunderhead.corpus.sources import Source


@dataclass(eq=False, repr=False)
class TextData(ShardData):
    """Prepare the shards of some text if need be, and load their blocks.

    Args:
        sources: where the text comes from, by name.
        path: a place for data.path=…, for sources to refer to as ${data.path}.
        shards_dir: folder for shards of all corpora, each under its own key.
        validation_fraction: share of the documents, chosen by hash, that is never trained on.
    """

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
        if self.tokenizer is None or not self.sources:  # `problems` tells
            return None
        return find_manifest(self.sources, self.tokenizer, **self._made_by())

    def _made_by(self) -> dict[str, Any]:
        names = ("shards_dir", "validation_fraction", "filters")
        return {name: getattr(self, name) for name in names}

    @override
    def prepare_data(self) -> None:
        self.prepare()

    def prepare(self, processes: int | None = None) -> Manifest:
        """Make the shards if they are not there, with so many processes (None: one for each core).

        Raises:
            ValueError: see `thunderhead.corpus.prepare.prepare`.
            ConnectionError: the network failed; what was done is kept.
        """
        if self.is_prepared:
            return self.manifest
        assert self.tokenizer is not None, "problems() tells"
        if global_rank() == 0:
            say(f"Preparing data: {', '.join(self.sources)} → {self.shards_dir} (once; the next run finds it)")
        self.use(prepare(self.sources, self.tokenizer, processes=processes, **self._made_by()))
        for source, train in self.manifest.splits["train"].items() if global_rank() == 0 else ():
            say(
                f"  {source}: {train.tokens:,} tokens to train on ({train.bytes / train.tokens:.2f} bytes per token), "
                f"{self.manifest.splits['val'][source].tokens:,} held out"
            )
        return self.manifest
