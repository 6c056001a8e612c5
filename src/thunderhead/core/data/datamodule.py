"""Batches of tokens for Lightning: (B, T+1) token ids, inputs and targets in one.

B: sequences of a micro-batch. T: model.context_length. Any LightningDataModule that yields such batches will do, and of
what `RunData` says it may leave out all but vocab_size.
"""

import math
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any, NamedTuple

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from thunderhead.core.config import Problem
from thunderhead.core.types import NonNegativeInt

# Lightning needs a length: without one it skips a batch when it resumes. The trainer's max_steps ends training.
ENDLESS = 2**40
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
"""To whom trains: it saves first, and then ends its loaders' workers."""


class Entry(NamedTuple):
    """What a source gave to the first samples of a run."""

    tokens: int
    share: float
    epochs: float


class Draw(NamedTuple):
    """What a run draws from its data."""

    steps: int  # fewer than were asked for, where the data ends
    epochs: dict[str, float] | None = None  # of each source; None: not known yet; empty: nothing is repeated
    shares: dict[str, float] | None = None  # of each source in the run's tokens
    notes: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()  # why such a run is refused


class RunData(lightning.LightningDataModule):
    """What a run asks its data, answered by one that has nothing to say. `tokenizer`, if there is one, writes text."""

    vocab_size: int  # before the data is prepared, what it will be at most
    eos_id: int | None = None
    is_prepared: bool = True  # whether prepare_data has nothing to make
    epoch_tokens: int | None = None  # trained tokens of one pass; None: not known yet, or there are no passes
    validation_tokens: int | None = None  # of one validation; None: not known
    unigram_entropy: float | None = None  # nats a target of who knows only how frequent each token is

    def problems(self, run: Any) -> list[Problem]:
        """Say what is wrong with the data, or does not go together with the run; reads only beginnings of files."""
        return []

    def notes(self) -> list[str]:
        """Say what a plan should tell about the data."""
        return []

    def draw(self, steps: int) -> Draw:
        """Work out what so many steps draw."""
        return Draw(steps)

    def ledger(self, steps: int) -> Callable[[int], dict[str, Entry]]:
        """Keep the books of a run of so many steps: what each source gave to its first n samples."""
        return lambda samples: {}

    def summary(self) -> dict[str, Any]:
        """Return as plain values what the record says the run was trained on."""
        return {}

    def validation_sources(self) -> list[str]:
        """Name the validation loaders."""
        return ["all"]

    def validation_metrics(self, source: str) -> dict[str, Any]:
        """Make what is measured in a source's validation beside the loss, by name."""
        return {}

    def validation_data(self) -> str | None:
        """Hash the tokens that are validated on, and how many are seen before each: losses of equal ones compare."""
        return None

    def validation_text(self) -> str | None:
        """Hash the text behind these tokens: bits per byte of equal ones compare."""
        return None

    def validation_documents(self, source: str) -> tuple[Any, int] | None:
        """Return the targets of each document of a source, in the order of its samples, and the bytes of them all.

        None where samples are no documents in a row, T targets each.
        """
        return None

    def sample(self, decoder: Any, device: torch.device) -> str | None:
        """Let the model show what it can; None: by going on with a prompt, as any model of text."""
        return None


def asked(data: lightning.LightningDataModule, name: str) -> Any:
    """Return an attribute or method of `RunData` as any LightningDataModule has it, or as `RunData` does."""
    if hasattr(data, name):
        return getattr(data, name)
    default = getattr(RunData, name)
    return partial(default, data) if callable(default) else default


class MicroBatches(Sampler[list[int]]):
    """The sample numbers of each micro-batch of one rank.

    Micro-batch m of rank r of W is samples first + (m·W + r)·B … + B - 1: over all ranks and in time, samples come in
    their order and none is left out, so W, B and the accumulation can change while the samples of a step do not.
    """

    def __init__(self, first: int, count: int, micro_batch_size: int, rank: int, world_size: int):
        stride = world_size * micro_batch_size
        self.starts = range(first + rank * micro_batch_size, first + count * stride, stride)
        self._size = micro_batch_size

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[list[int]]:
        return (list(range(start, start + self._size)) for start in self.starts)


