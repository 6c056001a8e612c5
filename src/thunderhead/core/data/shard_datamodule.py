"""From a manifest to batches: which block is sample n, read it, stack a micro-batch (B, T+1)."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from thunderhead.core.data.datamodule import ENDLESS, TokenDataModule
from thunderhead.core.data.documents import DocumentReader, Selection
from thunderhead.core.data.manifest import Manifest, SplitName
from thunderhead.core.data.order import Order, Sample
from thunderhead.core.data.shards import ShardReader
from thunderhead.core.metrics import BitsPerByte
from thunderhead.core.types import PositiveInt


class Blocks(Dataset[Tensor]):
    """Blocks of tokens by sample number; a list of numbers gives a batch (B, T+1) of int64."""

    def __init__(self, readers: Mapping[str, ShardReader], place: Callable[[int], Sample], samples: int):
        self.readers, self.place, self._samples = readers, place, samples
        self.on_read: Callable[[int], None] | None = None  # is told the number of the first sample of each batch

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, n: int) -> Tensor:
        """Read sample n: (T+1,)."""
        return self.__getitems__([n])[0]

    def __getitems__(self, samples: list[int]) -> Tensor:
        """Read a micro-batch at once, as torch's loader asks where it can: (B, T+1)."""
        if self.on_read is not None:
            self.on_read(samples[0])
        places = [self.place(n) for n in samples]
        blocks = [self.readers[source].view(block) for source, _, block in places]
        batch = np.empty((len(blocks), len(blocks[0])), dtype=np.int64)
        for row, block in zip(batch, blocks, strict=True):
            row[:] = block  # faster than np.stack, by a fifth
        return torch.from_numpy(batch)


@dataclass(eq=False, repr=False)
class ShardDataModule(TokenDataModule):
    """Load blocks of the shards that `manifest` describes; here they have one source.

    Validation is on whole documents, each of their tokens once (see `Selection` and `DocumentReader`).

    - shuffle_window: blocks that are shuffled together (see `Order`).
    - max_validation_bytes: of the text that is validated on, divided equally among the sources; None: all that is held
      out. The same text for every tokenizer, context length, seed and number of ranks.
    - max_validation_tokens: leave out documents beyond so many tokens (divided, too): other tokenizers, other text.
    """

    _: KW_ONLY
    shuffle_window: PositiveInt = 65_536
    max_validation_bytes: PositiveInt | None = 262_144
    max_validation_tokens: PositiveInt | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.manifest: Manifest  # is set once there is one
        self._selected: dict[str, Selection] = {}

    def order(self, steps: int) -> Callable[[int], Sample]:
        """Say which block sample n of a run of so many steps is."""
        ((source, sizes),) = self.blocks("train").items()
        return Order(source, sizes, seed=self.seed, window=self.shuffle_window)

    def chunk_file(self, split: SplitName, source: str) -> Callable[[int], Path]:
        """Say where the chunks of a shard lie, by their number."""
        folder, chunks = self.manifest.shard_folder(split, source), self.manifest.splits[split][source].chunks
        return [folder.absolute() / chunk.filename for chunk in chunks].__getitem__

    def blocks(self, split: SplitName) -> dict[str, list[int]]:
        """Count the blocks in each chunk, by source."""
        return {source: shard.blocks(self.context_length) for source, shard in self.manifest.splits[split].items()}

    def order_state(self, samples: int) -> dict[str, Any]:
        """Return all that the order of the first samples depends on."""
        train = self.manifest.splits["train"]
        chunks = {source: [chunk.sha256 for chunk in shard.chunks] for source, shard in train.items()}
        return super().order_state(samples) | {
            "data.shuffle_window": self.shuffle_window,
            "the training data": hashlib.sha256(str(sorted(chunks.items())).encode()).hexdigest(),
        }

    def train_dataset(self, steps: int) -> Blocks:
        """Read blocks of all sources, in their order."""
        return self.dataset("train", list(self.manifest.sources), self.order(steps), ENDLESS)

    def selection(self, source: str) -> Selection:
        """Say which documents of a source are validated on; raises ShardError if their list is damaged."""
        if source not in self._selected:
            bounds = self.max_validation_bytes, self.max_validation_tokens
            parts = (None if bound is None else bound // len(self.manifest.sources) for bound in bounds)
            self._selected[source] = Selection.of(self.manifest.load_documents(source), *parts)
        return self._selected[source]

    def validation_sources(self) -> list[str]:
        """Name the validation loaders: there is one for each source."""
        return list(self.manifest.sources)

    def validation_blocks(self) -> dict[str, int]:
        """Count the blocks of the documents that are validated on."""
        return {source: self.selection(source).blocks(self.context_length) for source in self.validation_sources()}

    def validation_metrics(self, source: str) -> dict[str, Any]:
        """Make what is measured in a source's validation beside the loss: bits per byte."""
        selection = self.selection(source)
        return {"bits_per_byte": BitsPerByte(selection.bytes / int(selection.tokens.sum()))}

    def validation_documents(self, source: str) -> tuple[Any, int]:
        """Return the tokens of each document that is validated on, its EOS included, and the bytes of their text."""
        return self.selection(source).tokens, self.selection(source).bytes

    def val_dataset(self, source: str) -> Blocks:
        """Read the documents that are validated on, as one text."""
        return self.dataset("val", [source], partial(Sample, source, 0), self.validation_blocks()[source])

    def dataset(self, split: SplitName, sources: list[str], place: Callable[[int], Sample], samples: int) -> Blocks:
        """Read the samples that `place` finds in a split of the sources."""
        return Blocks({source: self._reader(split, source) for source in sources}, place, samples)

    def _reader(self, split: SplitName, source: str) -> ShardReader:
        manifest, file = self.manifest, self.chunk_file(split, source)
        asked = file, manifest.splits[split][source], self.context_length, manifest.dtype
        if split == "train":
            return ShardReader(*asked)
        return DocumentReader(*asked, selection=self.selection(source), eos_id=manifest.eos_id)
