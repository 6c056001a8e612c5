"""The way of one run: check → plan → record → prepare → fit → summary."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from lightning import Trainer
from omegaconf import DictConfig

from thunderhead import config as configuration
from thunderhead.config import ConfigError, Problem, build, factory
from thunderhead.data.datamodule import TokenDataModule
from thunderhead.data.manifest import Manifest
from thunderhead.data.order import check_blocks, epochs_seen
from thunderhead.data.prepare import check_sources, find_manifest, prepare
from thunderhead.model.decoder import Decoder
from thunderhead.optim.schedules import warmup_steps
from thunderhead.training import display, hardware, launch, memory, record
from thunderhead.training.callbacks.metrics import LogMetrics
from thunderhead.training.callbacks.schedule_picture import SchedulePicture
from thunderhead.training.callbacks.state import AtomicCheckpointIO, RandomState
from thunderhead.training.module import GROUPS, LanguageModel, build_decoder, build_optimizer
from thunderhead.training.plan import Plan, Sizes, training_flops_per_token, whole_steps
from thunderhead.types import NonNegativeInt

# Arguments of Lightning's Trainer that follow from other groups.
DERIVED = {
    "max_steps": "budget",
    "min_steps": "budget",
    "max_epochs": "budget",
    "min_epochs": "budget",
    "accumulate_grad_batches": "batch",
    "val_check_interval": "validation.every",
    "check_val_every_n_epoch": "validation.every",
    "precision": "precision",
    "strategy": "strategy",
    "plugins": "precision and strategy",
    "callbacks": "callbacks",
    "logger": "logger",
    "default_root_dir": "hydra.run.dir",
    "use_distributed_sampler": "data",
}


def settings(
    *, name: str, seed: NonNegativeInt, dry_run: bool, keep_freed_memory: bool, resume: str | None = None
) -> None:
    """The top-level settings, for the check: the run's name, its seed, only plan, allocator, the run to continue."""


def train(config: DictConfig, run_dir: Path | None = None) -> float | None:
    """Train what a composed configuration describes.

    Args:
        config: as Hydra composed it.
        run_dir: where the record goes; None = the folder that Hydra gave this run.

    Returns:
        The final validation loss (nats a token), for sweepers; None after a dry run.

    Raises:
        ConfigError: the configuration is refused; nothing was written.
    """
    run_dir = run_dir or configuration.output_dir()
    try:
        resolved, resume_from = _resolve(config)
        planned = plan_run(resolved)
    except BaseException:
        _remove_if_empty(run_dir)
        raise
    if resume_from is not None:
        _remove_if_empty(run_dir)
        run_dir = resume_from
    if not launch.is_launched() and launch.global_rank() == 0:
        display.show_plan(planned.plan)
    if resolved["dry_run"]:
        _remove_if_empty(run_dir)
        return None

    if not launch.is_launched():
        planned = _with_data(resolved, planned)
        record.write_text(run_dir / "config.yaml", configuration.to_yaml(resolved))
        record.write_json(run_dir / "plan.json", planned.plan.to_dict())
        environment = record.surroundings() | {"overrides": configuration.invocation_overrides()}
        record.write_json(run_dir / "environment.json", environment)
    if planned.n_processes > 1 and not launch.is_rank():
        summary = launch.launch(resolved, run_dir, planned.n_processes)
    else:
        summary = _fit(resolved, planned, run_dir)
    return float(summary["val_loss"])


# --------------------------------------------------------------------------------------------------------------------
# Configuration and plan


