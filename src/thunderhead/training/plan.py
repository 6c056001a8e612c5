"""Plan before you build: what a run will do, worked out once from its components, and refused if it cannot be."""

import math
import numbers
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal

from annotated_types import Gt, Lt
from hydra.utils import get_object

from thunderhead.core.components import takes
from thunderhead.core.config import ConfigError, Problem
from thunderhead.core.data.datamodule import Draw, asked
from thunderhead.core.environment import hidden
from thunderhead.core.model.decoder import Decoder
from thunderhead.core.run import Run, problems_of
from thunderhead.core.types import PositiveFloat, PositiveInt, Probability
from thunderhead.options.budgets import Sizes
from thunderhead.training import memory
from thunderhead.training.batch import AUTO, USABLE_MEMORY, largest_that_fits, usable_memory

BACKWARD_FLOPS = 3  # a backward pass costs twice its forward pass (Kaplan et al. 2001.08361, section 2.1)
MOST_VALIDATIONS = 4
UNKNOWN_EPOCH = 2**40
"""Stands for the tokens of an epoch while the data is not prepared: then only what is wrong anyway is refused."""


@dataclass(frozen=True, kw_only=True)
class Validation:
    """When to validate, beside the end of the run.

    - every: optimizer steps, or a fraction of the run. `auto`: `MOST_VALIDATIONS` times in all, or less often, so that
      they cost no more than `share` of what the training does; the one at the end is always whole.
    """

    every: PositiveInt | Annotated[float, Gt(0), Lt(1)] | Literal["auto"]
    share: Probability = 0.1

    def steps(self, total_steps: int, cost: float | None) -> int:
        """Steps between two validations, each of which costs as much as `cost` optimizer steps; None: not known."""
        if self.every == "auto":
            affordable = MOST_VALIDATIONS if not cost else max(1, int(self.share * total_steps / cost))
            return math.ceil(total_steps / min(MOST_VALIDATIONS, affordable))
        is_number = isinstance(self.every, int)
        return min(int(self.every), total_steps) if is_number else max(1, round(self.every * total_steps))


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What the plan of a run on GPUs assumes about them: nothing that a run depends on."""

    peak_flops: PositiveFloat  # FLOP/s of a GPU that MFU is told against
    memory_gib: PositiveFloat  # of a GPU
    mfu: tuple[Probability, Probability]  # from … to: the part of that peak that training reaches

    def tokens_per_day(self, flops_per_token: int, devices: int) -> tuple[float, float]:
        """Tokens that the devices train on in a day at each end of the range."""
        low, high = (86_400 * mfu * self.peak_flops * devices / flops_per_token for mfu in self.mfu)
        return low, high

    def remarks(self, memory: dict[str, int], micro_size: int) -> list[str]:
        """Whether a device's memory holds what a run needs there (bytes by part), and the largest micro-batch."""
        if "activations" not in memory:
            return []
        available, needed = int(self.memory_gib * 2**30 * USABLE_MEMORY), sum(memory.values())
        fits = int((available - needed + memory["activations"]) / (memory["activations"] / micro_size))
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
    validation_share: float | None  # of the training's FLOPs, all validations; None while the data is not prepared
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


def plan_run(run: Run, micro_batch_size: int | None = None, *, count_memory: bool = True) -> Plan:
    """Work out a run before anything of it is made, its data prepared or not.

    `micro_batch_size` is what `batch.micro_size=auto` stood for before; taken if it still divides a rank's sequences.
    Without `count_memory`, which takes most of the time, `memory` is empty.

    Raises ConfigError: all contradictions that can be seen without the data.
    """
    problems, decoder = problems_of(run), None
    with problems.collect():
        decoder = run.decoder_meta
    if decoder is None:
        raise ConfigError(problems)
    kind, why_precision, warmup, drawn, validation_tokens = "fp32", "", 0, Draw(0), None
    with problems.collect():
        kind, why_precision = run.precision.resolve(run.accelerator, run.is_here)
    precision = run.precision.of_kind(kind)
    problems.note(*_optimizer_problems(run))
    context_length, ranks = decoder.context_length, run.strategy.data_parallel_size
    tokens_per_step, parameters = run.batch.global_tokens, decoder.parameter_counts()
    flops_per_token = BACKWARD_FLOPS * decoder.forward_flops_per_token()
    epoch_tokens = asked(run.data, "epoch_tokens")
    if epoch_tokens is None and not run.is_dry:
        epoch_tokens = UNKNOWN_EPOCH
    sizes = Sizes(parameters, flops_per_token, tokens_per_step, epoch_tokens)
    with problems.collect():
        run.batch.accumulation(context_length, ranks)
    with problems.collect():
        steps = whole_steps(run.budget.total_tokens(sizes), tokens_per_step)
        drawn = asked(run.data, "draw")(steps) if run.sequences_per_step else Draw(steps)
        if not run.is_dry:
            problems.note(*drawn.problems)
        validation_tokens = asked(run.data, "validation_tokens")
        warmup = warmup_steps(run.model.schedule, drawn.steps)
    if problems or not count_memory:  # what counts it makes one
        with problems.collect():
            run.model.optimizer(decoder)
    problems.refuse()

    sequences = run.sequences_per_step // ranks

    averages = sum(getattr(each, "bytes_per_parameter", 0) for each in run.callbacks.values()) * parameters["total"]

    def estimate(size: int) -> dict[str, int]:
        return memory.estimate(
            decoder,
            run.model.optimizer,
            micro_batch_size=size,
            precision=precision,
            parallelism=run.strategy,
            accumulation=sequences // size,
            accelerator=run.accelerator,
        ) | ({"averages": averages} if averages else {})

    size, why_micro_batch = run.batch.micro_batch(context_length, ranks), None
    if size == AUTO and micro_batch_size is not None and sequences % micro_batch_size == 0:
        size = micro_batch_size
    elif size == AUTO:
        assumed = int(run.hardware_plan.memory_gib * 2**30)
        usable, of_what = usable_memory(run.accelerator, run.n_processes, assumed)
        size, why_micro_batch = largest_that_fits(sequences, estimate, usable, of_what)
    tokens = drawn.steps * tokens_per_step
    flops = tokens * flops_per_token
    scope, why_scope = run.compile.resolve(run, flops, precision.compute_dtype)
    is_cuda = run.accelerator == "cuda"
    cost = None if validation_tokens is None else validation_tokens / (BACKWARD_FLOPS * tokens_per_step)
    validation_every = run.validation.steps(drawn.steps, cost)
    plan = Plan(
        parameters=parameters,
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
        steps=drawn.steps,
        tokens=tokens,
        flops=flops,
        warmup_steps=warmup,
        validation_every=validation_every,
        validation_share=cost and cost * math.ceil(drawn.steps / validation_every) / drawn.steps,
        epochs=drawn.epochs,
        shares=drawn.shares,
        accelerator=run.accelerator,
        precision=kind,
        why_precision=why_precision,
        compile=scope,
        why_compile=why_scope,
        memory=estimate(size) if count_memory else {},
        tokens_per_day=run.hardware_plan.tokens_per_day(flops_per_token, run.world_size) if is_cuda else None,
        notes=[],
    )
    refused = [f"a run would be refused: {problem.message}" for problem in drawn.problems]
    of_budget = run.budget.notes(sizes, tokens) if hasattr(run.budget, "notes") else []
    return replace(plan, notes=[*map(hidden, (*_notes(run, decoder, plan), *refused, *drawn.notes, *of_budget))])


