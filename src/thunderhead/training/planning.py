"""Plan a run: everything that can be known, and refused, before anything is built or prepared."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from thunderhead.core.config import ConfigError, Problem, build, factory
from thunderhead.core.data.manifest import Manifest
from thunderhead.core.data.mixture import trained_blocks
from thunderhead.core.data.order import blocks, check_blocks
from thunderhead.core.model.block import ResidualDropout
from thunderhead.core.model.decoder import Decoder
from thunderhead.core.module import build_decoder, build_optimizer
from thunderhead.options.synthetic_tasks import Task
from thunderhead.parallel.strategies import Parallelism, single
from thunderhead.parallel.tensor_parallel import problems_of as tensor_parallel_problems
from thunderhead.training import hardware, memory, micro_batch
from thunderhead.training.data_planning import Drawn, draw, find_data, part_notes, storage_notes
from thunderhead.training.plan import Plan, Sizes, training_flops_per_token, warmup_steps, whole_steps
from thunderhead.training.problems import Problems

AUTO = "auto"
MICRO_NOTE = "batch.micro_size=auto:"
"""How the plan's note on it begins."""
UNKNOWN_EPOCH = 2**40
"""Stands for the tokens of an epoch while the data is not prepared: then only what is wrong anyway is refused."""


class Machine(NamedTuple):
    """What a run computes on."""

    accelerator: str
    n_processes: int  # on this node
    world_size: int
    precision: str
    why_precision: str
    parallelism: Parallelism
    notes: list[str]


class Planned(NamedTuple):
    """A plan and the cheap things that were made for it."""

    plan: Plan
    machine: Machine
    data: dict[str, Any]  # settings of the data module
    manifest: Manifest | Task | None  # None: the data is not prepared yet; a task needs no preparing


def plan_run(config: dict[str, Any], manifest: Manifest | Task | None = None) -> Planned:
    """Work out a run before anything is built.

    Args:
        config: resolved and checked, plain containers.
        manifest: of the prepared data; None looks for it.

    Raises:
        ConfigError: all contradictions of the configuration that can be seen without the data.
    """
    problems = Problems()
    machine = _machine(config, problems)
    data, manifest, vocab_size, eos_id = find_data(config, manifest, problems)

    decoder: Decoder | None = None
    with problems.collect(), torch.device("meta"):
        decoder = build_decoder(config, vocab_size, eos_id)
    if decoder is None:
        raise ConfigError(problems)
    if machine.accelerator != "cuda" and decoder.attention.needs_flex:
        what = "attention.logit_softcap" if config["attention"].get("logit_softcap") else "attention.backend=flex"
        message = f"needs flex_attention, which trains on CUDA only, and this run is on {machine.accelerator}"
        problems.note(Problem(what, f"{message}: set it to null or auto"))
    compile_ = config["compile"]
    rates = getattr(decoder.blocks[0], "dropout", ResidualDropout())
    drops = decoder.attention.dropout or rates.attention_output or rates.feedforward_output
    repeats = config["activation_checkpointing"].get("every", 1) != 0
    if compile_["backend"] == "eager" and compile_["scope"] != "none" and drops and repeats:  # torch 2.13
        message = "does not repeat dropout's random numbers under activation_checkpointing: use aot_eager"
        problems.note(Problem("compile.backend=eager", message))
    for message in tensor_parallel_problems(decoder, machine.parallelism.tensor_parallel_size):
        problems.note(Problem("", f"{message} (strategy={machine.parallelism.name})"))
    if machine.parallelism.gathers and config["compile"]["scope"] == "model":
        message = (
            f"compile=model cannot trace through strategy={machine.parallelism.name}, which gathers each block's"
            " weights: use compile=block"
        )
        problems.note(Problem("compile.scope", message))
    if compile_["scope"] in ("block", "model") and _is_not_compiled(config, machine.parallelism):
        message = f"torch cannot compile whole checkpointed blocks under strategy={machine.parallelism.name}"
        problems.note(Problem("compile.scope", f"{message}: use compile=none, or activation_checkpointing=selective"))
    optimizer = config["optimizer"]
    # torch 2.13
    if optimizer["_target_"] == "torch.optim.SGD" and optimizer["fused"] and machine.precision == "fp16-mixed":
        message = "takes unset memory for momentum if fp16's loss scaling skips the first step: set it to false"
        problems.note(Problem("optimizer.fused", message))
    with problems.collect():
        build_optimizer(config, decoder)
    if manifest is not None:
        with problems.collect():
            if isinstance(manifest, Task):
                manifest.check(decoder.context_length)
            else:
                check_blocks(manifest, decoder.context_length)
    if problems:
        manifest = None  # whatever is wrong with it was noted; the rest of the plan can still be looked at
    plan = _derive(config, decoder, machine, problems, data=data, manifest=manifest)
    if plan is None:
        raise ConfigError(problems)
    return Planned(plan, machine, data, manifest)