class ResumableLoader(DataLoader[Tensor]):
    """A loader that Lightning takes for one that can resume, and so it is: the data module knows where to begin."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...

    def __iter__(self) -> Any:
        """Workers start deaf to signals to the process group, until `_apart` takes them out of it."""
        heard = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, heard)


@dataclass(eq=False, repr=False)
class TokenDataModule(RunData):
    """Load samples by their number, from the first that no optimizer step has used: that number is all the state.

    `Trainer` must be made with `use_distributed_sampler=False` (it raises otherwise), as ranks are told apart here.
    Subclasses are dataclasses, too, so that the settings of all stand in their signature. They say what the samples
    are: `train_dataset(steps)`, `validation_blocks()` and `val_dataset(source)`.

    - num_workers: processes that load; 0 is fastest (one process reads 100 M tokens/s, sending them costs more).
    """

    context_length: int  # T; a sample is T+1 tokens
    micro_batch_size: int  # B, sequences of one forward pass on one device
    sequences_per_step: int  # of one optimizer step over all devices and accumulated micro-batches
    seed: int  # of the order
    _: KW_ONLY
    num_workers: NonNegativeInt = 0

    def __post_init__(self) -> None:
        super().__init__()
        self._first_sample = 0
        self._first_step: int | None = 0  # the global step at which _first_sample is next; None: wherever we resume
        self._order_before: dict[str, Any] = {}  # what the samples before the resume depended on

    def train_dataset(self, steps: int) -> Dataset[Tensor]:
        """Give access to the training samples by their number, for a run of so many steps."""
        raise NotImplementedError

    def validation_blocks(self) -> dict[str, int]:
        """Say on how many samples of each source to validate, at least one."""
        raise NotImplementedError

    def val_dataset(self, source: str) -> Dataset[Tensor]:
        """Give access to the samples of a source for validation by their number, always the same."""
        raise NotImplementedError

    def validation_sources(self) -> list[str]:
        """Name the validation loaders: there is one for each source."""
        return list(self.validation_blocks())

    @property
    def validation_tokens(self) -> int | None:  # type: ignore[override]
        return self.context_length * sum(self.validation_blocks().values()) if self.is_prepared else None

    def order_state(self, samples: int) -> dict[str, Any]:
        """Return all that the order of the first samples depends on, as plain values by the names of the settings."""
        return {"seed": self.seed, "model.context_length": self.context_length}

    def data_parallel(self) -> tuple[int, int]:
        """Say (rank, world size) among the processes that see different data.

        Ranks that share a model's tensors share the data, too: the strategy knows, or a subclass.
        """
        assert self.trainer is not None
        kwargs = getattr(self.trainer.strategy, "distributed_sampler_kwargs", None)
        if kwargs is None:
            return self.trainer.global_rank, self.trainer.world_size
        return kwargs["rank"], kwargs["num_replicas"]

    @property
    def samples_seen(self) -> int:
        """Samples that the optimizer steps until now were made from."""
        if self.trainer is None or self._first_step is None:
            return self._first_sample
        return self._first_sample + (self.trainer.global_step - self._first_step) * self.sequences_per_step

    def state_dict(self) -> dict[str, Any]:
        """Return all there is to resume from, samples_seen, and what their order depended on."""
        return {"samples": self.samples_seen, "order": self.order_state(self.samples_seen)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after `samples` samples, whatever the ranks and micro-batches were then."""
        self._first_sample, self._first_step = int(state_dict["samples"]), None
        self._order_before = state_dict["order"]

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Load from the first sample that no step has used.

        Raises ValueError if the ranks cannot divide a step, or if the samples before would not come in the order in
        which they came before the run was resumed, so that some would be repeated and others left out.
        """
        rank, world_size = self.data_parallel()
        if self.sequences_per_step % (world_size * self.micro_batch_size) != 0:
            raise ValueError(
                f"batch: {self.sequences_per_step} sequences a step are no multiple of {world_size} ranks ×"
                f" batch.micro_size={self.micro_batch_size}"
            )
        assert self.trainer is not None
        self._first_sample, self._first_step = self.samples_seen, self.trainer.global_step
        dataset = self.train_dataset(self.trainer.max_steps)
        now, before = self.order_state(self._first_sample), self._order_before
        if changed := [name for name in {**now, **before} if before and before.get(name) != now.get(name)]:
            raise ValueError(
                f"resume: {' and '.join(changed)} changed since the checkpoint, so that its first"
                f" {self._first_sample:,} samples would have come in another order: set them back"
            )
        return self._loader(dataset, MicroBatches(self._first_sample, ENDLESS, self.micro_batch_size, rank, world_size))

    def val_dataloader(self) -> list[DataLoader[Tensor]]:
        """Load each source's samples for validation, each once over all ranks.

        All batches of a loader have one size, and all ranks as many of them: the last ones are filled up with samples
        in which no target counts.
        """
        rank, world_size = self.data_parallel()
        loaders = []
        for source, samples in self.validation_blocks().items():
            share = math.ceil(samples / world_size)
            count = math.ceil(share / self.micro_batch_size)
            batches = MicroBatches(0, count, math.ceil(share / count), rank, world_size)
            loaders.append(self._loader(FilledUp(self.val_dataset(source), samples), batches))
        return loaders

    def _loader(self, dataset: Dataset[Tensor], batches: MicroBatches) -> DataLoader[Tensor]:
        assert self.trainer is not None
        return ResumableLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=_as_it_is,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            worker_init_fn=_apart,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
            generator=torch.Generator().manual_seed(0),  # else it draws from the global one, and changes dropout
        )


def _apart(worker: int) -> None:
    """Keep a worker from signals to the process group, as Ctrl-C, and drop those that came while it started."""
    os.setpgrp()
    while pending := signal.sigpending():
        signal.sigwait(pending)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)


def _as_it_is(batch: Any) -> Any:
    """Pass a batch on: the dataset has stacked it."""
    return batch


class FilledUp(Dataset[Tensor]):
    """The first samples of a dataset, and after them the last once more, as often as asked, none of it to be predicted.

    A token that is read and not predicted is a negative number, see `core.module.inputs_and_targets`.
    """

    def __init__(self, dataset: Any, samples: int):
        self.dataset, self._samples = dataset, samples

    def __len__(self) -> int:
        return self._samples

    def __getitems__(self, samples: list[int]) -> Tensor:
        """Read a batch: (B, T+1)."""
        batch: Tensor = self.dataset.__getitems__([min(n, self._samples - 1) for n in samples])
        is_more_B1 = torch.tensor(samples)[:, None] >= self._samples
        return torch.where(is_more_B1 & (batch >= 0), ~batch, batch)
