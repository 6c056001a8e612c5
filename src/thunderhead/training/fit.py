"""Train what was planned; then the summary, and after it what may fail without loss: a text, the speed of decoding."""

import math
import os
import re
import traceback
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn

from thunderhead import disk
from thunderhead.core.components import placed
from thunderhead.core.config import ConfigError, Problem
from thunderhead.core.data.datamodule import asked
from thunderhead.core.data.manifest import ShardError
from thunderhead.core.environment import hidden
from thunderhead.core.module import LanguageModel
from thunderhead.core.run import REFUSALS, Run, seed_generators, validation_metrics
from thunderhead.parallel.launch import is_launched
from thunderhead.processes import WHEN_KILLED
from thunderhead.training import display, hardware, record
from thunderhead.training import resume as resuming
from thunderhead.training.callbacks.divergence import DivergenceError, WatchDivergence
from thunderhead.training.callbacks.documents import DocumentLosses
from thunderhead.training.callbacks.metrics import LogMetrics
from thunderhead.training.callbacks.profile import ProfileSteps
from thunderhead.training.callbacks.state import CheckpointError, ExactResume
from thunderhead.training.callbacks.stop import FAILED, StopOnSignal, StoppedError
from thunderhead.training.decoding_speed import decode_tokens_per_second
from thunderhead.training.loggers import finish, log_text
from thunderhead.training.next_commands import from_here, go_on, next_commands
from thunderhead.training.plan import Plan
from thunderhead.training.trainer import CheckBatches, make_trainer, quiet_lightning, reason

ADDED = (
    *("attention_kernel", "loss_spikes", "rollbacks", "skipped_steps", "skipped", "stopped_early", "diverged"),
    "decode_tokens_per_second",
)
"""What stands in some summaries only, or is added later; metrics of these names stand below `metrics` alone."""
LOST = "another process of this run has ended"


def fit(run: Run, plan: Plan, checkpoint: Path | None) -> dict[str, Any]:
    """Train a run whose data is prepared, from a checkpoint on if there is one; returns what summary.json says.

    Raises ConfigError if something was refused before the first step, and SystemExit if the run was stopped, diverged
    or could not go on; it has said so.
    """

    def then() -> str:
        results = run.folder / "summary.json"
        return f"; the results are in {results}" if results.exists() else f"; {go_on(run.folder)}"

    with disk.told(then):
        return _fit(run, plan, checkpoint)


def _fit(run: Run, plan: Plan, checkpoint: Path | None) -> dict[str, Any]:
    if run.config["keep_freed_memory"]:
        hardware.keep_freed_memory()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are forked after the tokenizer was used
    try:
        model, trainer, log_metrics, stop, watch = assemble(run, plan, is_new=checkpoint is None)
    except (ValueError, *REFUSALS) as error:
        raise ConfigError([Problem("", placed("trainer", reason(error)))]) from error
    attention_kernel: str | None = None
    if trainer.is_global_zero:  # others would ask rank 0's GPU
        attention_kernel = _attention_kernel(run, plan)
        display.say(f"Attention kernel: {attention_kernel}")
    seed_generators(run.seed)  # for what others' data make when it is set up
    with quiet_lightning():
        diverged = _fit_or_stop(model, trainer, log_metrics, stop, checkpoint)
        while diverged is not None and run.config["on_divergence"] == "rollback":
            back = resuming.roll_back(run.folder, run.data, diverged.step, watch.rollbacks, trainer.is_global_zero)
            trainer.strategy.barrier()
            if back is None:
                break
            if trainer.is_global_zero:
                display.complain(f"{diverged}; going back to the last checkpoint, and on without the data since")
            model, trainer, log_metrics, stop, watch = assemble(run, plan)
            try:
                diverged = _fit_or_stop(model, trainer, log_metrics, stop, back)
            finally:
                if trainer.is_global_zero:
                    back.unlink()

    summary = _summary(run, plan, trainer, log_metrics) | {"attention_kernel": attention_kernel} | _spikes(run.folder)
    if watch.rollbacks:
        summary["rollbacks"] = watch.rollbacks
    if watch.skipped:
        summary |= {"skipped_steps": len(watch.skipped), "skipped": watch.skipped}
    if diverged is not None:
        what = {"step": diverged.step, "what": diverged.what}
        summary |= {"val_loss": math.nan, "perplexity": math.nan, "diverged": what}
    if trainer.is_global_zero:
        record.write_json(run.folder / "summary.json", summary)
        display.show_summary(summary)
    if diverged is not None:
        if trainer.is_global_zero:
            lower = f"optimizer.lr={run.config['optimizer']['lr'] / 2:g}"
            display.complain(f"{diverged}; {go_on(run.folder, lower)}")
        raise SystemExit(1)
    if run.config["sample"]:
        _ornaments(run, plan, trainer, model, summary)
    if trainer.is_global_zero:
        finish(trainer.loggers, "success")
        display.show_where(from_here(run.folder), next_commands(run))
    return summary


