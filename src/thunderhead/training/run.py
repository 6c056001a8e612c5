"""The way of one run: check → plan → record → prepare → fit → summary."""

import contextlib
import hashlib
import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ProgressBar,
)
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from omegaconf import DictConfig

from thunderhead import config as configuration
from thunderhead.config import ConfigError, Problem, build, build_all, factory
from thunderhead.data.datamodule import TokenDataModule
from thunderhead.data.manifest import Manifest, ShardError
from thunderhead.data.synthetic import Task
from thunderhead.training import display, hardware, launch, micro_batch, record
from thunderhead.training import resume as resuming
from thunderhead.training.answers import sample_answers
from thunderhead.training.callbacks.metrics import LogMetrics
from thunderhead.training.callbacks.profile import ProfileSteps
from thunderhead.training.callbacks.schedule_picture import SchedulePicture
from thunderhead.training.callbacks.state import (
    AtomicCheckpointIO,
    BackgroundCheckpointIO,
    BeginRecord,
    CheckpointError,
    ExactResume,
)
from thunderhead.training.callbacks.stop import StopOnSignal
from thunderhead.training.corpus import make_shards
from thunderhead.training.decoding import decode_tokens_per_second
from thunderhead.training.module import GROUPS, STANDARD, LanguageModel, build_decoder
from thunderhead.training.planning import AUTO, MICRO_NOTE, Planned, plan_run
from thunderhead.training.problems import one_line
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
    "enable_progress_bar": "callbacks",
    "enable_checkpointing": "callbacks",
    # They would begin the data anew after so many batches, or validate on other tokens than the record says.
    "limit_train_batches": "data.max_training_tokens",
    "overfit_batches": "data.max_training_tokens",
    "limit_val_batches": "data.max_validation_tokens",
}

NOT_AGREED = (
    "auto cannot be agreed on by processes that torchrun or SLURM started: write the number that one process finds, or"
    " let train.py start them (trainer.devices)"
)


# Callbacks of Lightning that would change what other groups decide.
DECIDED = {
    GradientAccumulationScheduler: "accumulation follows from batch.global_tokens and batch.micro_size",
    BatchSizeFinder: "the largest micro-batch that fits is found by batch.micro_size=auto",
    LearningRateFinder: "learning rates are tried by tune=lr, in a sweep",
}
REFUSALS = (MisconfigurationException, ModuleNotFoundError)
"""What callbacks and loggers of other packages say no with, beside ValueError."""


def settings(
    *,
    name: str,
    seed: NonNegativeInt,
    dry_run: bool,
    keep_freed_memory: bool,
    profile: bool = False,
    background_checkpoints: bool = False,
    resume: str | None = None,
) -> None:
    """The top-level settings, for the check; conf/train.yaml says what each does."""


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
        resolved, checkpoint = _resolve(config, run_dir)
        decided = resolved
        if checkpoint is not None and resolved["batch"]["micro_size"] == AUTO:
            plan = record.read_json(checkpoint.parents[1] / "plan.json")
            decided = _with_recorded_number(resolved, plan["micro_batch_size"])
        planned = plan_run(decided)
    except BaseException:
        _remove_if_empty(run_dir)
        raise
    if checkpoint is not None:
        _remove_if_empty(run_dir)
        run_dir = checkpoint.parents[1]
        finished = record.read_summary(run_dir)
        if finished is not None and finished["steps"] >= planned.plan.steps:
            message = f"{run_dir} has made all its {finished['steps']:,} steps: raise the budget, as budget.steps=…"
            raise ConfigError([Problem("resume", message)])
    if not launch.is_launched() and launch.global_rank() == 0:
        display.show_plan(planned.plan)
    if resolved["dry_run"]:
        _remove_if_empty(run_dir)
        return None

    if checkpoint is None and not launch.is_launched() and launch.global_rank() == 0:
        _refuse_to_overwrite(run_dir)
    if launch.is_launched():
        return float(_fit(decided, planned, run_dir, checkpoint)["val_loss"])
    with resuming.held(run_dir) if launch.global_rank() == 0 else contextlib.nullcontext():
        decided, planned = _with_micro_size(decided, _with_data(decided, planned), planned.plan.notes)
        assert planned.manifest is not None
        if checkpoint is not None:
            changes = resuming.check(checkpoint, resolved, planned.plan.steps, planned.manifest)
            if changes and launch.global_rank() == 0:
                display.say(f"Changed since the checkpoint: {', '.join(map(str, changes))}")
        overrides = resuming.recorded_overrides(run_dir)
        overrides += [override for override in configuration.invocation_overrides() if override not in overrides]
        files = {
            "tokenizer.json": planned.manifest.load_tokenizer().to_json(),
            "data.json": record.to_json(planned.manifest.summary()),
            "config.yaml": configuration.to_yaml(resolved),
            "plan.json": record.to_json(planned.plan.to_dict()),
            "environment.json": record.to_json(record.surroundings() | {"overrides": overrides}),
        }
        if launch.global_rank() == 0:
            record.stage(run_dir, files)
            if checkpoint is None:  # what a run was resumed with is recorded once it is accepted, by BeginRecord
                record.take_over(run_dir)
        if planned.machine.n_processes > 1 and not launch.is_rank():
            summary = launch.launch(decided, run_dir, planned.machine.n_processes)
        else:
            summary = _fit(decided, planned, run_dir, checkpoint)
    if launch.global_rank() > 0:
        _remove_if_empty(run_dir)  # Hydra's, named by the time of this process' start; the record is rank 0's
    return float(summary["val_loss"])


