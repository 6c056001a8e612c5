"""Plan a run: everything that can be known, and refused, before anything is built or prepared."""

import bisect
import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from thunderhead.config import ConfigError, Problem, build, build_all, factory
from thunderhead.data.curation import Filter
from thunderhead.data.manifest import Manifest
from thunderhead.data.mixture import (
    LITTLE_IS_GAINED_AFTER,
    Turns,
    plan_turns,
    repetition,
    trained_blocks,
    weights_by_fraction,
)
from thunderhead.data.order import blocks, check_blocks
from thunderhead.data.prepare import check_sources, find_manifest
from thunderhead.data.prepared import check_cache, find_prepared, shares
from thunderhead.data.sources import Share, Source
from thunderhead.data.storage import is_remote
from thunderhead.data.synthetic import Task
from thunderhead.model.block import ResidualDropout
from thunderhead.model.decoder import Decoder
from thunderhead.model.tensor_parallel import problems_of as tensor_parallel_problems
from thunderhead.optim.schedules import warmup_steps
from thunderhead.training import hardware, memory, micro_batch
from thunderhead.training.module import build_decoder, build_optimizer
from thunderhead.training.parallel import Parallelism, single
from thunderhead.training.plan import EpochsBudget, Plan, Sizes, training_flops_per_token, whole_steps

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


class Problems(list[Problem]):
    """What is wrong with a configuration, found by trying."""

    @contextlib.contextmanager
    def collect(self) -> Iterator[None]:
        """Note what the inside raises, and go on."""
        try:
            yield
        except ConfigError as error:
            for problem in error.problems:
                self.note(problem)
        except (ValueError, AssertionError, TypeError) as error:
            self.note(Problem("", one_line(error)))

    def note(self, problem: Problem) -> None:
        """Add a problem, once: a missing path is met twice."""
        if problem not in self:
            self.append(problem)


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
    data, manifest, vocab_size, eos_id = _data(config, manifest, problems)

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
    if machine.parallelism.is_sharded and config["compile"]["scope"] == "model":
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
    built: torch.optim.Optimizer | None = None
    with problems.collect():
        built = build_optimizer(config, decoder)
    if machine.parallelism.is_deepspeed:
        for problem in _deepspeed_problems(config, machine, built):
            problems.note(problem)
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
        what = f"strategy={parallelism.name}" if parallelism.is_deepspeed else "strategy.cpu_offload=true"
        message = "needs CUDA devices, and this run is on"
        problems.note(Problem("", f"{what} {message} {accelerator}: use strategy=fsdp"))
    elif parallelism.is_deepspeed and run_here and importlib.util.find_spec("deepspeed") is None:
        message = "needs DeepSpeed: uv pip install 'thunderhead[deepspeed]', or use strategy=fsdp, which needs nothing"
        problems.note(Problem("", f"strategy={parallelism.name} {message}"))
    precision, why = "fp32", ""
    with problems.collect():
        precision, why = build(config["precision"]).resolve(accelerator, is_here)
    notes = []
    if not is_here or (accelerator == "cuda" and n_devices > torch.cuda.device_count()):
        notes = [f"planned for hardware that is not here: {world_size:,} × {accelerator}"]
    return Machine(accelerator, n_devices, world_size, precision, why, parallelism, notes)


def _deepspeed_problems(
    config: dict[str, Any], machine: Machine, optimizer: torch.optim.Optimizer | None
) -> Iterator[Problem]:
    """What does not go with DeepSpeed."""
    name = f"strategy={machine.parallelism.name}"
    if getattr(optimizer, "needs_whole_matrices", False):
        message = f"needs whole matrices, and {name} keeps parameters as flat pieces: use optimizer=adamw or lion"
        yield Problem("optimizer", f"{message}, or strategy=fsdp")
    if machine.precision in ("bf16-true", "fp8"):
        message = f"does not go with {name}, which casts weights itself: use precision=bf16-mixed, or strategy=fsdp"
        yield Problem("", f"precision={machine.precision} {message}")
    if config["trainer"].get("gradient_clip_algorithm") == "value":
        yield Problem("trainer.gradient_clip_algorithm", f"{name} clips by norm only: use norm, or strategy=fsdp")
    if config["compile"]["scope"] in ("block", "model"):
        yield Problem("compile.scope", f"was not tried with {name}: use compile=none, or strategy=fsdp")
    if config.get("resume") is not None:
        yield Problem("resume", f"{name} reads none but its own checkpoints: go on with strategy=fsdp")