def assemble(
    run: Run, plan: Plan, *, is_new: bool = False
) -> tuple[LanguageModel, Trainer, LogMetrics, StopOnSignal, WatchDivergence]:
    """Put the components of a run together as its plan has it; one that goes on does not read `init_from` again."""
    data, precision = run.data, run.precision.of_kind(plan.precision)
    data.micro_batch_size = plan.micro_batch_size
    model = LanguageModel(
        run.model,
        seed=run.seed,
        vocab_size=data.vocab_size,
        eos_id=asked(data, "eos_id"),
        total_steps=plan.steps,
        metrics=validation_metrics(data, run.metrics),
        sources=asked(data, "validation_sources")(),
        precision=precision,
        compile_decoder=run.compile.of_scope(plan.compile).apply,
        on_resume=resuming.take_new_settings,
        initial_weights=run.init_from.weights if is_new and run.init_from is not None else None,
    )
    peak = hardware.peak_flops(run.accelerator, precision.compute_dtype)
    log_metrics = LogMetrics(run, plan, peak * plan.devices if peak else None)
    stop = StopOnSignal(run.folder / resuming.CHECKPOINTS / "last.ckpt", lambda: log_metrics.failed is not None)
    watch = WatchDivergence(run.config["on_divergence"])
    callbacks = [CheckBatches(plan), log_metrics, DocumentLosses(), watch]
    callbacks += [*run.callbacks.values(), ExactResume(run.seed), stop]
    if run.config["profile"]:
        callbacks.append(ProfileSteps(run.folder / "profile"))
    return model, make_trainer(run, plan, callbacks), log_metrics, stop, watch


