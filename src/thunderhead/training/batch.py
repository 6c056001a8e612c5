"""The group `batch`: tokens of an optimizer step, and how many sequences a device takes at once."""

import bisect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from thunderhead import processes
from thunderhead.core.types import PositiveInt

AUTO = "auto"
USABLE_MEMORY = 0.9
"""Of a device's memory, for what the plan counts: the rest goes to buffers, fragments and libraries."""
USABLE_HOST_MEMORY = 0.5
"""Of the host's free memory, for what the plan counts: libraries, data and other processes need theirs as well, and the
system kills a process that takes too much."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """How many tokens an optimizer step sees, and how many sequences a device takes at once.

    `global_tokens` are those of all devices and accumulated micro-batches. `micro_size` of None is 4, or the most below
    that divide what a rank takes in a step; `auto` is the largest power of two that fits into a device's memory by the
    plan's estimate and divides the sequences of a step.
    """

    global_tokens: PositiveInt
    micro_size: PositiveInt | Literal["auto"] | None = None

    def micro_batch(self, context_length: int, data_parallel_size: int) -> int | Literal["auto"]:
        """Sequences of one forward pass on one device."""
        if self.micro_size is not None:
            return self.micro_size
        of_a_rank = self.global_tokens // (context_length * data_parallel_size)
        return next((size for size in (4, 3, 2) if of_a_rank % size == 0 < of_a_rank), 1)

    def accumulation(self, context_length: int, data_parallel_size: int) -> int:
        """Micro-batches a step on each rank, exact; with `auto`, the sequences a step on each rank.

        Raises ValueError, with the nearest sizes, if the global batch is no whole number of micro-batches over all
        ranks.
        """
        chosen = self.micro_batch(context_length, data_parallel_size)
        size = 1 if chosen == AUTO else int(chosen)
        row = context_length * data_parallel_size  # tokens when every rank takes one sequence
        n, rest = divmod(self.global_tokens, row * size)
        if not rest:
            return n
        choices = [f"batch.global_tokens={k * row * size}" for k in (n, n + 1) if k]
        rows, rest = divmod(self.global_tokens, row)
        if not rest:
            nearest = min((n for n in range(1, rows + 1) if rows % n == 0), key=lambda n: abs(n - size))
            choices.append(f"batch.micro_size={nearest}")
        raise ValueError(
            f"batch.global_tokens={self.global_tokens} is not a multiple of the {row * size} tokens that "
            f"batch.micro_size={size} × model.context_length={context_length} × {data_parallel_size} "
            f"data-parallel rank(s) take at once: use {' or '.join(choices)}"
        )


def largest_that_fits(
    sequences: int, estimate: Callable[[int], dict[str, int]], memory: int, of_what: str
) -> tuple[int, str]:
    """The largest power of two that divides `sequences` and whose estimate is at most `memory`, and why.

    `sequences` are those of a rank in a step; `estimate` gives bytes of a device by part, see `memory.estimate`;
    `memory` are bytes that may be used there, and `of_what` says of what these are a part.

    Raises ValueError if not even one sequence fits, or activations cannot be estimated.
    """

    def needed(size: int) -> int:
        parts = estimate(size)
        if "activations" not in parts:
            raise ValueError(
                "batch.micro_size=auto: this model's activations cannot be estimated, as its code looks at values:"
                " write a number"
            )
        return sum(parts.values())

    sizes = [2**n for n in range(sequences.bit_length()) if sequences % 2**n == 0]
    n_fitting = bisect.bisect_right(sizes, memory, key=needed)
    available = f"{memory / 2**30:.2f} GiB, {of_what}"
    if n_fitting == 0:
        raise ValueError(
            f"batch.micro_size=auto: even one sequence needs about {needed(1) / 2**30:.2f} GiB of {available}: use a"
            " smaller model or model.context_length, or activation_checkpointing=block; a number is taken unasked"
        )
    size = sizes[n_fitting - 1]
    more = f"more do not divide the {sequences} sequences of a step"
    if n_fitting < len(sizes):
        more = f"{size * 2} would need {needed(size * 2) / 2**30:.2f} GiB"
    return size, f"by the estimate it needs {needed(size) / 2**30:.2f} GiB of {available}; {more}"


def usable_memory(accelerator: str, n_processes: int, assumed: int) -> tuple[int, str]:
    """Bytes that each of a host's processes may plan with, and of what; `assumed` is a GPU's that is not here."""
    if accelerator == "cuda":
        here = torch.cuda.is_available()
        total = torch.cuda.get_device_properties(0).total_memory if here else assumed
        return int(total * USABLE_MEMORY), f"{USABLE_MEMORY:.0%} of {'the GPU' if here else 'plan.memory_gib'}"
    share = f" for each of {n_processes} processes" if n_processes > 1 else ""
    free = processes.free_host_memory()
    return int(free * USABLE_HOST_MEMORY) // n_processes, f"{USABLE_HOST_MEMORY:.0%} of this host's free memory{share}"