def _data(
    config: dict[str, Any], manifest: Manifest | Task | None, problems: Problems
) -> tuple[dict[str, Any], Manifest | Task | None, int, int]:
    """Settings of the data module, the manifest if the data is prepared, and the vocabulary's size and EOS.

    A synthetic task takes the manifest's place: there is nothing to prepare, and the tokens are its own.
    """
    data: dict[str, Any] = {}
    filters: dict[str, Filter] = {}
    with problems.collect():
        filters = build_filters(config["curation"])
    tokenizer, prepared, is_readable = None, is_prepared(config), False
    if config.get("tokenizer") is not None:
        with problems.collect():
            tokenizer = build(config["tokenizer"])
    elif not prepared:
        problems.note(Problem("tokenizer", "needs an option: tokenizer=bpe"))
    with problems.collect():
        data = data_settings(config)
    if isinstance(task := data.get("task"), Task):
        if filters:
            problems.note(Problem("curation", "a synthetic task has no documents to filter: use curation=none"))
        if isinstance(build(config["budget"]), EpochsBudget):
            problems.note(Problem("budget.epochs", "a synthetic task has no epochs: use budget=steps or budget=tokens"))
        return data, task, task.vocab_size, task.eos_id
    if prepared and data:
        if filters:
            problems.note(Problem("curation", "was done when these shards were prepared: use curation=none"))
        data["sources"] = data["sources"] or {}
        with problems.collect():
            found = manifest if isinstance(manifest, Manifest) else find_prepared(tokenizer, **location(data))
            data["sources"] = shares(found, data["sources"])
            if is_remote(data["path"]):
                names = "cache_bytes", "shuffle_window", "max_training_tokens"
                check_cache(found, config["model"]["context_length"], **{name: data[name] for name in names})
            manifest = found
    elif data:
        with problems.collect():
            check_sources(data["sources"], data.get("path"))
            is_readable = True
    if data:
        with problems.collect():
            weights_by_fraction(data["sources"])
    if is_readable and manifest is None and tokenizer is not None:
        with problems.collect():
            manifest = find_manifest(data["sources"], tokenizer, filters=filters, **shard_settings(data))
    if manifest is not None:
        with problems.collect():
            manifest.load_tokenizer()
        return data, manifest, manifest.vocab_size, manifest.eos_id
    if tokenizer is None:
        return data, None, 2**16, 0
    # An untrained tokenizer knows how many tokens it will have at most.
    return data, None, tokenizer.settings.get("vocab_size", 0) or tokenizer.vocab_size, 0


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
    drawn: _Drawn | None = None
    with problems.collect():
        accumulation = batch.accumulation(context_length, machine.parallelism.data_parallel_size)
    with problems.collect():
        steps = whole_steps(budget.total_tokens(sizes), batch.global_tokens)
        if available and sequences:
            drawn = _draw(data, available, steps, sequences, problems, is_dry=config["dry_run"])
            steps = drawn.steps
        warmup = warmup_steps(config["scheduler"].get("warmup", 0), steps)
        factory(config["scheduler"])(0, steps)
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
        by_block=machine.parallelism.is_sharded,
    )
    if machine.parallelism.is_deepspeed:
        scope, why_scope = "none", "not tried with DeepSpeed"
    elif scope != "none" and _is_not_compiled(config, machine.parallelism):
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
            *(["checkpoints are DeepSpeed's, which resume= does not read"] if machine.parallelism.is_deepspeed else []),
            *micro_notes,
            *(assumptions.remarks(needed, size) if assumptions and not micro_notes else []),
            *_storage_notes(config["data"]),
            *_part_notes(config["data"]),
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
    if micro_batch.is_tried(machine.accelerator, machine.parallelism):
        tried = ", ".join(map(str, micro_batch.sizes(sequences)))
        why += f"; the run tries {tried} on the device until memory runs out"
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


def _storage_notes(data: dict[str, Any]) -> list[str]:
    """Where shards are read from and kept, if that is not on this machine."""
    if not is_remote(str(data.get("path"))):
        return []
    size = f"{data['cache_bytes'] / 1e9:,.3g} GB"
    return [
        f"data is fetched from {data['path']} into {data['cache_dir']}: at most {size}, then the longest unused goes"
    ]


def _part_notes(data: dict[str, Any]) -> list[str]:
    """What is trained on, if that is not all."""
    limit = data.get("max_training_tokens")
    return (
        [f"an epoch is {limit:,} tokens, spread evenly over the training data: the rest is left out"] if limit else []
    )


