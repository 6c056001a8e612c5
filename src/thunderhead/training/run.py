"""The way of one run: check → plan → record → prepare → fit → summary."""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from thunderhead.core import config as configuration
from thunderhead.core.config import ConfigError, Problem
from thunderhead.core.processes import global_rank, is_rank
from thunderhead.core.types import NonNegativeInt
from thunderhead.corpus.command import make_shards
from thunderhead.parallel import launch
from thunderhead.training import display, record
from thunderhead.training import resume as resuming
from thunderhead.training.fit import fit
from thunderhead.training.planning import AUTO, MICRO_NOTE, Planned, plan_run
from thunderhead.training.trainer import DECIDED, DERIVED, callbacks_of

NOT_AGREED = (
    "auto cannot be agreed on by processes that torchrun or SLURM started: write the number that one process finds, or"
    " let train.py start them (trainer.devices)"
)


def settings(
    *,
    name: str,
    seed: NonNegativeInt,
    dry_run: bool,
    keep_freed_memory: bool,
    profile: bool,
    background_checkpoints: bool,
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
    if not launch.is_launched() and global_rank() == 0:
        display.show_plan(planned.plan)
    if resolved["dry_run"]:
        _remove_if_empty(run_dir)
        return None

    if launch.is_launched():
        return float(fit(decided, planned, run_dir, checkpoint)["val_loss"])
    if checkpoint is None and global_rank() == 0:
        _refuse_to_overwrite(run_dir)
    with resuming.held(run_dir) if global_rank() == 0 else contextlib.nullcontext():
        decided, planned = _with_micro_size(decided, _with_data(decided, planned), planned.plan.notes)
        assert planned.manifest is not None
        if checkpoint is not None:
            changes = resuming.check(checkpoint, resolved, planned.plan.steps, planned.manifest)
            if changes and global_rank() == 0:
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
        if global_rank() == 0:
            record.stage(run_dir, files)
            if checkpoint is None:  # what a run was resumed with is recorded once it is accepted, by BeginRecord
                record.take_over(run_dir)
        if planned.machine.n_processes > 1 and not is_rank():
            summary = launch.launch(decided, run_dir, planned.machine.n_processes)
        else:
            summary = fit(decided, planned, run_dir, checkpoint)
    if global_rank() > 0:
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
        resolved = configuration.with_overrides(recorded, overrides, known, switched)
        resolved["resume"] = str(checkpoint)
    problems = find_problems(resolved)
    agreed = checkpoint is not None or not is_rank() or launch.is_launched()
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
    if global_rank() == 0:
        for remark in remarks:
            display.say(remark)
        if found is not None and (remarks or resume == "auto"):
            display.say(f"Going on from {found.checkpoint}")
    return found.checkpoint if found is not None else None


def find_problems(config: dict[str, Any]) -> list[Problem]:
    """What is wrong with a single run's configuration, before it is planned."""
    problems = configuration.check(config, settings)
    for group in configuration.default_groups():
        if group not in config and group not in ("match", "tune", "debug", "tokenizer"):  # shards bring a tokenizer
            known = ", ".join(configuration.options(group))
            problems.append(Problem(group, f"was taken out, and a run needs an option of it: {known}"))
    for group in ("callbacks", "logger"):
        for name, node in config.get(group, {}).items():
            if not (isinstance(node, dict) and "_target_" in node):
                problems.append(Problem(f"{group}.{name}", f"has no _target_: take it out with ~{group}.{name}"))
    if "lr" not in config.get("optimizer", {"lr": None}):
        problems.append(Problem("optimizer.lr", "is required: it is what the schedule multiplies"))
    if not problems:
        try:
            built = callbacks_of(config)
        except ConfigError as error:
            problems += error.problems
        else:
            decided = {name: DECIDED[kind] for name, c in built.items() for kind in DECIDED if isinstance(c, kind)}
            problems += [Problem(f"callbacks.{name}", f"{why}: take it out") for name, why in decided.items()]
    trainer = config.get("trainer", {})
    for argument, group in DERIVED.items():
        if argument in trainer:
            problems.append(Problem(f"trainer.{argument}", f"follows from other settings: set {group} instead"))
    every = trainer.get("log_every_n_steps")
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
    if global_rank() == 0:
        display.say(
            f"Preparing data: {', '.join(data['sources'])} → {data['shards_dir']} (once; the next run finds it)"
        )
    manifest = make_shards(config, data)
    planned = plan_run(config, manifest)
    if global_rank() == 0:
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
    if is_rank() and not launch.is_launched():
        raise ConfigError([Problem("batch.micro_size", NOT_AGREED)])
    return config


def _with_micro_size(config: dict[str, Any], planned: Planned, shown: list[str]) -> tuple[dict[str, Any], Planned]:
    """The configuration and the plan with the number that `batch.micro_size=auto` stands for; `shown` is known already.

    Raises:
        ConfigError: nothing fits.
    """
    if config["batch"]["micro_size"] != AUTO:
        return config, planned
    manifest = planned.manifest
    assert manifest is not None
    (why,) = (note for note in planned.plan.notes if note.startswith(MICRO_NOTE))
    if why not in shown:
        display.say(why)
    decided = _with_number(config, planned.plan.micro_batch_size)
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