def _is_not_compiled(config: dict[str, Any], parallelism: Parallelism) -> bool:
    """Whether blocks are checkpointed whole, and their weights divided: torch 2.13 fails to save the device mesh."""
    is_whole = config["activation_checkpointing"].get("every", 0) > 0
    return is_whole and parallelism.tensor_parallel_size > 1 and config["compile"]["backend"] != "eager"


def _machine(config: dict[str, Any], problems: Problems) -> Machine:
    trainer, run_here = config["trainer"], not config["dry_run"]
    accelerator, n_devices = "cpu", 1
    with problems.collect():
        accelerator = hardware.resolve_accelerator(trainer.get("accelerator", "auto"), run_here)
    is_here = hardware.accelerators()[accelerator]
    with problems.collect():
        n_devices = hardware.device_count(trainer.get("devices", 1), accelerator, run_here)
    world_size = n_devices * int(trainer.get("num_nodes", 1))
    parallelism = single(1)
    with problems.collect():
        parallelism = factory(config["strategy"])(world_size)
    if parallelism.needs_cuda and accelerator != "cuda":
        message = f"needs CUDA devices, and this run is on {accelerator}: set it to false"
        problems.note(Problem("", f"strategy.cpu_offload=true {message}"))
    precision, why = "fp32", ""
    with problems.collect():
        precision, why = build(config["precision"]).resolve(accelerator, is_here)
    notes = []
    if not is_here or (accelerator == "cuda" and n_devices > torch.cuda.device_count()):
        notes = [f"planned for hardware that is not here: {world_size:,} × {accelerator}"]
    return Machine(accelerator, n_devices, world_size, precision, why, parallelism, notes)