def is_prepared(config: dict[str, Any]) -> bool:
    """Whether the shards lie somewhere already, and bring their tokenizer."""
    return str(config["data"]["_target_"]).endswith(".PreparedShards")


class _Drawn(NamedTuple):
    """What a run draws from its sources."""

    steps: int
    epochs: dict[str, float]
    shares: dict[str, float]
    notes: list[str]


def _draw(  # noqa: PLR0917
    data: dict[str, Any], available: dict[str, int], steps: int, sequences: int, problems: Problems, is_dry: bool
) -> _Drawn:
    """Work out what `steps` steps draw from each source, and fewer steps where a source that ends ends the run.

    Too much repetition refuses a run; the plan alone may be of one that will have other data.
    """
    sources, at_max_epochs = data["sources"], data.get("at_max_epochs", "redistribute")

    def turns_of(steps: int) -> Turns:
        return plan_turns(
            sources,
            available,
            temperature=data.get("temperature", 1.0),
            at_max_epochs=at_max_epochs,
            steps=steps,
            sequences_per_step=sequences,
        )

    asked, turns, notes = steps, turns_of(steps), []
    while turns.end is not None and turns.end < steps * sequences:
        steps = turns.end // sequences
        if steps == 0:
            raise ValueError(
                f"data.sources: max_epochs leaves {turns.end} sequences, fewer than the {sequences} of one step:"
                " raise it, or lower batch.global_tokens"
            )
        turns = turns_of(steps)  # stages are fractions of the run, which is shorter now
    if steps < asked:
        sources_told = " and ".join(
            f"{s} (data.sources.{s}.max_epochs={sources[s].max_epochs:g})" for s in turns.used_up
        )
        if at_max_epochs == "redistribute":
            message = (
                f"only lasts for {steps:,} of {asked:,} steps: all with a weight are used up: {sources_told}; raise"
            )
            message += f" max_epochs, or lower the budget, as budget=steps budget.steps={steps}"
            problems.note(Problem("data.sources", message))
        notes.append(f"stops after {steps:,} of {asked:,} steps, when {sources_told} is used up")
    elif at_max_epochs == "redistribute":
        notes += [
            f"{source} reaches max_epochs={sources[source].max_epochs:g} in step {n // sequences + 1:,}, then the"
            " others take its place"
            for source, n in turns.used_up.items()
            if n < steps * sequences
        ]
    counts = turns.counts(steps * sequences)
    epochs = {source: counts[source] / n for source, n in available.items()}
    shares = {source: counts[source] / (steps * sequences) for source in available}
    allowed = [name for name, source in sources.items() if source.max_epochs is not None]

    def is_too_long(steps: int) -> bool:
        turns = turns_of(steps)
        counts = turns.counts(min(steps * sequences, turns.end or steps * sequences))
        return any(counts[s] > LITTLE_IS_GAINED_AFTER * n for s, n in available.items() if s not in allowed)

    repeated, refused = repetition(
        epochs,
        allowed,
        is_part=data.get("max_training_tokens") is not None,
        fitting=lambda: bisect.bisect_left(range(1, steps), True, key=is_too_long),
    )
    if is_dry:
        notes += [f"a run would be refused: {message}" for message in refused]
    else:
        for message in refused:
            problems.note(Problem("", message))
    return _Drawn(steps, epochs, shares, notes + repeated)


def location(data: dict[str, Any]) -> dict[str, Any]:
    """Those settings that say where prepared shards lie."""
    return {name: data[name] for name in ("path", "cache_dir", "attempts", "timeout")}


def build_filters(curation: dict[str, Any]) -> dict[str, Filter]:
    """The filters of the group `curation`, by name.

    Raises:
        ConfigError: settings of filters contradict each other; names them.
    """
    return build_all(curation["filters"], "curation.filters", Filter)  # type: ignore[type-abstract]


def data_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of the data module, with its sources built.

    Raises:
        ConfigError: settings of sources contradict each other; names them.
    """
    data = config["data"]
    build_all(data.get("sources") or {}, "data.sources", Share if is_prepared(config) else Source)
    return dict(factory(data).keywords)  # type: ignore[attr-defined]


def shard_settings(data: dict[str, Any]) -> dict[str, Any]:
    """Those settings of the data module that say which shards, and where."""
    return {name: data[name] for name in ("shards_dir", "validation_fraction")}


def one_line(error: Exception) -> str:
    """The first line of an error's message; of one that a loader's worker raised, the line that says what it was."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if lines[0].startswith("Caught ") and " in DataLoader worker process" in lines[0]:
        return lines[-1].partition(": ")[2] or lines[-1]
    return lines[0]
