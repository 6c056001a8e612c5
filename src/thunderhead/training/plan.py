"""Plan before you build: every number that follows from several groups, worked out once by pure functions."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, Protocol

from thunderhead.types import PositiveFloat, PositiveInt, Probability, WholeNumber

BACKWARD_FLOPS = 3  # a backward pass costs twice its forward pass (Kaplan et al. 2001.08361, section 2.1)


USABLE_MEMORY = 0.9
"""Of a device's memory, for what the plan counts: the rest goes to buffers, fragments and libraries."""


class Sizes(NamedTuple):
    """What a budget may be worked out from."""

    parameters: dict[str, int]
    flops_per_token: int  # of training: forward and backward
    tokens_per_step: int
    epoch_tokens: int | None  # trained tokens in one pass over the data; None while the data is not prepared


@dataclass(frozen=True, kw_only=True)
class Batch:
    """How many tokens an optimizer step sees, and how many sequences a device takes at once.

    Args:
        global_tokens: tokens of one optimizer step, over all devices and accumulated micro-batches.
        micro_size: sequences of one forward pass on one device.
    """

    global_tokens: PositiveInt
    micro_size: PositiveInt

    def accumulation(self, context_length: int, data_parallel_size: int) -> int:
        """Micro-batches a step on each rank, exact.

        Raises:
            ValueError: the global batch is no whole number of micro-batches over all ranks; names the nearest sizes.
        """
        row = context_length * data_parallel_size  # tokens when every rank takes one sequence
        if self.global_tokens % (row * self.micro_size) == 0:
            return self.global_tokens // (row * self.micro_size)
        below = self.global_tokens // (row * self.micro_size) * row * self.micro_size
        choices = [f"batch.global_tokens={n}" for n in (below, below + row * self.micro_size) if n]
        if self.global_tokens % row == 0:
            rows = self.global_tokens // row
            nearest = min((n for n in range(1, rows + 1) if rows % n == 0), key=lambda n: abs(n - self.micro_size))
            choices.append(f"batch.micro_size={nearest}")
        raise ValueError(
            f"batch.global_tokens={self.global_tokens} is not a multiple of the {row * self.micro_size} tokens that "
            f"batch.micro_size={self.micro_size} × model.context_length={context_length} × {data_parallel_size} "
            f"data-parallel rank(s) take at once: use {' or '.join(choices)}"
        )


class Budget(Protocol):
    """How long to train: an option of the group `budget`."""

    def total_tokens(self, sizes: Sizes) -> int:
        """Tokens to train on, before rounding down to whole steps."""
        ...


@dataclass(frozen=True, kw_only=True)
class StepsBudget:
    """A number of optimizer steps."""

    steps: PositiveInt

    def total_tokens(self, sizes: Sizes) -> int:
        """Tokens of that many steps."""
        return self.steps * sizes.tokens_per_step


@dataclass(frozen=True, kw_only=True)
class TokensBudget:
    """A number of tokens, rounded down to whole steps."""

    tokens: WholeNumber

    def total_tokens(self, sizes: Sizes) -> int:
        """The tokens as given."""
        return int(self.tokens)


@dataclass(frozen=True, kw_only=True)
class EpochsBudget:
    """Passes over the training data, rounded down to whole steps."""

    epochs: PositiveFloat

    def total_tokens(self, sizes: Sizes) -> int:
        """Tokens of that many passes.

        Raises:
            ValueError: the data is not prepared, so that nobody knows how long an epoch is.
        """
        if sizes.epoch_tokens is None:
            raise ValueError(
                "budget.epochs: the data is not prepared yet; run python prepare.py with these options first"
            )
        return int(self.epochs * sizes.epoch_tokens)


@dataclass(frozen=True, kw_only=True)
class ChinchillaBudget:
    """Tokens in proportion to the parameters (Hoffmann et al. 2203.15556: about 20 a parameter).

    Args:
        tokens_per_parameter: 20 is compute-optimal; inference-minded models train far longer.
        count: which parameters are counted: `total`, or `non_embedding` (without token and position tables and an
            untied output head).
    """

    tokens_per_parameter: PositiveFloat
    count: Literal["total", "non_embedding"]

    def total_tokens(self, sizes: Sizes) -> int:
        """tokens_per_parameter × counted parameters."""
        counted = sizes.parameters["total"]
        if self.count == "non_embedding":
            counted -= sum(sizes.parameters[part] for part in ("embedding", "position", "head"))
        return int(self.tokens_per_parameter * counted)