# --------------------------------------------------------------------------------------------------------------------
# Configuration and plan


def _resolve(config: DictConfig, run_dir: Path) -> tuple[dict[str, Any], Path | None]:
    """The configuration as plain containers, checked; where a run is resumed, its recorded one, and the checkpoint."""
    resume = config.get("resume")
    checkpoint: Path | None = None
    if resume is not None and launch.is_launched():
        checkpoint = Path(str(resume))
    elif resume is not None:
        checkpoint = _find_checkpoint(str(resume), run_dir)
    if checkpoint is None or launch.is_launched():
        resolved = configuration.plain(config) | {"resume": str(checkpoint) if checkpoint is not None else None}
    else:
        folder = checkpoint.parents[1]
        recorded = resuming.recorded_config(folder)
        overrides = [o for o in configuration.invocation_overrides() if not o.startswith(("resume=", "hydra"))]
        known = resuming.recorded_overrides(folder)
        switched = {
            group: configuration.plain(config[group])
            for group in sorted(configuration.chosen_groups(overrides).intersection(resuming.SWITCHABLE))
        }
        resolved = {"parametrization": STANDARD, **configuration.with_overrides(recorded, overrides, known, switched)}
        resolved["resume"] = str(checkpoint)
    problems = find_problems(resolved)
    agreed = checkpoint is not None or not launch.is_rank() or launch.is_launched()
    if resolved.get("batch", {}).get("micro_size") == AUTO and not agreed:
        problems.append(Problem("batch.micro_size", NOT_AGREED))
    if problems:
        raise ConfigError(problems)
    return resolved, checkpoint


def _find_checkpoint(resume: str, run_dir: Path) -> Path | None:
    """What `resume` means, said on the terminal."""
    if resume == "auto" and configuration.is_multirun():
        message = "auto looks for the last run of a name, and a sweep has many: give the folder of one run"
        raise ConfigError([Problem("resume", message)])
    found = resuming.find(resume, run_dir)
    remarks = (
        found.remarks if found is not None else [f"resume=auto: no unfinished run in {run_dir.parent}: starting anew"]
    )
    if launch.global_rank() == 0:
        for remark in remarks:
            display.say(remark)
        if found is not None and (remarks or resume == "auto"):
            display.say(f"Going on from {found.checkpoint}")
    return found.checkpoint if found is not None else None


