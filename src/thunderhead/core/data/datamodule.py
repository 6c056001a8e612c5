"""Batches of tokens for Lightning: (B, T+1) token ids, inputs and targets in one.

B: sequences of a micro-batch. T: model.context_length.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import lightning
import numpy as np
import torch
from annotated_types import Gt, Lt
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from thunderhead.core.data.manifest import Manifest, Shard, SplitName, verify
from thunderhead.core.data.mixture import AtMaxEpochs, Entry, Ledger, Mixture, Turns, plan_turns, trained_blocks
from thunderhead.core.data.order import blocks, check_blocks, spread
from thunderhead.core.data.shards import Chunks, LocalChunks, ShardReader, blocks_per_chunk
from thunderhead.core.types import NonNegativeInt, PositiveFloat, PositiveInt
from thunderhead.corpus.prefetch import Prefetcher
from thunderhead.corpus.prepare import check_sources, find_manifest, prepare
from thunderhead.corpus.sources import Source
from thunderhead.corpus.tokenizer import Tokenizer

# Lightning needs a length: without one it skips a batch when it resumes. The trainer's max_steps ends training.
ENDLESS = 2**40


class Blocks(Dataset[Tensor]):
    """Blocks of tokens by sample number; a list of numbers gives a batch (B, T+1) of int64."""

    def __init__(self, readers: Mapping[str, ShardReader], place: Callable[[int], tuple[str, int]], samples: int):
        self.readers, self.place, self._samples = readers, place, samples
        self.prefetcher: Prefetcher | None = None  # for shards that do not lie on this machine

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, n: int) -> Tensor:
        """Read sample n: (T+1,)."""
        return self.__getitems__([n])[0]

    def __getitems__(self, samples: list[int]) -> Tensor:
        """Read a micro-batch at once, as torch's loader asks where it can: (B, T+1)."""
        if self.prefetcher is not None:
            self.prefetcher.reached(samples[0])
        places = [self.place(n) for n in samples]
        blocks = [self.readers[source].view(block) for source, block in places]
        batch = np.empty((len(blocks), len(blocks[0])), dtype=np.int64)
        for row, block in zip(batch, blocks, strict=True):
            row[:] = block  # faster than np.stack, by a fifth
        return torch.from_numpy(batch)


class TrainingPlace:
    """Where sample n of the training order lies: (source, block)."""

    def __init__(self, mixture: Mixture):
        self._mixture = mixture

    def __call__(self, n: int) -> tuple[str, int]:
        """Look up sample n."""
        source, _, block = self._mixture(n)
        return source, block


class ValidationPlace:
    """Where validation sample n of `samples` lies: they are spread evenly over the split."""

    def __init__(self, source: str, samples: int, n_blocks: int):
        self._source, self._samples, self._n_blocks = source, samples, n_blocks

    def __call__(self, n: int) -> tuple[str, int]:
        """Look up sample n."""
        return self._source, spread(n, self._samples, self._n_blocks)


class MicroBatches(Sampler[list[int]]):
    """The sample numbers of each micro-batch of one rank.

    Micro-batch m of rank r of W is samples first + (m·W + r)·B … + B - 1: over all ranks and in time, samples come in
    their order and none is left out, so W, B and the accumulation can change while the samples of a step do not.
    """

    def __init__(self, first: int, count: int, micro_batch_size: int, rank: int, world_size: int):
        self._first, self._count, self._size = first, count, micro_batch_size
        self._rank, self._world_size = rank, world_size

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[list[int]]:
        for m in range(self._count):
            start = self._first + (m * self._world_size + self._rank) * self._size
            yield list(range(start, start + self._size))


class ResumableLoader(DataLoader[Tensor]):
    """A loader that Lightning takes for one that can resume, and so it is: the data module knows where to begin."""

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: see `TokenDataModule.state_dict`."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take nothing."""