def _resolve(config: DictConfig) -> tuple[dict[str, Any], Path | None]:
    """The configuration as plain containers, checked; that of the run to resume, where one is given."""
    resume = config.get("resume")
    if resume is not None and not launch.is_launched():
        folder = Path(str(resume))
        if not (folder / "config.yaml").is_file():
            message = f"{folder} is no run folder (it has no config.yaml): give one of logs/runs/<name>/<time>"
            raise ConfigError([Problem("resume", message)])
        if not (folder / "checkpoints" / "last.ckpt").is_file():
            raise ConfigError([Problem("resume", f"{folder} has no checkpoints/last.ckpt to go on from")])
        recorded = yaml.safe_load((folder / "config.yaml").read_text())
        overrides = [o for o in configuration.invocation_overrides() if not o.startswith(("resume=", "hydra"))]
        resolved = configuration.with_overrides(recorded, overrides) | {"resume": str(folder)}
    else:
        resolved = configuration.plain(config)
        folder = Path(resume) if resume is not None else None
    problems = configuration.check(resolved, settings)
    for argument, group in DERIVED.items():
        if argument in resolved["trainer"]:
            problems.append(Problem(f"trainer.{argument}", f"follows from other settings: set {group} instead"))
    if problems:
        raise ConfigError(problems)
    return resolved, folder if resume is not None else None


class Planned(NamedTuple):
    """A plan and the cheap things that were made for it."""

    plan: Plan
    datamodule_settings: dict[str, Any]
    manifest: Manifest | None
    n_processes: int  # on this node
    accelerator: str
    precision: str


def plan_run(config: dict[str, Any], manifest: Manifest | None = None) -> Planned:
    """Work out a run before anything is built.

    Raises:
        ConfigError: all contradictions of the configuration that can be seen without the data.
    """
    problems: list[Problem] = []

    @contextlib.contextmanager
    def collected() -> Iterator[None]:
        try:
            yield
        except (ValueError, AssertionError, TypeError) as error:
            problem = Problem("", _one_line(error))
            if problem not in problems:  # a missing path is met twice
                problems.append(problem)

    accelerator, n_devices, world_size = "cpu", 1, 1
    with collected():
        asked = config["trainer"].get("accelerator", "auto")
        accelerator = hardware.resolve_accelerator(asked)
    with collected():
        n_devices = hardware.device_count(config["trainer"].get("devices", 1), accelerator)
        world_size = n_devices * int(config["trainer"].get("num_nodes", 1))
    with collected():
        factory(config["strategy"])(world_size)
    precision, why = build(config["precision"]).resolve(accelerator)

    tokenizer = data = None
    with collected():
        tokenizer = build(config["tokenizer"])
    with collected():
        data = factory(config["data"]).keywords  # type: ignore[attr-defined]
        check_sources(data["sources"], data.get("path"))
    vocab_size, eos_id = 2**16, 0
    if data is not None and tokenizer is not None:
        with collected():
            manifest = manifest or find_manifest(data["sources"], tokenizer, **_shard_settings(data))
        # An untrained tokenizer knows how many tokens it will have at most.
        vocab_size, eos_id = tokenizer.settings.get("vocab_size", 0) or tokenizer.vocab_size, 0
    if manifest is not None:
        vocab_size, eos_id = manifest.vocab_size, manifest.eos_id

    decoder: Decoder | None = None
    with collected(), torch.device("meta"):
        decoder = build_decoder(config, vocab_size, eos_id)
    if decoder is None:
        raise ConfigError(problems)
    if accelerator != "cuda" and decoder.attention.needs_flex:
        what = "attention.logit_softcap" if config["attention"].get("logit_softcap") else "attention.backend=flex"
        message = (
            f"needs flex_attention, which trains on CUDA only, and this run is on {accelerator}: set it to null or auto"
        )
        problems.append(Problem(what, message))
    with collected():
        build_optimizer(config, decoder)
    if manifest is not None:
        with collected():
            check_blocks(manifest, decoder.context_length)

    plan = _derive(config, decoder, manifest, world_size, accelerator, precision, why, problems)
    if problems or plan is None:
        raise ConfigError(problems)
    assert data is not None
    return Planned(plan, data, manifest, n_devices, accelerator, precision)


