"""Plan a run: everything that can be known, and refused, before anything is built or prepared."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from thunderhead.config import ConfigError, Problem, build, factory
from thunderhead.data.manifest import Manifest
from thunderhead.data.order import check_blocks, epochs_seen
from thunderhead.data.prepare import check_sources, find_manifest
from thunderhead.data.prepared import check_cache, find_prepared, shares
from thunderhead.data.storage import is_remote
from thunderhead.model.decoder import Decoder
from thunderhead.optim.schedules import warmup_steps
from thunderhead.training import hardware, memory
from thunderhead.training.module import build_decoder, build_optimizer
from thunderhead.training.plan import Plan, Sizes, training_flops_per_token, whole_steps

UNKNOWN_EPOCH = 2**40
"""Stands for the tokens of an epoch while the data is not prepared: then only what is wrong anyway is refused."""


class Machine(NamedTuple):
    """What a run computes on."""

    accelerator: str
    n_processes: int  # on this node
    world_size: int
    precision: str
    why_precision: str


class Planned(NamedTuple):
    """A plan and the cheap things that were made for it."""

    plan: Plan
    machine: Machine
    data: dict[str, Any]  # settings of the data module
    manifest: Manifest | None  # None: the data is not prepared yet


class _Problems(list[Problem]):
    """What is wrong with a configuration, found by trying."""

    @contextlib.contextmanager
    def collect(self) -> Iterator[None]:
        """Note what the inside raises, and go on."""
        try:
            yield
        except (ValueError, AssertionError, TypeError) as error:
            self.note(Problem("", one_line(error)))

    def note(self, problem: Problem) -> None:
        """Add a problem, once: a missing path is met twice."""
        if problem not in self:
            self.append(problem)


def plan_run(config: dict[str, Any], manifest: Manifest | None = None) -> Planned:
    """Work out a run before anything is built.

    Args:
        config: resolved and checked, plain containers.
        manifest: of the prepared data; None looks for it.

    Raises:
        ConfigError: all contradictions of the configuration that can be seen without the data.
    """
    problems = _Problems()
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
    if is_sharded(config) and config["compile"]["scope"] == "model":
        message = (
            "compile=model cannot trace through strategy=fsdp, which gathers each block's weights: use compile=block"
        )
        problems.note(Problem("compile.scope", message))
    with problems.collect():
        build_optimizer(config, decoder)
    if manifest is not None:
        with problems.collect():
            check_blocks(manifest, decoder.context_length)
    if problems:
        manifest = None  # whatever is wrong with it was noted; the rest of the plan can still be looked at
    plan = _derive(config, decoder, manifest, machine, problems)
    if plan is None:
        raise ConfigError(problems)
    return Planned(plan, machine, data, manifest)


def _machine(config: dict[str, Any], problems: _Problems) -> Machine:
    trainer = config["trainer"]
    accelerator, n_devices = "cpu", 1
    with problems.collect():
        accelerator = hardware.resolve_accelerator(trainer.get("accelerator", "auto"))
    with problems.collect():
        n_devices = hardware.device_count(trainer.get("devices", 1), accelerator)
    world_size = n_devices * int(trainer.get("num_nodes", 1))
    with problems.collect():
        factory(config["strategy"])(world_size)
    precision, why = build(config["precision"]).resolve(accelerator)
    return Machine(accelerator, n_devices, world_size, precision, why)


def _data(
    config: dict[str, Any], manifest: Manifest | None, problems: _Problems
) -> tuple[dict[str, Any], Manifest | None, int, int]:
    """Settings of the data module, the manifest if the data is prepared, and the vocabulary's size and EOS."""
    data: dict[str, Any] = {}
    tokenizer, prepared = None, is_prepared(config)
    if config.get("tokenizer") is not None:
        with problems.collect():
            tokenizer = build(config["tokenizer"])
    elif not prepared:
        problems.note(Problem("tokenizer", "needs an option: tokenizer=bpe"))
    with problems.collect():
        data = factory(config["data"]).keywords  # type: ignore[attr-defined]
        if not prepared:
            check_sources(data["sources"], data.get("path"))
    if prepared and data:
        data["sources"] = data["sources"] or {}
        with problems.collect():
            manifest = manifest or find_prepared(tokenizer, **location(data))
            data["sources"] = shares(manifest, data["sources"])
            if is_remote(data["path"]):
                check_cache(manifest, data["cache_bytes"], config["model"]["context_length"], data["shuffle_window"])
    elif manifest is None and tokenizer is not None and data:
        with problems.collect():
            manifest = find_manifest(data["sources"], tokenizer, **shard_settings(data))
    if manifest is not None:
        with problems.collect():
            manifest.load_tokenizer()
        return data, manifest, manifest.vocab_size, manifest.eos_id
    if tokenizer is None:
        return data, None, 2**16, 0
    # An untrained tokenizer knows how many tokens it will have at most.
    return data, None, tokenizer.settings.get("vocab_size", 0) or tokenizer.vocab_size, 0