def _optimizer_problems(run: Run) -> Iterator[Problem]:
    """Settings of torch's optimizers that it looks at in the first step only."""
    settings = run.model.config["optimizer"]
    if settings.get("capturable") and run.accelerator != "cuda":
        yield Problem("optimizer.capturable", f"needs CUDA, and this run is on {run.accelerator}: set it to false")
    if settings.get("differentiable"):
        yield Problem("optimizer.differentiable", "is for gradients through the optimizer: set it to false")


def _notes(run: Run, decoder: Decoder, plan: Plan) -> Iterator[str]:
    """What is worth knowing of a plan, beside what data and budget have to say on so many steps."""
    if (scale := decoder.output_scale) != 1:
        yield f"muP: {1 / scale:.3g} × the base width {decoder.embedding.embedding_dim * scale:.0f}"
    n_parameters = plan.parameters["total"]
    usual = 327_680 * (n_parameters / 108e6) ** (2 / 3)  # OLMo-core
    if n_parameters >= 5e7 and plan.tokens_per_step <= usual / 16:  # the default is for runs of minutes
        yield (
            f"batch.global_tokens={plan.tokens_per_step:,} is little for {n_parameters / 1e6:,.0f} M parameters: about"
            f" {usual / 1e6:.1g} M are usual (OLMo-core: 327,680·(N/108M)^(2/3))"
        )
    if not run.is_here:
        yield f"planned for hardware that is not here: {run.world_size:,} × {run.accelerator}"
    if run.accelerator == "cuda" and plan.why_micro_batch is None:
        yield from run.hardware_plan.remarks(plan.memory, plan.micro_batch_size)
    if plan.memory:
        yield from memory.remarks(plan.memory, run.strategy)
    if run.config.get("tokenizer") is not None and not takes(get_object(run.config["data"]["_target_"]), "tokenizer"):
        yield f"{type(run.data).__name__} takes no tokenizer: tokenizer= changes nothing"
    yield from asked(run.data, "notes")()


def warmup_steps(schedule: Callable[[int, int], float], total_steps: int) -> int:
    """Steps until a schedule is first at its peak, that one included; 0 if it begins there.

    Found by asking the schedule some thousand times, ever closer: exact for one that rises once and then does not rise
    again. Raises ValueError if one of the factors asked for is no number from 0, or all are 0.
    """

    def factor(step: int) -> float:
        value = schedule(step, total_steps)
        if not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ValueError(f"scheduler: {value!r} is the factor of step {step}: must be a number, 0 or more")
        return value

    low, high, stride, peak = 0, total_steps, 0, 0
    while stride != 1:
        stride = max(1, (high - low) // 4096)
        peak = max(range(low, high, stride), key=factor)  # the first of equals
        low, high = max(0, peak - stride), min(total_steps, peak + stride + 1)
    if total_steps > 1 and factor(peak) == 0:
        raise ValueError("scheduler: the factor of every step is 0, so that nothing would be learned")
    return peak + 1 if peak else 0


def whole_steps(tokens: float, tokens_per_step: int) -> int:
    """Optimizer steps that fit into a token budget; raises ValueError if not even one does."""
    if not isinstance(tokens, numbers.Real) or not math.isfinite(tokens):
        raise ValueError(f"budget: {tokens!r} is what its total_tokens gives: must be a number of tokens")
    tokens = int(tokens)
    if tokens < tokens_per_step:
        raise ValueError(
            f"budget: {tokens} tokens are less than one step of batch.global_tokens={tokens_per_step}: "
            "raise the budget or lower batch.global_tokens"
        )
    return tokens // tokens_per_step