class TokenDataModule(lightning.LightningDataModule):
    """Prepare shards if need be, check them, and load batches in the order of `thunderhead.core.data.mixture`.

    The state is the number of samples consumed by optimizer steps; `Trainer` must be made with
    `use_distributed_sampler=False` (it raises otherwise), as ranks are told apart here.

    Args:
        tokenizer: kind and settings; the trained one lies beside the shards (`manifest.load_tokenizer()`).
        context_length: T; a sample is T+1 tokens.
        micro_batch_size: B, sequences of one forward pass on one device.
        sequences_per_step: sequences of one optimizer step over all devices and accumulated micro-batches.
        seed: of the order.
        sources: where the text comes from, by name.
        path: a place for data.path=…, for sources to refer to as ${data.path}.
        shards_dir: folder for shards of all corpora, each under its own key.
        validation_fraction: share of the documents, chosen by hash, that is never trained on.
        max_training_tokens: train on so many tokens again and again: a fixed selection of blocks spread evenly over
            each source's training split, the same for all seeds; None: on all. Validation stays what it is.
        max_validation_tokens: validate on at most so many tokens: a fixed selection spread evenly over the split.
        shuffle_window: blocks that are shuffled together (see `Order`).
        num_workers: processes that load; 0 is fastest (one process reads 100 M tokens/s, sending them costs more).
        temperature: weights become proportional to weight^(1/temperature) (Arivazhagan et al. 1907.05019).
        at_max_epochs: when a source reaches its max_epochs, the others take its place (redistribute), or the run ends
            (stop).
        verify: compare the sha256 of all chunks with the manifest at the start (full), or of each chunk before its
            first token is used (first_use: a start that does not grow with the corpus; sizes are compared at once).
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        context_length: int,
        micro_batch_size: int,
        sequences_per_step: int,
        seed: int,
        *,
        sources: Mapping[str, Source],
        path: str | None = None,
        shards_dir: str = "data/shards",
        validation_fraction: Annotated[float, Gt(0), Lt(1)] = 0.05,
        max_training_tokens: PositiveInt | None = None,
        max_validation_tokens: PositiveInt = 65_536,
        shuffle_window: PositiveInt = 65_536,
        num_workers: NonNegativeInt = 0,
        temperature: PositiveFloat = 1.0,
        at_max_epochs: AtMaxEpochs = "redistribute",
        verify: Literal["full", "first_use"] = "first_use",
    ):
        super().__init__()
        self.tokenizer, self.sources, self.path = tokenizer, sources, path
        self.context_length, self.micro_batch_size = context_length, micro_batch_size
        self.sequences_per_step, self.seed = sequences_per_step, seed
        self.shards_dir, self.validation_fraction = shards_dir, validation_fraction
        self.max_training_tokens, self.max_validation_tokens = max_training_tokens, max_validation_tokens
        self.shuffle_window = shuffle_window
        self.num_workers, self.verify = num_workers, verify
        self.temperature, self.at_max_epochs = temperature, at_max_epochs
        self.manifest: Manifest | None = None  # may be given beforehand; else it is looked up or made
        self._first_sample = 0
        self._first_step: int | None = 0  # the global step at which _first_sample is next; None: wherever we resume
        self._mixture: Mixture | None = None
        self._order_before: dict[str, Any] | None = None  # what the samples before the resume depended on

    def prepare_data(self) -> None:
        """Make the shards if they are not there (one process a machine)."""
        if self.manifest is None:
            check_sources(self.sources, self.path)
            prepare(self.sources, self.tokenizer, **self._settings())

    def setup(self, stage: str) -> None:
        """Find the shards and compare them with their manifest.

        Raises:
            ValueError: they are damaged (a `ShardError`), or too small for the context length.
        """
        if self.manifest is None:
            self.manifest = find_manifest(self.sources, self.tokenizer, **self._settings())
            assert self.manifest is not None, "prepare_data comes first"
        check_blocks(self.manifest, self.context_length)
        self._trained_blocks()
        self._verify()

    def _verify(self) -> None:
        """Compare the files with the manifest, as far as is asked for at the start."""
        assert self.manifest is not None
        verify(self.manifest, "full" if self.verify == "full" else "sizes")

    def _settings(self) -> dict[str, Any]:
        return {"shards_dir": self.shards_dir, "validation_fraction": self.validation_fraction}

    def data_parallel(self) -> tuple[int, int]:
        """Say (rank, world size) among the processes that see different data.

        Ranks that share a model's tensors share the data, too: the strategy knows, or a subclass.
        """
        trainer = self.trainer
        assert trainer is not None
        kwargs = getattr(trainer.strategy, "distributed_sampler_kwargs", None)
        if kwargs is None:
            return trainer.global_rank, trainer.world_size
        return kwargs["rank"], kwargs["num_replicas"]

    # --- training ----------------------------------------------------------------------------------------------------

    @property
    def samples_seen(self) -> int:
        """Samples that the optimizer steps until now were made from."""
        if self.trainer is None or self._first_step is None:
            return self._first_sample
        return self._first_sample + (self.trainer.global_step - self._first_step) * self.sequences_per_step

    def state_dict(self) -> dict[str, Any]:
        """Return all there is to resume from, samples_seen, and what their order depended on."""
        return {"samples": self.samples_seen, "order": self._order_of(self.samples_seen)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after `samples` samples, whatever the ranks and micro-batches were then."""
        self._first_sample, self._first_step = int(state_dict["samples"]), None
        self._order_before = state_dict["order"]

    def _order_of(self, samples: int) -> dict[str, Any] | None:
        """Return all that the order of the first samples depends on, as plain values by the names of the settings."""
        if self._mixture is None or self.manifest is None:
            return None
        chunks = {
            source: [chunk.sha256 for chunk in shard.chunks] for source, shard in self.manifest.splits["train"].items()
        }
        return {
            "seed": self.seed,
            "model.context_length": self.context_length,
            "data.shuffle_window": self.shuffle_window,
            "the training data": hashlib.sha256(str(sorted(chunks.items())).encode()).hexdigest(),
            "the weights and max_epochs of data.sources": self._mixture.turns.until(samples),
            **({"data.max_training_tokens": limit} if (limit := self.max_training_tokens) is not None else {}),
        }

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Load from the first sample that no step has used.

        Raises:
            ValueError: the ranks cannot divide a step; or the samples before would not come in the order in which they
                came before the run was resumed, so that some would be repeated and others left out.
        """
        rank, world_size = self.data_parallel()
        per_pass = world_size * self.micro_batch_size
        if self.sequences_per_step % per_pass != 0:
            raise ValueError(
                f"batch: {self.sequences_per_step} sequences a step are no multiple of {world_size} ranks ×"
                f" batch.micro_size={self.micro_batch_size}"
            )
        assert self.trainer is not None
        self._first_sample, self._first_step = self.samples_seen, self.trainer.global_step
        turns, counts = self._turns(self.trainer.max_steps), self._block_counts()
        self._mixture = Mixture(
            turns, counts, seed=self.seed, window=self.shuffle_window, trained=self._trained_blocks()
        )
        now = self._order_of(self._first_sample)
        if self._order_before is not None and now is not None and self._order_before != now:
            names = dict.fromkeys([*now, *self._order_before])
            other = [name for name in names if self._order_before.get(name) != now.get(name)]
            raise ValueError(
                f"resume: {' and '.join(other)} changed since the checkpoint, so that its first"
                f" {self._first_sample:,} samples would have come in another order: set them back"
            )
        batches = MicroBatches(self._first_sample, ENDLESS, self.micro_batch_size, rank, world_size)
        dataset = self._dataset("train", list(counts), TrainingPlace(self._mixture), ENDLESS)
        return self._loader(dataset, batches)

    def ledger(self, steps: int) -> Callable[[int], dict[str, Entry]]:
        """Keep the books of a run of so many steps: what each source gave to its first n samples."""
        return Ledger(self._turns(steps), self._trained_blocks(), self.context_length)

    def _block_counts(self) -> dict[str, list[int]]:
        """Training blocks in each chunk, by source."""
        assert self.manifest is not None
        train = self.manifest.splits["train"]
        return {source: blocks_per_chunk(shard, self.context_length) for source, shard in train.items()}

    def _trained_blocks(self) -> dict[str, int]:
        """Blocks of each source that are trained on."""
        available = {source: sum(sizes) for source, sizes in self._block_counts().items()}
        return trained_blocks(available, self.context_length, self.max_training_tokens)

    def _turns(self, steps: int) -> Turns:
        return plan_turns(
            self.sources,
            self._trained_blocks(),
            temperature=self.temperature,
            at_max_epochs=self.at_max_epochs,
            steps=steps,
            sequences_per_step=self.sequences_per_step,
        )

    # --- validation --------------------------------------------------------------------------------------------------

    def val_dataloader(self) -> list[DataLoader[Tensor]]:
        """Load a fixed selection of each source's validation split, each block once over all ranks.

        There is a loader for each source, in the order of the manifest, and each has an equal share of
        max_validation_tokens. All batches of a loader have one size: the largest up to the micro-batch that divides a
        rank's share.
        """
        rank, world_size = self.data_parallel()
        assert self.manifest is not None
        loaders, sources = [], list(self.manifest.splits["val"])
        wanted = self.max_validation_tokens // self.context_length // len(sources)
        for source in sources:
            n_blocks = blocks(self.manifest, source, self.context_length, "val")
            try:
                samples = validation_samples(n_blocks, wanted, world_size)
            except ValueError as error:
                raise ValueError(f"data.sources.{source}: {error}") from None
            share = samples // world_size
            size = max(size for size in range(1, self.micro_batch_size + 1) if share % size == 0)
            dataset = self._dataset("val", [source], ValidationPlace(source, samples, n_blocks), samples)
            loaders.append(self._loader(dataset, MicroBatches(0, share // size, size, rank, world_size)))
        return loaders

    def _dataset(
        self, split: SplitName, sources: Sequence[str], place: Callable[[int], tuple[str, int]], samples: int
    ) -> Blocks:
        """Read the samples that `place` finds in a split of the sources."""
        assert self.manifest is not None
        readers = {
            source: ShardReader(self._chunks(split, source, shard), shard, self.context_length, self.manifest.dtype)
            for source in sources
            for shard in [self.manifest.splits[split][source]]
        }
        return Blocks(readers, place, samples)

    def _chunks(self, split: SplitName, source: str, shard: Shard) -> Chunks:
        """Give access to the files of a shard."""
        assert self.manifest is not None
        folder = self.manifest.shard_folder(split, source)
        return LocalChunks(folder, shard, verify_on_first_use=self.verify == "first_use")

    def _loader(self, dataset: Dataset[Tensor], batches: MicroBatches) -> DataLoader[Tensor]:
        assert self.trainer is not None
        return ResumableLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=_as_it_is,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
            generator=torch.Generator().manual_seed(0),  # else it draws from the global one, and changes dropout
        )


def _as_it_is(batch: Any) -> Any:
    """Pass a batch on: the dataset has stacked it."""
    return batch


def validation_samples(n_blocks: int, wanted: int, world_size: int) -> int:
    """Decide how many blocks to validate on: the same for 1, 2, 4 … ranks and any micro-batch, so losses compare.

    That is min(n_blocks, wanted), cut to a multiple of a power of two (64, less for few blocks: at most 1 in 8 is
    cut), and further to a multiple of the ranks where these do not divide it.

    Raises:
        ValueError: there are fewer blocks than ranks.
    """
    samples = min(n_blocks, max(wanted, 1))
    multiple = min(64, 2 ** ((samples // 8).bit_length() - 1)) if samples >= 8 else 1
    samples -= samples % multiple
    samples -= samples % world_size
    if samples == 0:
        raise ValueError(
            f"the validation split has {n_blocks} blocks and data.max_validation_tokens allows {wanted}, fewer than the"
            f" {world_size} ranks: raise data.validation_fraction or data.max_validation_tokens"
        )
    return samples