def _derive(
    config: dict[str, Any], decoder: Decoder, manifest: Manifest | None, machine: Machine, problems: _Problems
) -> Plan | None:
    """The plan; None if there are problems."""
    batch, budget, validation = (build(config[group]) for group in ("batch", "budget", "validation"))
    context_length = decoder.context_length
    flops_per_token = training_flops_per_token(decoder.forward_flops_per_token())
    epoch_tokens = None if config["dry_run"] else UNKNOWN_EPOCH
    if manifest is not None:
        epochs = epochs_seen(manifest, context_length, 1)
        epoch_tokens = round(context_length / sum(epochs.values())) if epochs else None
    sizes = Sizes(decoder.parameter_counts(), flops_per_token, batch.global_tokens, epoch_tokens)
    accumulation = steps = warmup = every = 0
    with problems.collect():
        accumulation = batch.accumulation(context_length, machine.world_size)
    with problems.collect():
        steps = whole_steps(budget.total_tokens(sizes), batch.global_tokens)
        warmup = warmup_steps(config["scheduler"].get("warmup", 0), steps)
        factory(config["scheduler"])(0, steps)
    with problems.collect():
        every = validation.steps(max(steps, 1))
    if problems:
        return None
    sequences = batch.global_tokens // context_length
    return Plan(
        parameters=sizes.parameters,
        flops_per_token=flops_per_token,
        context_length=context_length,
        vocab_size=decoder.vocab_size,
        data_parallel_size=machine.world_size,
        micro_batch_size=batch.micro_size,
        accumulation=accumulation,
        sequences_per_step=sequences,
        tokens_per_step=batch.global_tokens,
        steps=steps,
        tokens=steps * batch.global_tokens,
        flops=steps * batch.global_tokens * flops_per_token,
        warmup_steps=warmup,
        validation_every=every,
        epochs=epochs_seen(manifest, context_length, steps * sequences) if manifest is not None else None,
        precision=machine.precision,
        accelerator=machine.accelerator,
        notes=[f"precision {machine.precision} ({machine.why_precision})", *_storage_notes(config["data"])],
        memory=memory.estimate(
            lambda: build_decoder(config, decoder.vocab_size, decoder.eos_id),
            lambda built: build_optimizer(config, built),
            micro_batch_size=batch.micro_size,
            precision=machine.precision,
            shards=machine.world_size if is_sharded(config) else 1,
        ),
    )


def _storage_notes(data: dict[str, Any]) -> list[str]:
    """Where shards are read from and kept, if that is not on this machine."""
    if not is_remote(str(data.get("path"))):
        return []
    size = f"{data['cache_bytes'] / 1e9:,.3g} GB"
    return [
        f"data is fetched from {data['path']} into {data['cache_dir']}: at most {size}, then the longest unused goes"
    ]


def is_prepared(config: dict[str, Any]) -> bool:
    """Whether the shards lie somewhere already, and bring their tokenizer."""
    return str(config["data"]["_target_"]).endswith(".PreparedShards")


def is_sharded(config: dict[str, Any]) -> bool:
    """Whether each rank holds a part of every parameter."""
    return str(config["strategy"]["_target_"]).endswith(".fsdp")


def location(data: dict[str, Any]) -> dict[str, Any]:
    """Those settings that say where prepared shards lie."""
    return {name: data[name] for name in ("path", "cache_dir", "attempts", "timeout")}


def shard_settings(data: dict[str, Any]) -> dict[str, Any]:
    """Those settings of the data module that say which shards, and where."""
    return {name: data[name] for name in ("shards_dir", "validation_fraction")}


def one_line(error: Exception) -> str:
    """The first line of an error's message; of one that a loader's worker raised, the line that says what it was."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if lines[0].startswith("Caught ") and " in DataLoader worker process" in lines[0]:
        return lines[-1].partition(": ")[2] or lines[-1]
    return lines[0]