def _derive(
    config: dict[str, Any],
    decoder: Decoder,
    manifest: Manifest | None,
    world_size: int,
    accelerator: str,
    precision: str,
    why_precision: str,
    problems: list[Problem],
) -> Plan | None:
    batch, budget, validation = (build(config[group]) for group in ("batch", "budget", "validation"))
    context_length = decoder.context_length
    flops_per_token = training_flops_per_token(decoder.forward_flops_per_token())
    epoch_tokens = None
    if manifest is not None:
        epochs = epochs_seen(manifest, context_length, 1)
        epoch_tokens = round(context_length / sum(epochs.values())) if epochs else None
    elif not config["dry_run"]:
        epoch_tokens = 2**40  # the data will be prepared and the plan made anew; now only what is wrong anyway counts
    sizes = Sizes(decoder.parameter_counts(), flops_per_token, batch.global_tokens, epoch_tokens)
    accumulation = steps = warmup = every = 0
    try:
        accumulation = batch.accumulation(context_length, world_size)
    except ValueError as error:
        problems.append(Problem("", str(error)))
    try:
        steps = whole_steps(budget.total_tokens(sizes), batch.global_tokens)
        warmup = warmup_steps(config["scheduler"].get("warmup", 0), steps)
        factory(config["scheduler"])(0, steps)
    except ValueError as error:
        problems.append(Problem("", str(error)))
    try:
        every = validation.steps(max(steps, 1))
    except ValueError as error:
        problems.append(Problem("", str(error)))
    if problems:
        return None
    sequences = batch.global_tokens // context_length
    return Plan(
        parameters=sizes.parameters,
        flops_per_token=flops_per_token,
        context_length=context_length,
        vocab_size=decoder.vocab_size,
        data_parallel_size=world_size,
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
        precision=precision,
        accelerator=accelerator,
        notes=[f"precision {precision} ({why_precision})"],
        memory=memory.estimate(
            lambda: build_decoder(config, decoder.vocab_size, decoder.eos_id),
            lambda built: build_optimizer(config, built),
            micro_batch_size=batch.micro_size,
            precision=precision,
            shards=world_size if config["strategy"]["_target_"].endswith(".fsdp") else 1,
        ),
    )


def _shard_settings(data: dict[str, Any]) -> dict[str, Any]:
    return {name: data[name] for name in ("shards_dir", "validation_fraction")}


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0]


def _with_data(config: dict[str, Any], planned: Planned) -> Planned:
    """Prepare the shards if they are not there, and plan with what they really hold."""
    if planned.manifest is not None:
        return planned
    data = planned.datamodule_settings
    display.say(f"Preparing data: {', '.join(data['sources'])} → {data['shards_dir']} (once; the next run finds it)")
    try:
        manifest = prepare(data["sources"], build(config["tokenizer"]), **_shard_settings(data))
    except ValueError as error:
        raise ConfigError([Problem("", _one_line(error))]) from error
    planned = plan_run(config, manifest)
    display.show_data(manifest, planned.plan)
    return planned


def _remove_if_empty(folder: Path) -> None:
    """Hydra makes the run's folder before we can refuse the run."""
    with contextlib.suppress(OSError):
        folder.rmdir()
        folder.parent.rmdir()


# --------------------------------------------------------------------------------------------------------------------
# Fit


