"""Plan before you build: every number that follows from several groups, worked out once by pure functions."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, Protocol

from thunderhead.core.types import PositiveFloat, PositiveInt, Probability, WholeNumber
from thunderhead.options.scaling_law import Count, Law, counted, read_law

BACKWARD_FLOPS = 3  # a backward pass costs twice its forward pass (Kaplan et al. 2001.08361, section 2.1)
CHINCHILLA = 20.0
"""Tokens a parameter that are about compute-optimal (Hoffmann et al. 2203.15556)."""


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
        micro_size: sequences of one forward pass on one device; None = 4, or the most below that divide what a rank
            takes in a step; `auto` = the largest power of two that fits into its memory and divides the sequences of a
            step, see `thunderhead.training.micro_batch`.
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

        Raises:
            ValueError: the global batch is no whole number of micro-batches over all ranks; names the nearest sizes.
        """
        chosen = self.micro_batch(context_length, data_parallel_size)
        size = 1 if chosen == "auto" else chosen
        row = context_length * data_parallel_size  # tokens when every rank takes one sequence
        if self.global_tokens % (row * size) == 0:
            return self.global_tokens // (row * size)
        below = self.global_tokens // (row * size) * row * size
        choices = [f"batch.global_tokens={n}" for n in (below, below + row * size) if n]
        if self.global_tokens % row == 0:
            rows = self.global_tokens // row
            nearest = min((n for n in range(1, rows + 1) if rows % n == 0), key=lambda n: abs(n - size))
            choices.append(f"batch.micro_size={nearest}")
        raise ValueError(
            f"batch.global_tokens={self.global_tokens} is not a multiple of the {row * size} tokens that "
            f"batch.micro_size={size} × model.context_length={context_length} × {data_parallel_size} "
            f"data-parallel rank(s) take at once: use {' or '.join(choices)}"
        )


class Budget(Protocol):
    """How long to train: an option of the group `budget`; a subclass of this."""

    def total_tokens(self, sizes: Sizes) -> int:
        """Tokens to train on, before rounding down to whole steps."""
        ...

    def notes(self, sizes: Sizes, tokens: int) -> list[str]:
        """Sentences for the plan about training on so many tokens."""
        return []


@dataclass(frozen=True, kw_only=True)
class StepsBudget(Budget):
    """A number of optimizer steps."""

    steps: PositiveInt

    def total_tokens(self, sizes: Sizes) -> int:
        """Tokens of that many steps."""
        return self.steps * sizes.tokens_per_step


@dataclass(frozen=True, kw_only=True)
class TokensBudget(Budget):
    """A number of tokens, rounded down to whole steps."""

    tokens: WholeNumber

    def total_tokens(self, sizes: Sizes) -> int:
        """The tokens as given."""
        return int(self.tokens)


@dataclass(frozen=True, kw_only=True)
class EpochsBudget(Budget):
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
class ChinchillaBudget(Budget):
    """As many tokens as make a model of this size the best use of its training compute.

    Args:
        tokens_per_parameter: more than the optimum suits models that are used a lot; None = as `law` has it, or
            CHINCHILLA without one.
        count: which parameters are counted: `total`, or `non_embedding` (without token and position tables and an
            untied output head).
        law: path of a law.json, fitted to runs like this one.
    """

    tokens_per_parameter: PositiveFloat | None
    count: Count
    law: str | None = None

    def total_tokens(self, sizes: Sizes) -> int:
        """tokens_per_parameter × counted parameters, or what the law says.

        Raises:
            ValueError: the law cannot be read, or contradicts another setting.
        """
        parameters = counted(sizes.parameters, self.count)
        if self.law is None:
            each = CHINCHILLA if self.tokens_per_parameter is None else self.tokens_per_parameter
            return int(each * parameters)
        law = _read_law(self.law)
        if self.tokens_per_parameter is not None:
            raise ValueError(
                f"budget.tokens_per_parameter={self.tokens_per_parameter:g} and budget.law both say how many tokens: "
                "set one of them to null"
            )
        if law.count != self.count:
            raise ValueError(
                f"budget.count={self.count}, but the law in {self.law} counts otherwise: use budget.count={law.count}"
            )
        return int(law.optimal_tokens(parameters))

    def notes(self, sizes: Sizes, tokens: int) -> list[str]:
        """What the law says about this run."""
        return [] if self.law is None else [_says(_read_law(self.law), sizes, tokens)]


@dataclass(frozen=True, kw_only=True)
class FlopsBudget(Budget):
    """Training compute: tokens = flops / training FLOPs per token.

    Args:
        flops: forward and backward, without recomputation.
        law: path of a law.json, fitted to runs like this one: the plan tells the best size for this compute by it, and
            the predicted loss of this size.
    """

    flops: PositiveFloat
    law: str | None = None

    def total_tokens(self, sizes: Sizes) -> int:
        """Tokens that this compute pays for.

        Raises:
            ValueError: the law cannot be read.
        """
        if self.law is not None:
            _read_law(self.law)  # refused here, where nothing has begun
        return int(self.flops / sizes.flops_per_token)

    def notes(self, sizes: Sizes, tokens: int) -> list[str]:
        """What the law says about this run, and about the best one of this compute."""
        if self.law is None:
            return []
        law = _read_law(self.law)
        best = law.optimum(self.flops)
        optimum = (
            f"law: {self.flops:.3g} FLOPs are best spent on N = {best.parameters:.3g}, D = {best.tokens:.3g} tokens"
        )
        return [f"{optimum}: predicted loss {best.loss:.3f}", _says(law, sizes, tokens)]


def _read_law(path: str) -> Law:
    try:
        return read_law(path)
    except ValueError as error:
        raise ValueError(f"budget.law: {error}") from error


def _says(law: Law, sizes: Sizes, tokens: int) -> str:
    """A law's prediction for a run, and how far that is from what it was fitted on."""
    parameters = counted(sizes.parameters, law.count)
    flops = sizes.flops_per_token * tokens
    run = f"law: this N = {parameters:.3g} ({law.count}) with D = {tokens:.3g} tokens"
    far = law.extrapolation(parameters=parameters, tokens=tokens, flops=flops)
    return f"{run} ({tokens / parameters:.3g} per parameter): predicted loss {law.loss(parameters, tokens):.3f}" + (
        f"; {far}" if far else ""
    )


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
    compile: str = "none"  # what is compiled: none, block or model

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


def warmup_steps(schedule: Callable[[int, int], float], total_steps: int) -> int:
    """Steps until a schedule is first at its peak, that one included; 0 if it begins there.

    Found by asking the schedule, at most some 8,000 times: exact for one that rises once and then does not rise again.
    """
    stride = max(1, total_steps // 4096)
    coarse = max(range(0, total_steps, stride), key=lambda step: schedule(step, total_steps))
    near = range(max(0, coarse - stride), min(total_steps, coarse + stride + 1))
    peak = max(near, key=lambda step: schedule(step, total_steps))  # the first of equals
    return peak + 1 if peak else 0
