"""Train what was planned, and tell what came of it: the summary, a text, the speed of making text."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from thunderhead.core.config import ConfigError, Problem, build, factory
from thunderhead.core.data.datamodule import TokenDataModule
from thunderhead.core.data.manifest import Manifest, ShardError
from thunderhead.core.module import GROUPS, LanguageModel, build_decoder
from thunderhead.corpus.tokenizer import Tokenizer
from thunderhead.options.synthetic_tasks import Task
from thunderhead.options.task_answers import sample_answers
from thunderhead.training import display, hardware, record
from thunderhead.training import resume as resuming
from thunderhead.training.callbacks.metrics import LogMetrics
from thunderhead.training.callbacks.state import BeginRecord, CheckpointError, ExactResume
from thunderhead.training.callbacks.stop import StopOnSignal
from thunderhead.training.decoding import decode_tokens_per_second
from thunderhead.training.planning import Planned
from thunderhead.training.problems import one_line
from thunderhead.training.trainer import REFUSALS, make_trainer, quiet_lightning


def fit(config: dict[str, Any], planned: Planned, run_dir: Path, checkpoint: Path | None) -> dict[str, Any]:
    """Train, and write what there is to say afterwards.

    Args:
        config: resolved, and planned as it is.
        planned: with the manifest of the prepared data.
        run_dir: the run's folder.
        checkpoint: to go on from.

    Returns:
        The summary, as in summary.json.

    Raises:
        ConfigError: something was refused before the first step.
        SystemExit: the run was stopped or could not go on; it has said so.
    """
    plan, manifest = planned.plan, planned.manifest
    assert manifest is not None
    if config["keep_freed_memory"]:
        hardware.keep_freed_memory()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are forked after the tokenizer was used
    tokenizer = manifest.load_tokenizer()
    datamodule = make_datamodule(config, planned, tokenizer)
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
    with quiet_lightning():
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


def make_datamodule(config: dict[str, Any], planned: Planned, tokenizer: Tokenizer) -> TokenDataModule:
    """The data of a run, with the sizes of its plan; `tokenizer` is the manifest's."""
    datamodule = build(
        config["data"],
        tokenizer=tokenizer,
        context_length=planned.plan.context_length,
        micro_batch_size=planned.plan.micro_batch_size,
        sequences_per_step=planned.plan.sequences_per_step,
        seed=config["seed"],
    )
    assert isinstance(datamodule, TokenDataModule)
    if isinstance(planned.manifest, Manifest):
        datamodule.manifest = planned.manifest
    return datamodule


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
        return decoder.attention_kernel(device, dtype)
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
    made_from: list[Any] = [manifest.sources, manifest.split_rule, manifest.validation_fraction, max_tokens]
    return _hash(made_from if manifest.curation is None else [*made_from, manifest.curation])


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