@dataclass(frozen=True, kw_only=True)
class FlopsBudget:
    """Training compute: tokens = flops / training FLOPs per token."""

    flops: PositiveFloat

    def total_tokens(self, sizes: Sizes) -> int:
        """Tokens that this compute pays for."""
        return int(self.flops / sizes.flops_per_token)


@dataclass(frozen=True, kw_only=True)
class Validation:
    """When to validate, beside the end of the run.

    Args:
        every: optimizer steps (an integer) or a fraction of the run (below 1).
    """

    every: PositiveInt | PositiveFloat

    def steps(self, total_steps: int) -> int:
        """Steps between two validations.

        Raises:
            ValueError: a fraction of 1 or more.
        """
        if isinstance(self.every, int):
            return min(self.every, total_steps)
        if self.every >= 1:
            raise ValueError(f"validation.every={self.every}: write steps as an integer, or a fraction below 1")
        return max(1, round(self.every * total_steps))


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What the plan of a run on GPUs assumes about them: nothing that a run depends on.

    Args:
        peak_flops: FLOP/s of a GPU that MFU is told against.
        memory_gib: memory of a GPU.
        mfu: from … to: the part of that peak that training reaches.
    """

    peak_flops: PositiveFloat
    memory_gib: PositiveFloat
    mfu: tuple[Probability, Probability]

    def tokens_per_day(self, flops_per_token: int, devices: int) -> tuple[float, float]:
        """Tokens that the devices train on in a day at each end of the range."""
        low, high = (86_400 * mfu * self.peak_flops * devices / flops_per_token for mfu in self.mfu)
        return low, high

    def remarks(self, memory: dict[str, int], micro_size: int) -> list[str]:
        """Whether a device's memory holds what a run needs there (bytes by part), and the largest micro-batch."""
        available, needed = int(self.memory_gib * 2**30 * USABLE_MEMORY), sum(memory.values())
        if "activations" not in memory:
            return []
        a_sequence = memory["activations"] / micro_size
        fits = int((available - needed + memory["activations"]) / a_sequence)
        usable = f"the {USABLE_MEMORY:.0%} of {self.memory_gib:g} GiB that can be planned with"
        if fits < 1:
            return [f"does not fit: needs {needed / 2**30:.1f} GiB with batch.micro_size={micro_size}, above {usable}"]
        if needed > available:
            return [
                f"does not fit: needs {needed / 2**30:.1f} GiB, above {usable}: use batch.micro_size={fits} or less"
            ]
        return [f"batch.micro_size could be {fits}, by {usable}"] if fits > micro_size else []


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will do. Tokens are counted over all ranks, FLOPs without recomputation, bytes per device."""

    parameters: dict[str, int]
    flops_per_token: int
    context_length: int
    vocab_size: int
    devices: int
    data_parallel_size: int
    tensor_parallel_size: int
    micro_batch_size: int
    accumulation: int
    sequences_per_step: int
    tokens_per_step: int
    steps: int
    tokens: int
    flops: int
    warmup_steps: int
    validation_every: int
    epochs: dict[str, float] | None  # of each source; None while the data is not prepared
    shares: dict[str, float] | None  # of the run's tokens
    precision: str
    accelerator: str
    notes: list[str]
    memory: dict[str, int]
    tokens_per_day: tuple[float, float] | None  # from, to; None where nothing is assumed about the devices

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, for plan.json."""
        return asdict(self)


def training_flops_per_token(forward_flops_per_token: int) -> int:
    """FLOPs of forward and backward; recomputation in activation checkpointing is not counted (PaLM, appendix B)."""
    return BACKWARD_FLOPS * forward_flops_per_token


def whole_steps(tokens: int, tokens_per_step: int) -> int:
    """Optimizer steps that fit into a token budget.

    Raises:
        ValueError: not even one does.
    """
    if tokens < tokens_per_step:
        raise ValueError(
            f"budget: {tokens} tokens are less than one step of batch.global_tokens={tokens_per_step}: "
            "raise the budget or lower batch.global_tokens"
        )
    return tokens // tokens_per_step