def find_problems(config: dict[str, Any]) -> list[Problem]:
    """What is wrong with a single run's configuration, before it is planned."""
    problems = configuration.check(config, settings)
    for group in configuration.default_groups() if config.get("resume") is None else ():  # records may be older
        if group not in config and group not in ("match", "tune", "debug"):
            known = ", ".join(configuration.options(group))
            problems.append(Problem(group, f"was taken out, and a run needs an option of it: {known}"))
    for group in ("callbacks", "logger"):
        for name, node in config.get(group, {}).items():
            if not (isinstance(node, dict) and "_target_" in node):
                problems.append(Problem(f"{group}.{name}", f"has no _target_: take it out with ~{group}.{name}"))
    if not problems:
        try:
            built = _callbacks(config)
        except ConfigError as error:
            problems += error.problems
        else:
            decided = {name: DECIDED[kind] for name, c in built.items() for kind in DECIDED if isinstance(c, kind)}
            problems += [Problem(f"callbacks.{name}", f"{why}: take it out") for name, why in decided.items()]
    for argument, group in DERIVED.items():
        if argument in config.get("trainer", {}):
            problems.append(Problem(f"trainer.{argument}", f"follows from other settings: set {group} instead"))
    every = config["trainer"].get("log_every_n_steps")
    if isinstance(every, int) and every < 1:
        message = f"{every} is not accepted: should be greater than 0; a large number logs the first and last step only"
        problems.append(Problem("trainer.log_every_n_steps", message))
    for group, none in (("match", "Unmatched"), ("tune", "Untuned")):
        if group in config and not config[group]["_target_"].endswith(f".{none}"):
            problems.append(
                Problem(group, f"acts on the arms of a sweep, and this is a single run: add -m or {group}=none")
            )
    return problems


def _with_data(config: dict[str, Any], planned: Planned) -> Planned:
    """Prepare the shards if they are not there, and plan with what they really hold."""
    if planned.manifest is not None:
        return planned
    data = planned.data
    if launch.global_rank() == 0:
        display.say(
            f"Preparing data: {', '.join(data['sources'])} → {data['shards_dir']} (once; the next run finds it)"
        )
    manifest = make_shards(config, data)
    planned = plan_run(config, manifest)
    if launch.global_rank() == 0:
        display.show_data(manifest, planned.plan)
    return planned


def _with_number(config: dict[str, Any], micro_size: int) -> dict[str, Any]:
    return {**config, "batch": {**config["batch"], "micro_size": micro_size}}


def _with_recorded_number(config: dict[str, Any], micro_size: int) -> dict[str, Any]:
    """The configuration with the number that `batch.micro_size=auto` stood for before a run was resumed.

    Where more ranks do not have that many sequences each any more, it is as it was: the number is found anew.
    """
    plan = plan_run(_with_number(config, 1)).plan
    if plan.sequences_per_step // plan.data_parallel_size % micro_size == 0:
        return _with_number(config, micro_size)
    if launch.is_rank() and not launch.is_launched():
        raise ConfigError([Problem("batch.micro_size", NOT_AGREED)])
    return config


def _with_micro_size(config: dict[str, Any], planned: Planned, shown: list[str]) -> tuple[dict[str, Any], Planned]:
    """The configuration and the plan with the number that `batch.micro_size=auto` stands for; `shown` is known already.

    Raises:
        ConfigError: nothing fits.
    """
    if config["batch"]["micro_size"] != AUTO:
        return config, planned
    machine, manifest = planned.machine, planned.manifest
    assert manifest is not None
    (why,) = (note for note in planned.plan.notes if note.startswith(MICRO_NOTE))
    size = planned.plan.micro_batch_size
    if micro_batch.is_tried(machine.accelerator, machine.parallelism):
        devices = config["trainer"].get("devices", 1)
        try:
            choice = micro_batch.by_trial(
                config,
                planned.plan.sequences_per_step // planned.plan.data_parallel_size,
                devices if isinstance(devices, list) else range(machine.n_processes),
                precision=machine.precision,
                vocab_size=manifest.vocab_size,
                eos_id=manifest.eos_id,
            )
        except ValueError as error:
            raise ConfigError([Problem("", one_line(error))]) from error
        size, why = choice.size, f"{MICRO_NOTE} {choice.size}: {choice.why}"
    if why not in shown:
        display.say(why)
    decided = _with_number(config, size)
    planned = plan_run(decided, manifest)
    notes = [note for note in planned.plan.notes if not note.startswith("batch.micro_size could be")]
    plan = replace(planned.plan, notes=[*notes[:2], why, *notes[2:]])
    return decided, planned._replace(plan=plan)