def _derive(
    config: dict[str, Any],
    decoder: Decoder,
    machine: Machine,
    problems: Problems,
    *,
    data: dict[str, Any],
    manifest: Manifest | Task | None,
) -> Plan | None:
    """The plan; None if there are problems."""
    batch, budget, validation = (build(config[group]) for group in ("batch", "budget", "validation"))
    context_length = decoder.context_length
    flops_per_token = training_flops_per_token(decoder.forward_flops_per_token())
    epoch_tokens = None if config["dry_run"] else UNKNOWN_EPOCH
    available = {}
    if isinstance(manifest, Manifest):
        available = {source: blocks(manifest, source, context_length) for source in manifest.sources}
        with problems.collect():
            available = trained_blocks(available, context_length, data.get("max_training_tokens"))
        epoch_tokens = context_length * sum(available.values())
    sizes = Sizes(decoder.parameter_counts(), flops_per_token, batch.global_tokens, epoch_tokens)
    sequences = batch.global_tokens // context_length
    accumulation = steps = warmup = every = 0
    drawn: Drawn | None = None
    with problems.collect():
        accumulation = batch.accumulation(context_length, machine.parallelism.data_parallel_size)
    with problems.collect():
        steps = whole_steps(budget.total_tokens(sizes), batch.global_tokens)
        if available and sequences:
            drawn = draw(data, available, steps, sequences, problems, is_dry=config["dry_run"])
            steps = drawn.steps
        warmup = warmup_steps(factory(config["scheduler"]), steps)
    with problems.collect():
        every = validation.steps(max(steps, 1))
    if problems:
        return None

    @functools.cache  # batch.micro_size=auto has asked for the size that it chose
    def estimate(size: int) -> dict[str, int]:
        return memory.estimate(
            lambda: build_decoder(config, decoder.vocab_size, decoder.eos_id),
            lambda built: build_optimizer(config, built),
            micro_batch_size=size,
            precision=machine.precision,
            parallelism=machine.parallelism,
            accumulation=sequences // machine.parallelism.data_parallel_size // size,
            accelerator=machine.accelerator,
        )

    size, micro_notes = batch.micro_batch(context_length, machine.parallelism.data_parallel_size), []
    if size == AUTO:
        with problems.collect():
            size, note = _micro_size(config, machine, accumulation, estimate)
            micro_notes = [note]
        if problems:
            return None
        accumulation //= size
    needed = estimate(size)
    assumptions = build(config["plan"]) if machine.accelerator == "cuda" else None
    flops = steps * batch.global_tokens * flops_per_token
    scope, why_scope = build(config["compile"]).resolve(
        flops,
        accelerator=machine.accelerator,
        precision=machine.precision,
        devices=machine.world_size,
        by_block=machine.parallelism.gathers,
    )
    if scope != "none" and _is_not_compiled(config, machine.parallelism):
        scope, why_scope = "none", "auto: torch cannot compile whole checkpointed blocks under tensor parallelism"
    return Plan(
        parameters=sizes.parameters,
        flops_per_token=flops_per_token,
        context_length=context_length,
        vocab_size=decoder.vocab_size,
        devices=machine.world_size,
        data_parallel_size=machine.parallelism.data_parallel_size,
        tensor_parallel_size=machine.parallelism.tensor_parallel_size,
        micro_batch_size=size,
        accumulation=accumulation,
        sequences_per_step=sequences,
        tokens_per_step=batch.global_tokens,
        steps=steps,
        tokens=steps * batch.global_tokens,
        flops=flops,
        warmup_steps=warmup,
        validation_every=every,
        epochs=drawn.epochs if drawn is not None else {} if isinstance(manifest, Task) else None,
        shares=drawn.shares if drawn is not None else None,
        precision=machine.precision,
        accelerator=machine.accelerator,
        notes=[  # display.show_plan knows the first two
            f"precision {machine.precision} ({machine.why_precision})",
            f"compile {scope} ({why_scope})",
            *_width_notes(decoder),
            *_batch_notes(batch.global_tokens, sizes.parameters["total"]),
            *machine.notes,
            *micro_notes,
            *memory.remarks(needed, machine.parallelism),
            *(assumptions.remarks(needed, size) if assumptions and not micro_notes else []),
            *storage_notes(config["data"]),
            *part_notes(config["data"]),
            *(["tokens are the task's own symbols, the tokenizer is not used"] if isinstance(manifest, Task) else []),
            *(drawn.notes if drawn is not None else []),
            *budget.notes(sizes, steps * batch.global_tokens),
        ],
        memory=needed,
        tokens_per_day=assumptions.tokens_per_day(flops_per_token, machine.world_size) if assumptions else None,
        compile=scope,
    )


def _micro_size(
    config: dict[str, Any], machine: Machine, sequences: int, estimate: Callable[[int], dict[str, int]]
) -> tuple[int, str]:
    """What `batch.micro_size=auto` is by the estimate, and a sentence about it; `sequences` of a step on each rank."""
    assumed = int(build(config["plan"]).memory_gib * 2**30)
    usable, of_what = micro_batch.usable_memory(machine.accelerator, machine.n_processes, assumed)
    size, why = micro_batch.by_estimate(sequences, estimate, usable, of_what)
    return size, f"{MICRO_NOTE} {size}: {why}"


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
    if not decoder.growth:
        return []
    d_model = decoder.embedding.embedding_dim
    return [f"muP: {1 / decoder.output_scale:.3g} × the base width {d_model * decoder.output_scale:.0f}"]