def _fit_or_stop(
    model: LanguageModel, trainer: Trainer, log_metrics: LogMetrics, stop: StopOnSignal, start: Path | None
) -> DivergenceError | None:
    """Train to the last step, or until a callback has enough, validate and save; or until the run diverges.

    A run that ends otherwise says where, and how to go on.
    """
    run, steps, has_ended = log_metrics.run, trainer.max_steps, False
    diverged: DivergenceError | None = None
    try:
        try:
            trainer.fit(model, datamodule=run.data, ckpt_path=start)
            if trainer.num_training_batches == 0:
                raise ConfigError([Problem("data", "train_dataloader gives no batch: there is nothing to train on")])
            has_ended = trainer.global_step >= steps or (trainer.should_stop and stop.received is None)
            if has_ended and log_metrics.validated_at != trainer.global_step:
                trainer.validate(model, datamodule=run.data, verbose=False)
                _keep_if_best(trainer, model)
            if has_ended and trainer.checkpoint_callbacks:
                trainer.save_checkpoint(stop.checkpoint)
        except DivergenceError as error:
            diverged = error
        except StoppedError:
            has_ended = False
        finally:
            log_metrics.write(trainer)
        try:
            trainer.strategy.checkpoint_io.teardown()  # waits for those in the background
        finally:
            trainer.strategy.barrier()  # a rank that ended before would have launchers end the one that writes
    except (ValueError, TypeError, RuntimeError, OSError, EOFError, *REFUSALS) as error:
        if isinstance(error, (ValueError, *REFUSALS)) and not log_metrics.started:
            # damaged shards, a refused combination: found before the first step
            raise ConfigError([Problem("", reason(error))]) from error
        if (why := _from_outside(error)) is None:
            raise
        # each rank reads for itself: whoever cannot go on says so
        if why != LOST or (trainer.is_global_zero and not is_launched()):  # else who launched it tells which was lost
            display.complain(f"{why}; {_stopped(trainer, run.folder)}")
        raise SystemExit(1) from None
    finally:
        stop.close()
        if trainer.is_global_zero and (diverged is not None or not has_ended):  # others are logged to once more
            finish(trainer.loggers, "failed")
    if log_metrics.failed is not None:
        display.complain(f"{disk.problem(log_metrics.failed)}; {_stopped(trainer, run.folder)}")
    if diverged is None and not has_ended:
        if trainer.is_global_zero and log_metrics.failed is None:
            display.say(_stopped(trainer, run.folder))
        raise SystemExit(128 + stop.received if stop.received not in (None, FAILED) else 1)
    if diverged is None and trainer.global_step < steps and trainer.is_global_zero:
        display.say(f"ended early, at step {trainer.global_step:,} of {steps:,}: a callback stopped the run")
    return diverged


def _keep_if_best(trainer: Trainer, model: LanguageModel) -> None:
    """Have callbacks look at the last validation: outside of fit, ModelCheckpoint does not save."""
    trainer.state.fn, before = TrainerFn.FITTING, trainer.state.fn
    for callback in trainer.checkpoint_callbacks:
        callback.on_validation_end(trainer, model)
    trainer.state.fn = before


def _from_outside(error: Exception) -> str | None:
    """What ended a run that was not its own fault, in one line: data, the disk, other processes; or None."""
    line = reason(error)
    sharer = [frame for frame in traceback.extract_tb(error.__traceback__) if "resource_sharer" in frame.filename]
    if sharer and isinstance(error, EOFError | OSError):  # it was killed while it handed a batch over
        line = "DataLoader worker (pid unknown) has ended"
    if "DataLoader worker (pid" in line:  # torch raises it wherever the run happens to be
        return f"{line.rstrip('. ')}: {WHEN_KILLED}; data.num_workers=0 needs the least"
    if isinstance(error, ShardError | CheckpointError | MisconfigurationException):
        return line
    if isinstance(error, torch.distributed.DistError) or re.search("/gloo/|Gloo|monitoredBarrier", line):
        return LOST
    if isinstance(error, RuntimeError | TypeError) and re.search("conditioned on metric|invalid dataloader was", line):
        return line  # of EarlyStopping, and of what a data module gives
    return disk.problem(error) if isinstance(error, OSError) else None


def _stopped(trainer: Trainer, run_dir: Path) -> str:
    """Say where a run ended before its time, and how to go on with it."""
    return f"stopped at step {trainer.global_step:,} of {trainer.max_steps:,}; {go_on(run_dir)}"


def _spikes(folder: Path) -> dict[str, list[int]]:
    """For the summary, which has results without them, if somebody has edited metrics.csv meanwhile."""
    try:
        spikes = record.loss_spikes(folder)
    except ConfigError as error:
        display.complain(str(error))
        return {}
    return {"loss_spikes": spikes} if spikes else {}