def _refuse_to_overwrite(run_dir: Path) -> None:
    """A new run has a folder of its own; an arm of a sweep starts anew where it left nothing to go on from.

    Raises:
        ConfigError: the folder has the results of another run.
    """
    kept = [*(run_dir / resuming.CHECKPOINTS).glob("*.ckpt")] if not configuration.is_multirun() else []
    if kept or (run_dir / "summary.json").exists():
        message = f"{run_dir} holds a run already: give another folder, or go on with it by resume={run_dir}"
        raise ConfigError([Problem("hydra.run.dir", message)])


def _remove_if_empty(folder: Path) -> None:
    """Hydra makes the run's folder before we can refuse the run."""
    with contextlib.suppress(OSError):
        folder.rmdir()
        folder.parent.rmdir()


# --------------------------------------------------------------------------------------------------------------------
# Fit


def _fit(config: dict[str, Any], planned: Planned, run_dir: Path, checkpoint: Path | None) -> dict[str, Any]:
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
    if isinstance(manifest, Manifest):
        datamodule.manifest = manifest
    model = LanguageModel(
        {group: config[group] for group in GROUPS} | {"compile": config["compile"] | {"scope": plan.compile}},
        seed=config["seed"],
        vocab_size=manifest.vocab_size,
        eos_id=manifest.eos_id,
        total_steps=plan.steps,
        token_bytes=None if isinstance(manifest, Task) else tokenizer.token_bytes().tolist(),
        measure_accuracy=isinstance(manifest, Task),
        sources=["task"] if isinstance(manifest, Task) else list(manifest.splits["val"]),
        precision=planned.machine.precision,
    )
    peak = hardware.peak_flops(planned.machine.accelerator, planned.machine.precision)
    log_metrics = LogMetrics(
        plan.tokens_per_step,
        plan.flops_per_token,
        peak * plan.devices if peak else None,
        plan.sequences_per_step,
        datamodule.ledger(plan.steps),
    )
    last = run_dir / resuming.CHECKPOINTS / "last.ckpt"
    stop = StopOnSignal(last)
    trainer = make_trainer(
        config, planned, run_dir, log_metrics, [ExactResume(config["seed"]), BeginRecord(run_dir), stop]
    )
    attention_kernel: str | None = None
    if trainer.is_global_zero:  # others would ask rank 0's GPU
        attention_kernel = _attention_kernel(model, planned)
        display.say(f"Attention kernel: {attention_kernel}")
    with _quiet_lightning():
        _fit_or_stop(trainer, model, datamodule, log_metrics, stop, checkpoint)

    peak_memory = hardware.peak_memory(planned.machine.accelerator)
    _back_to_its_device(model, trainer)
    with (
        hardware.autocast(planned.machine.accelerator, planned.machine.precision),
        torch.compiler.set_stance("force_eager"),  # each length would be compiled by itself, until Dynamo gives up
    ):
        if isinstance(manifest, Task):
            text = sample_answers(model.decoder, manifest, model.device)
        else:
            text = factory(config["generation"])(model.decoder, tokenizer, model.device)
        decode_speed = decode_tokens_per_second(model.decoder, model.device) if trainer.is_global_zero else None
    results, steps = {name: value.item() for name, value in trainer.callback_metrics.items()}, trainer.global_step
    seconds = log_metrics.training_seconds
    summary = {
        "val_loss": results["val/loss"],
        "perplexity": results["val/perplexity"],
        **{name: results[f"val/{name}"] for name in ("bits_per_byte", "accuracy") if f"val/{name}" in results},
        "unigram_entropy": _unigram_entropy(manifest),
        "ledger": {
            source: {**share._asdict(), "val_loss": results.get(f"val/loss/{source}", results["val/loss"])}
            for source, share in log_metrics.ledger(steps * plan.sequences_per_step).items()
        },
        "tokens": steps * plan.tokens_per_step,
        "steps": steps,
        **({"stopped_early": True} if steps < plan.steps else {}),
        "parameters": plan.parameters["total"],
        "flops": steps * plan.tokens_per_step * plan.flops_per_token,
        "tokens_per_second": log_metrics.tokens_timed / seconds if seconds else None,
        "seconds": seconds,
        "peak_memory_bytes": peak_memory,
        "decode_tokens_per_second": decode_speed,
        "validation_data": _validation_data(manifest, datamodule.max_validation_tokens),
        "validation_text": _validation_text(manifest, datamodule.max_validation_tokens),
        "precision": planned.machine.precision,
        "attention_kernel": attention_kernel,
        "device": hardware.device_name(planned.machine.accelerator),
    }
    if trainer.is_global_zero:
        record.write_text(run_dir / "sample.txt", text)
        for board in record.tensorboards(trainer):
            board.add_text("sample", f"```\n{text}\n```", steps)
        for logger in trainer.loggers:
            logger.finalize("success")
        record.write_json(run_dir / "summary.json", summary)
        display.show_summary(summary, text, run_dir)
    return summary