def _fit(config: dict[str, Any], planned: Planned, run_dir: Path) -> dict[str, Any]:
    plan, manifest = planned.plan, planned.manifest
    assert manifest is not None
    if config["keep_freed_memory"]:
        hardware.keep_freed_memory()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are forked after the tokenizer was used
    tokenizer = manifest.load_tokenizer()
    datamodule = build(
        config["data"],
        tokenizer=tokenizer,
        context_length=plan.context_length,
        micro_batch_size=plan.micro_batch_size,
        sequences_per_step=plan.sequences_per_step,
        seed=config["seed"],
    )
    assert isinstance(datamodule, TokenDataModule)
    datamodule.manifest = manifest
    model = LanguageModel(
        {group: config[group] for group in GROUPS},
        seed=config["seed"],
        vocab_size=manifest.vocab_size,
        eos_id=manifest.eos_id,
        total_steps=plan.steps,
        token_bytes=tokenizer.token_bytes().tolist(),
    )
    peak = hardware.peak_flops(planned.accelerator, planned.precision)
    log_metrics = LogMetrics(
        plan.tokens_per_step,
        plan.flops_per_token,
        peak * plan.data_parallel_size if peak else None,
        {source: round(plan.tokens / epochs) for source, epochs in (plan.epochs or {}).items()},
    )
    trainer = make_trainer(config, planned, run_dir, log_metrics)
    last = run_dir / "checkpoints" / "last.ckpt"
    resume_from = str(last) if config.get("resume") else None
    with _quiet_lightning():
        try:
            trainer.fit(model, datamodule=datamodule, ckpt_path=resume_from)
        except ValueError as error:
            if trainer.global_step == 0:  # damaged shards, a refused combination: found before the first step
                raise ConfigError([Problem("", _one_line(error))]) from error
            raise
        if trainer.global_step < plan.steps:
            raise RuntimeError(f"training stopped at step {trainer.global_step} of {plan.steps}; see the log above")
        if log_metrics.validated_at != trainer.global_step:
            trainer.validate(model, datamodule=datamodule, verbose=False)
        if trainer.checkpoint_callbacks:
            trainer.save_checkpoint(last)
    results = {name: value.item() for name, value in trainer.callback_metrics.items()}
    with torch.autocast(
        planned.accelerator, hardware.COMPUTE_DTYPE[planned.precision], planned.precision.endswith("mixed")
    ):
        text = factory(config["generation"])(model.decoder, tokenizer, model.device)
    summary = {
        "val_loss": results["val/loss"],
        "perplexity": results["val/perplexity"],
        "bits_per_byte": results["val/bits_per_byte"],
        "unigram_entropy": _unigram_entropy(manifest),
        "tokens": plan.tokens,
        "steps": plan.steps,
        "parameters": plan.parameters["total"],
        "flops": plan.flops,
        "tokens_per_second": log_metrics.tokens_timed / log_metrics.training_seconds,
        "seconds": log_metrics.training_seconds,
        "precision": planned.precision,
        "device": hardware.device_name(planned.accelerator),
    }
    if trainer.is_global_zero:
        record.write_text(run_dir / "sample.txt", text)
        for logger in trainer.loggers:
            if hasattr(logger.experiment, "add_text"):
                logger.experiment.add_text("sample", f"```\n{text}\n```", plan.steps)
            logger.finalize("success")
        record.write_json(run_dir / "summary.json", summary)
        display.show_summary(summary, text, run_dir)
    return summary


def _unigram_entropy(manifest: Manifest) -> float:
    """Nats a token of the training split if tokens were drawn by their frequency alone, weighted over sources."""
    shards = manifest.splits["train"].values()
    return sum(s.unigram_entropy * s.tokens for s in shards) / sum(s.tokens for s in shards)


def make_trainer(config: dict[str, Any], planned: Planned, run_dir: Path, log_metrics: LogMetrics) -> Trainer:
    """Lightning's Trainer with everything that follows from the plan."""
    plan = planned.plan
    loggers = [build(node, save_dir=str(run_dir)) for node in config["logger"].values()]
    schedule = factory(config["scheduler"])
    callbacks = [
        log_metrics,
        RandomState(config["seed"]),
        SchedulePicture(schedule, config["optimizer"]["lr"], plan.tokens_per_step),
        *(build(node) for node in config["callbacks"].values()),
    ]
    precision = hardware.precision_plugin(planned.precision, planned.accelerator)
    plugins = [*precision.pop("plugins", []), AtomicCheckpointIO()]
    with _quiet_lightning():
        trainer: Trainer = build(
            config["trainer"],
            **precision,
            plugins=plugins,
            strategy=factory(config["strategy"])(plan.data_parallel_size),
            callbacks=callbacks,
            logger=loggers or False,
            default_root_dir=str(run_dir),
            max_steps=plan.steps,
            max_epochs=-1,
            accumulate_grad_batches=plan.accumulation,
            val_check_interval=plan.validation_every * plan.accumulation,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            enable_model_summary=False,
        )
    return trainer


@contextlib.contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Remarks of Lightning and litdata on what is decided here (devices, loader workers) are noise to a user."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "litdata")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        warnings.filterwarnings("ignore", ".*LeafSpec.*deprecated", FutureWarning)
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
