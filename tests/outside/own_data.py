"""Data as somebody else would write it: one that owes us nothing but its batches, and one that reads our shards."""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from thunderhead.core.data.datamodule import Entry
from thunderhead.core.data.manifest import SplitName
from thunderhead.core.data.order import Sample
from thunderhead.core.data.shard_datamodule import Blocks
from thunderhead.corpus.prepared_shards import PreparedShards


class Progressions(Dataset[Tensor]):
    """Arithmetic progressions modulo a number: sequence n is (T+1,) tokens with a first term and a step of its own."""

    def __init__(self, first: int, count: int, modulus: int, length: int):
        self.first, self.count, self.modulus, self.length = first, count, modulus, length

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, n: int) -> Tensor:
        if not 0 <= n < self.count:
            raise IndexError(n)
        start, step = divmod(self.first + n, self.modulus)
        return (start + step * torch.arange(self.length)) % self.modulus


class ProgressionData(lightning.LightningDataModule):
    """Lightning's own way, and what a run cannot know by itself: the vocabulary, its end, and what was drawn.

    Args:
        context_length: a sequence is one token longer.
        micro_batch_size: sequences of a batch.
        modulus: tokens; one more ends a document, and never comes.
        sequences: of an epoch.
    """

    def __init__(self, context_length: int, micro_batch_size: int, *, modulus: int = 17, sequences: int = 200):
        super().__init__()
        self.context_length, self.micro_batch_size = context_length, micro_batch_size
        self.modulus, self.sequences = modulus, sequences
        self.vocab_size, self.eos_id = modulus + 1, modulus

    def _loader(self, first: int, count: int) -> DataLoader[Tensor]:
        dataset = Progressions(first, count, self.modulus, self.context_length + 1)
        return DataLoader(dataset, batch_size=self.micro_batch_size)

    def train_dataloader(self) -> DataLoader[Tensor]:
        return self._loader(0, self.sequences)

    def val_dataloader(self) -> DataLoader[Tensor]:
        return self._loader(self.sequences, 8)

    def ledger(self, steps: int) -> Callable[[int], dict[str, Entry]]:
        return lambda n: {"progressions": Entry(n * self.context_length, 1.0, n / self.sequences)}


@dataclass(eq=False, repr=False)
class Backwards(PreparedShards):
    """Our shards, each block read from its end.

    Args:
        every: blocks whose number is a multiple of this; others are read as they are.
    """

    _: KW_ONLY
    every: int = 1

    def dataset(self, split: SplitName, sources: list[str], place: Callable[[int], Sample], samples: int) -> Blocks:
        blocks = super().dataset(split, sources, place, samples)
        blocks.__class__ = BackwardBlocks
        blocks.every = self.every
        return blocks


class BackwardBlocks(Blocks):
    """Some blocks, from their end."""

    every: int

    def __getitems__(self, samples: list[int]) -> Tensor:
        batch = super().__getitems__(samples)
        turned = torch.tensor([n % self.every == 0 for n in samples])
        return torch.where(turned[:, None], batch.flip(1), batch)
