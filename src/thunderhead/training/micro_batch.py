"""batch.micro_size=auto: the largest micro-batch that fits into a device's memory, by the plan's estimate.

It is not tried: on a CPU too much memory ends the process instead of raising an error, and of several devices one that
runs out leaves the others waiting.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from thunderhead.training import hardware
from thunderhead.training.plan import USABLE_MEMORY

USABLE_HOST_MEMORY = 0.5
"""Of the host's free memory, for what the plan counts: libraries, data and other processes need theirs as well, and the
system kills a process that takes too much."""


class Choice(NamedTuple):
    """A micro-batch, and why."""

    size: int
    why: str


def sizes(sequences: int) -> list[int]:
    """The powers of two that divide what a rank takes in a step, ascending."""
    return [2**n for n in range(sequences.bit_length()) if sequences % 2**n == 0]


def largest(sizes: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """Try one size after the other until one does not fit; the last that did."""
    found = None
    for size in sizes:
        if not fits(size):
            break
        found = size
    return found


def by_estimate(sequences: int, estimate: Callable[[int], dict[str, int]], memory: int, of_what: str) -> Choice:
    """The largest size whose estimate is not above `memory`.

    Args:
        sequences: that a rank takes in a step.
        estimate: bytes of a device by part, of a size; see `memory.estimate`.
        memory: bytes that may be used on a device.
        of_what: what these are, for the sentence.

    Raises:
        ValueError: not even one sequence fits, or activations cannot be estimated.
    """
    needed: dict[int, int] = {}

    def fits(size: int) -> bool:
        parts = estimate(size)
        if "activations" not in parts:
            raise ValueError(
                "batch.micro_size=auto: this model's activations cannot be estimated, as its code looks at values:"
                " write a number"
            )
        needed[size] = sum(parts.values())
        return needed[size] <= memory

    possible = sizes(sequences)
    size = possible[-1] if fits(possible[-1]) else largest(possible[:-1], fits)
    available = f"{memory / 2**30:.2f} GiB, {of_what}"
    if size is None:
        raise ValueError(
            f"batch.micro_size=auto: even one sequence needs about {needed[1] / 2**30:.2f} GiB of {available}: use a"
            " smaller model or model.context_length, or activation_checkpointing=block; a number is taken unasked"
        )
    why = f"by the estimate it needs {needed[size] / 2**30:.2f} GiB of {available}"
    if size == possible[-1]:
        return Choice(size, f"{why}; more do not divide the {sequences} sequences of a step")
    return Choice(size, f"{why}; {size * 2} would need {needed[size * 2] / 2**30:.2f} GiB")


def usable_memory(accelerator: str, n_processes: int, assumed: int) -> tuple[int, str]:
    """Bytes that a run may plan with on each device, and what they are.

    Args:
        accelerator: cpu, cuda or mps.
        n_processes: that share this host.
        assumed: bytes of a GPU, if there is none here.
    """
    if accelerator == "cuda":
        here = torch.cuda.is_available()
        total = torch.cuda.get_device_properties(0).total_memory if here else assumed
        return int(total * USABLE_MEMORY), f"{USABLE_MEMORY:.0%} of {'the GPU' if here else 'plan.memory_gib'}"
    share = f" for each of {n_processes} processes" if n_processes > 1 else ""
    free = hardware.free_host_memory()
    return int(free * USABLE_HOST_MEMORY) // n_processes, f"{USABLE_HOST_MEMORY:.0%} of this host's free memory{share}"