def _summary(run: Run, plan: Plan, trainer: Trainer, log_metrics: LogMetrics) -> dict[str, Any]:
    """The results, as in summary.json."""
    data, steps, seconds = run.data, trainer.global_step, log_metrics.training_seconds
    logged = trainer.callback_metrics.items()
    results = {name.removeprefix("val/"): float(value) for name, value in logged if name.startswith("val/")}
    metrics = {name: value for name, value in results.items() if "/" not in name and name not in ("loss", "perplexity")}
    ledger = {
        source: {**share._asdict(), "val_loss": results.get(f"loss/{source}", results.get("loss", math.nan))}
        for source, share in log_metrics.ledger(steps * plan.sequences_per_step).items()
    }
    summary = {
        "val_loss": results.get("loss", math.nan),
        "perplexity": results.get("perplexity", math.nan),
        "metrics": metrics,
        "loss_terms": log_metrics.last_terms,
        "unigram_entropy": asked(data, "unigram_entropy"),
        "ledger": ledger,
        "tokens": steps * plan.tokens_per_step,
        "steps": steps,
        **({"stopped_early": True} if steps < plan.steps else {}),
        **({"skipped_steps": steps - log_metrics.steps_taken} if steps > log_metrics.steps_taken else {}),
        "parameters": plan.parameters["total"],
        "flops": steps * plan.tokens_per_step * plan.flops_per_token,
        "tokens_per_second": log_metrics.tokens_timed / seconds if seconds and log_metrics.tokens_timed else None,
        "seconds": seconds,
        "compile_seconds": log_metrics.compile_seconds,
        "checkpoint_seconds": log_metrics.checkpoint_seconds,
        "peak_memory_bytes": hardware.peak_memory(run.accelerator),
        "cache_bytes_per_token": _cache_bytes(run),
        "validation_data": asked(data, "validation_data")(),
        "validation_text": asked(data, "validation_text")(),
        "precision": plan.precision,
        "device": hardware.device_name(run.accelerator),
    }
    return {name: value for name, value in metrics.items() if name not in ADDED} | summary


def _cache_bytes(run: Run) -> float | None:
    try:
        return run.decoder_meta.cache_bytes_per_token(torch.bfloat16)
    except Exception as error:  # a mixer of the user's own, whose cache cannot be asked
        display.complain(f"no bytes of the cache: {reason(error)}")
        return None


def _ornaments(run: Run, plan: Plan, trainer: Trainer, model: LanguageModel, summary: dict[str, Any]) -> None:
    """A sample of text and the speed of decoding: whatever they raise, the run's results are written already."""
    data = run.data
    if isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):  # Lightning has moved the model to the host
        model.to(trainer.strategy.root_device)
    try:
        with (
            run.precision.of_kind(plan.precision).autocast(run.accelerator),
            torch.compiler.set_stance("force_eager"),  # each length would be compiled by itself, until Dynamo gives up
        ):
            text = asked(data, "sample")(model.decoder, model.device)
            tokenizer = getattr(data, "tokenizer", None)
            if text is None and tokenizer is not None:
                text = run.generation(model.decoder, tokenizer, model.device)
            speed = decode_tokens_per_second(model.decoder, model.device) if trainer.is_global_zero else None
    except Exception as error:
        display.complain(f"no sample of text: {reason(error)}")
        return
    if not trainer.is_global_zero:
        return
    record.write_json(run.folder / "summary.json", summary | {"decode_tokens_per_second": speed})
    if text is not None:
        text = hidden(text)
        disk.write_text(run.folder / "sample.txt", text)
        log_text(trainer.loggers, "sample", text, trainer.global_step)
        display.show_sample(text)


def _attention_kernel(run: Run, plan: Plan) -> str:
    """Which implementation of attention will run on this machine's device."""
    try:
        dtype = run.precision.of_kind(plan.precision).compute_dtype
        return run.decoder_meta.attention_kernel(torch.device(run.accelerator), dtype)
    except Exception as error:  # a user's own attention, which may be laid out otherwise
        return f"unknown ({type(error).__name__})"