def _fit_or_stop(  # noqa: PLR0917
    trainer: Trainer,
    model: LanguageModel,
    datamodule: TokenDataModule,
    log_metrics: LogMetrics,
    stop: StopOnSignal,
    checkpoint: Path | None,
) -> None:
    """Train to the last step, or until a callback has enough, validate and save.

    A run that ends otherwise says where, and how to go on.
    """
    steps, run_dir, has_ended = trainer.max_steps, Path(trainer.default_root_dir), False
    try:
        trainer.fit(model, datamodule=datamodule, ckpt_path=checkpoint)
        has_ended = trainer.global_step >= steps or (trainer.should_stop and stop.received is None)
        if has_ended and log_metrics.validated_at != trainer.global_step:
            trainer.validate(model, datamodule=datamodule, verbose=False)
        if has_ended and trainer.checkpoint_callbacks:
            trainer.save_checkpoint(stop.checkpoint)
        try:
            trainer.strategy.checkpoint_io.teardown()  # waits for those in the background
        finally:
            trainer.strategy.barrier()  # a rank that ended before would have launchers end the one that writes
    except (ValueError, CheckpointError, *REFUSALS) as error:
        if isinstance(error, (ValueError, *REFUSALS)) and not log_metrics.started:
            # damaged shards, a refused combination: found before the first step
            raise ConfigError([Problem("", one_line(error))]) from error
        if not isinstance(error, ShardError | CheckpointError):
            raise
        # each rank reads for itself: whoever cannot go on says so
        display.complain(f"{one_line(error)}; {_stopped(trainer, steps, run_dir)}")
        raise SystemExit(1) from None
    if has_ended and trainer.global_step < steps and trainer.is_global_zero:
        display.say(f"ended early, at step {trainer.global_step:,} of {steps:,}: a callback stopped the run")
    if not has_ended:
        if trainer.is_global_zero:
            display.say(_stopped(trainer, steps, run_dir))
        raise SystemExit(128 + stop.received if stop.received else 1)


def _back_to_its_device(model: LanguageModel, trainer: Trainer) -> None:
    """Lightning leaves a whole model on the host when it is done with it; what follows is to run where training did."""
    if isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
        model.to(trainer.strategy.root_device)


def _attention_kernel(model: LanguageModel, planned: Planned) -> str:
    """Which implementation of attention will run on this machine's device."""
    device, dtype = torch.device(planned.machine.accelerator), hardware.COMPUTE_DTYPE[planned.machine.precision]
    try:
        with torch.device("meta"):
            decoder = build_decoder(model.hparams["config"], model.hparams["vocab_size"], model.hparams["eos_id"])
        with_slopes = decoder.position.slopes(torch.device("cpu")) is not None
        return decoder.attention.kernel_on(device, dtype, with_slopes)
    except Exception as error:  # a user's own attention, which may be laid out otherwise
        return f"unknown ({type(error).__name__})"


