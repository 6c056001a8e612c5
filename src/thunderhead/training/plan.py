"""Plan before you build: what a run will do, worked out once from its components, and refused if it cannot be."""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

from thunderhead.core.config import ConfigError
from thunderhead.core.data.datamodule import Draw, asked
from thunderhead.core.model.decoder import Decoder
from thunderhead.core.run import Problems, Run, problems_of
from thunderhead.core.types import PositiveFloat, PositiveInt, Probability
from thunderhead.options.budgets import Sizes
from thunderhead.training import memory
from thunderhead.training.batch import AUTO, USABLE_MEMORY, largest_that_fits, usable_memory

BACKWARD_FLOPS = 3  # a backward pass costs twice its forward pass (Kaplan et al. 2001.08361, section 2.1)
UNKNOWN_EPOCH = 2**40
"""Stands for the tokens of an epoch while the data is not prepared: then only what is wrong anyway is refused."""


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
        if needed > available:
            more = f": use batch.micro_size={fits} or less" if fits >= 1 else f" with batch.micro_size={micro_size}"
            return [f"does not fit: needs {needed / 2**30:.1f} GiB, above {usable}{more}"]
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
    why_micro_batch: str | None  # with batch.micro_size=auto
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
    accelerator: str
    precision: str
    why_precision: str
    compile: str  # what is compiled: none, block or model
    why_compile: str
    memory: dict[str, int]
    tokens_per_day: tuple[float, float] | None  # from, to; None where nothing is assumed about the devices
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, for plan.json."""
        return asdict(self)


def plan_run(run: Run, micro_batch_size: int | None = None) -> Plan:
    """Work out a run before anything of it is made.

    Args:
        run: built, its data prepared or not.
        micro_batch_size: what `batch.micro_size=auto` stood for before; taken if it still divides a rank's sequences.

    Raises:
        ConfigError: all contradictions that can be seen without the data.
    """
    problems, decoder = problems_of(run), None
    with problems.collect():
        decoder = run.decoder_meta
    if decoder is None:
        raise ConfigError(problems)
    data = run.data
    kind = why_precision = "fp32"
    with problems.collect():
        kind, why_precision = run.precision.resolve(run.accelerator, run.is_here)
    precision = run.precision.of_kind(kind)
    context_length, ranks = decoder.context_length, run.strategy.data_parallel_size
    tokens_per_step = run.batch.global_tokens
    flops_per_token = BACKWARD_FLOPS * decoder.forward_flops_per_token()
    sizes = Sizes(decoder.parameter_counts(), flops_per_token, tokens_per_step, _epoch_tokens(run))
    course = _Course(0, 0, 0, None, None, [])
    with problems.collect():
        run.batch.accumulation(context_length, ranks)
    with problems.collect():
        course = _course(run, sizes, problems)
    if problems:
        with problems.collect():
            run.model.optimizer(decoder)
        raise ConfigError(problems)

    size = run.batch.micro_batch(context_length, ranks)
    sequences = run.sequences_per_step // ranks
    if micro_batch_size is not None and size == AUTO and sequences % micro_batch_size == 0:
        size = micro_batch_size
    estimates: dict[int, dict[str, int]] = {}

    def estimate(size: int) -> dict[str, int]:
        if size not in estimates:
            estimates[size] = _memory(run, decoder, precision, size, sequences // size)
        return estimates[size]

    why_micro_batch = None
    with problems.collect():
        if size == AUTO:
            assumed = int(run.hardware_plan.memory_gib * 2**30)
            usable, of_what = usable_memory(run.accelerator, run.n_processes, assumed)
            size, why_micro_batch = largest_that_fits(sequences, estimate, usable, of_what)
        estimate(int(size))
    if problems:
        raise ConfigError(problems)
    size, tokens = int(size), course.steps * tokens_per_step
    flops = tokens * flops_per_token
    scope, why_scope = run.compile.resolve(run, flops, precision.compute_dtype)
    assumptions = run.hardware_plan if run.accelerator == "cuda" else None
    return Plan(
        parameters=sizes.parameters,
        flops_per_token=flops_per_token,
        context_length=context_length,
        vocab_size=decoder.vocab_size,
        devices=run.world_size,
        data_parallel_size=ranks,
        tensor_parallel_size=run.strategy.tensor_parallel_size,
        micro_batch_size=size,
        why_micro_batch=why_micro_batch,
        accumulation=sequences // size,
        sequences_per_step=run.sequences_per_step,
        tokens_per_step=tokens_per_step,
        steps=course.steps,
        tokens=tokens,
        flops=flops,
        warmup_steps=course.warmup,
        validation_every=course.validation_every,
        epochs=course.epochs,
        shares=course.shares,
        accelerator=run.accelerator,
        precision=kind,
        why_precision=why_precision,
        compile=scope,
        why_compile=why_scope,
        memory=estimate(size),
        tokens_per_day=assumptions.tokens_per_day(flops_per_token, run.world_size) if assumptions else None,
        notes=[
            *_width_notes(decoder),
            *_batch_notes(tokens_per_step, sizes.parameters["total"]),
            *_hardware_notes(run),
            *(assumptions.remarks(estimate(size), size) if assumptions and why_micro_batch is None else []),
            *memory.remarks(estimate(size), run.strategy),
            *asked(data, "notes")(),
            *course.notes,
            *(run.budget.notes(sizes, tokens) if hasattr(run.budget, "notes") else []),
        ],
    )


class _Course(NamedTuple):
    """How long a run is, and what it draws from its data."""

    steps: int
    warmup: int
    validation_every: int
    epochs: dict[str, float] | None
    shares: dict[str, float] | None
    notes: list[str]


def _course(run: Run, sizes: Sizes, problems: Problems) -> _Course:
    """Work out the steps of a run; what the data refuses is added to `problems`."""
    steps = whole_steps(run.budget.total_tokens(sizes), sizes.tokens_per_step)
    notes: list[str] = []
    drawn = asked(run.data, "draw")(steps) if run.sequences_per_step else Draw(steps)
    if run.is_dry:
        notes = [f"a run would be refused: {problem.message}" for problem in drawn.problems]
    else:
        problems.note(*drawn.problems)
    every = 0
    with problems.collect():
        every = run.validation.steps(drawn.steps)
    warmup = warmup_steps(run.model.schedule, drawn.steps)
    return _Course(drawn.steps, warmup, every, drawn.epochs, drawn.shares, [*notes, *drawn.notes])


def _epoch_tokens(run: Run) -> int | None:
    known: int | None = asked(run.data, "epoch_tokens")
    return known if known is not None or run.is_dry else UNKNOWN_EPOCH


def _hardware_notes(run: Run) -> list[str]:
    return [] if run.is_here else [f"planned for hardware that is not here: {run.world_size:,} × {run.accelerator}"]


def _memory(run: Run, decoder: Decoder, precision: Any, size: int, accumulation: int) -> dict[str, int]:
    """Bytes on a device by part, from a copy of the decoder whose tensors have no storage."""
    made, known = copy.deepcopy(decoder), dict[int, torch.nn.Parameter]()

    def fake() -> Decoder:
        for module in made.modules():
            for name, meta in module._parameters.items():
                if meta is not None:
                    tensor = known.setdefault(id(meta), torch.nn.Parameter(torch.empty(meta.shape, dtype=meta.dtype)))
                    tensor.requires_grad_(meta.requires_grad)
                    module._parameters[name] = tensor
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else torch.empty(buffer.shape, dtype=buffer.dtype)
        return made

    return memory.estimate(
        fake,
        run.model.optimizer,
        micro_batch_size=size,
        precision=precision,
        parallelism=run.strategy,
        accumulation=accumulation,
        accelerator=run.accelerator,
    )


def warmup_steps(schedule: Callable[[int, int], float], total_steps: int) -> int:
    """Steps until a schedule is first at its peak, that one included; 0 if it begins there.

    Found by asking the schedule, at most some 8,000 times: exact for one that rises once and then does not rise again.
    """
    stride = max(1, total_steps // 4096)
    coarse = max(range(0, total_steps, stride), key=lambda step: schedule(step, total_steps))
    near = range(max(0, coarse - stride), min(total_steps, coarse + stride + 1))
    peak = max(near, key=lambda step: schedule(step, total_steps))  # the first of equals
    return peak + 1 if peak else 0


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


def _batch_notes(global_tokens: int, n_parameters: int) -> list[str]:
    """Whether a step of a model of some size is far smaller than usual: the default is for runs of minutes."""
    usual = 327_680 * (n_parameters / 108e6) ** (2 / 3)  # OLMo-core
    if n_parameters < 5e7 or global_tokens > usual / 16:
        return []
    return [
        f"batch.global_tokens={global_tokens:,} is little for {n_parameters / 1e6:,.0f} M parameters: about"
        f" {usual / 1e6:.1g} M are usual (OLMo-core: 327,680·(N/108M)^(2/3))"
    ]


def _width_notes(decoder: Decoder) -> list[str]:
    """How much wider the model is than the one that its settings are for."""
    if decoder.output_scale == 1:
        return []
    d_model = decoder.embedding.embedding_dim
    return [f"muP: {1 / decoder.output_scale:.3g} × the base width {d_model * decoder.output_scale:.0f}"]