def _stopped(trainer: Trainer, steps: int, run_dir: Path) -> str:
    """Say where a run ended before its time, and how to go on with it."""
    kept = list((run_dir / resuming.CHECKPOINTS).glob("*.ckpt"))
    if any(path.is_file() for path in kept):
        go_on = f"go on with: python train.py resume={run_dir}"
    elif kept:
        go_on = f"its checkpoints are {resuming.OF_DEEPSPEED}"
    else:
        go_on = "no checkpoint was kept"
    return f"stopped at step {trainer.global_step:,} of {steps:,}; {go_on}"


def _unigram_entropy(manifest: Manifest | Task) -> float:
    """Nats a token if tokens were drawn by their frequency in the training split; as val_loss, the sources' mean."""
    if isinstance(manifest, Task):
        return manifest.unigram_entropy
    shards = manifest.splits["train"].values()
    return sum(shard.unigram_entropy for shard in shards) / len(shards)


def _validation_data(manifest: Manifest | Task, max_tokens: int) -> str:
    """A hash of the tokens that the run validates on: losses of runs with another one do not compare."""
    if isinstance(manifest, Task):
        return _hash([manifest.summary(), max_tokens])
    chunks = {name: [chunk.sha256 for chunk in shard.chunks] for name, shard in manifest.splits["val"].items()}
    return _hash([chunks, max_tokens])


def _validation_text(manifest: Manifest | Task, max_tokens: int) -> str:
    """A hash of the text behind those tokens: equal for runs whose bits per byte compare, whatever their tokenizers."""
    if isinstance(manifest, Task):
        return _hash([manifest.summary(), max_tokens])
    return _hash([manifest.sources, manifest.split_rule, manifest.validation_fraction, max_tokens])


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _callbacks(config: dict[str, Any]) -> dict[str, Callback]:
    """Those of the group `callbacks`.

    Raises:
        ConfigError: some refuse their settings, or are no callbacks.
    """
    return build_all(config["callbacks"], "callbacks", Callback, REFUSALS)


def make_trainer(
    config: dict[str, Any],
    planned: Planned,
    run_dir: Path,
    log_metrics: LogMetrics,
    callbacks: Sequence[Callback] = (),
) -> Trainer:
    """Lightning's Trainer with everything that follows from the plan."""
    plan = planned.plan
    loggers = build_all(config["logger"], "logger", Logger, REFUSALS, save_dir=str(run_dir))  # type: ignore[type-abstract]
    schedule = factory(config["scheduler"])
    all_callbacks = [
        log_metrics,
        SchedulePicture(schedule, config["optimizer"]["lr"], plan.tokens_per_step),
        *_callbacks(config).values(),
        *callbacks,
        *([ProfileSteps(run_dir / "profile")] if config.get("profile") else []),  # older records do not have it
    ]
    precision = hardware.precision_plugin(planned.machine.precision, planned.machine.accelerator)
    # older records do not have it
    checkpoint_io = BackgroundCheckpointIO() if config.get("background_checkpoints") else AtomicCheckpointIO()
    plugins = [*precision.pop("plugins", []), checkpoint_io]
    if not launch.is_rank():  # else Lightning looks for one: in a shell within a SLURM job it would wait for tasks
        plugins.append(LightningEnvironment())
    with _quiet_lightning():
        trainer: Trainer = build(
            {"num_sanity_val_steps": 0, "enable_model_summary": False} | config["trainer"],
            **precision,
            plugins=plugins,
            strategy=planned.machine.parallelism.strategy(),
            callbacks=all_callbacks,
            logger=list(loggers.values()) or False,
            default_root_dir=str(run_dir),
            max_steps=plan.steps,
            max_epochs=-1,
            accumulate_grad_batches=plan.accumulation,
            val_check_interval=plan.validation_every * plan.accumulation,
            check_val_every_n_epoch=None,
            use_distributed_sampler=False,
            # without these, Lightning adds a bar and a checkpoint of its own
            enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in all_callbacks),
            enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in all_callbacks),
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
        warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")  # a resumed run's
        warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`")  # other settings, see ExactResume
        warnings.filterwarnings("ignore", "Since DeepSpeed handles gradient clipping internally")
        warnings.filterwarnings("ignore", ".*sync_dist=True.*")  # torchmetrics has summed over the ranks
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
