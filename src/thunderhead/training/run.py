"""The way of one run: check → build → plan → record → prepare → fit → summary."""

import contextlib
import difflib
import typing
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from thunderhead import choices, command_line, disk
from thunderhead.core import components
from thunderhead.core import config as configuration
from thunderhead.core.components import build
from thunderhead.core.config import Config, ConfigError, Problem, read_mapping
from thunderhead.core.data.datamodule import asked
from thunderhead.core.environment import hidden, recorded, texts
from thunderhead.core.run import REFUSALS, Problems, Run, build_run
from thunderhead.core.trust import trust_typed
from thunderhead.core.types import FolderName, NonNegativeInt, PathText
from thunderhead.parallel import launch
from thunderhead.processes import global_rank, is_rank
from thunderhead.training import display, hardware, record, run_folder
from thunderhead.training import resume as resuming
from thunderhead.training.batch import AUTO
from thunderhead.training.callbacks import divergence
from thunderhead.training.fit import fit
from thunderhead.training.next_commands import go_on
from thunderhead.training.own_code import own_sources
from thunderhead.training.plan import Plan, plan_run
from thunderhead.training.trainer import DERIVED, decided_elsewhere, reason, try_settings

NOT_AGREED = (
    "auto cannot be agreed on by processes that torchrun or SLURM started: write the number that one process finds, or"
    " let train.py start them (trainer.devices)"
)
OPTIONAL = ("match", "tune", "debug", "tokenizer", "metrics", "init_from")
"""Groups that a run can do without; prepared shards bring their tokenizer."""
WITHOUT_TARGET = ("curation", "callbacks", "logger", "metrics", "debug")


def settings(
    *,
    name: FolderName,
    seed: NonNegativeInt,
    dry_run: bool,
    keep_freed_memory: bool,
    sample: bool,
    profile: bool,
    background_checkpoints: bool,
    on_divergence: divergence.Action,
    trust: Sequence[str] = (),
    resume: PathText | None = None,
) -> None:
    """The top-level settings, for the check; conf/train.yaml says what each does."""


def train(config: DictConfig, run_dir: Path | None = None) -> float | None:
    """Train what a composed configuration describes, with its record in `run_dir` (None: Hydra's folder).

    Returns the final validation loss (nats a token), for sweepers; None after a dry run.
    Raises ConfigError if the configuration is refused; nothing was written.
    """
    run_dir = run_dir or command_line.output_dir()
    try:
        resolved, checkpoint = _resolve(config, run_dir)
        folder = run_dir if checkpoint is None or launch.is_launched() else checkpoint.parents[1]
        is_auto, before = resolved.get("batch", {}).get("micro_size") == AUTO, None
        if is_auto and checkpoint is not None:  # what it stood for before; the plan takes it if it can
            before = int(read_mapping(folder / "plan.json", "resume", record.Planned)["micro_batch_size"])
        run, plan = plan_config(resolved, folder, before)
        if is_auto and is_rank() and plan.micro_batch_size != before:
            raise ConfigError([Problem("batch.micro_size", NOT_AGREED)])
    except BaseException:
        command_line.remove_if_empty(run_dir)
        raise
    is_first = global_rank() == 0
    if launch.is_launched():
        with run_folder.shared(folder) if is_first else contextlib.nullcontext():  # who launched it may be killed
            return float(fit(run, plan, checkpoint)["val_loss"])
    if is_first:
        display.show_plan(plan)
    if run.is_dry or checkpoint is not None or not is_first:  # the record of several ranks is rank 0's
        command_line.remove_if_empty(run_dir)
    if run.is_dry:
        return None

    if checkpoint is None and is_first:
        _refuse_to_overwrite(folder)
    with disk.refusing(), run_folder.held(folder) if is_first else contextlib.nullcontext():
        plan = prepare(run, plan)
        changes = [] if checkpoint is None else resuming.check(checkpoint, run, plan)
        if is_first:
            if changes:
                display.say(f"Changed since the checkpoint: {', '.join(changes)}")
            record.stage(folder, _record_of(run, plan) | _changes_of(folder, plan, changes))
            if checkpoint is None:  # what a run was resumed with is recorded once it is accepted, by LogMetrics
                record.take_over(folder)
        if run.n_processes > 1 and not is_rank():
            job = configuration.set_value(resolved, "batch.micro_size", plan.micro_batch_size)
            try:
                summary = launch.launch(job, folder, run.n_processes)
            except launch.KilledError as error:
                display.complain(f"{error}; {go_on(folder)}")
                raise SystemExit(1) from None
        else:
            summary = fit(run, plan, checkpoint)
    return float(summary["val_loss"])


def plan_config(
    config: Config, folder: Path, micro_batch_size: int | None = None, *, count_memory: bool = True
) -> tuple[Run, Plan]:
    """Check a resolved configuration, build its components and plan the run (`plan_run`); nothing is written.

    Raises ConfigError: names all problems that can be seen without the data.
    """
    check_config(config)
    found, machine = Problems(), {"accelerator": "cpu", "is_here": True, "n_processes": 1, "world_size": 1}
    with found.collect():
        machine = hardware.machine_of(config["trainer"], must_be_here=not config["dry_run"])
    with found.collect():
        run = build_run(config, folder, **machine)
        found.note(*decided_elsewhere(run), *divergence.problems(run))
        with found.collect("trainer"):
            try_settings(run)
        plan = plan_run(run, micro_batch_size, count_memory=count_memory)
    if found:
        raise ConfigError(found)
    return run, plan


def check_config(config: Config) -> None:
    """Refuse what is wrong with a single run's configuration, by a ConfigError before anything of it is built."""
    if problems := find_problems(config):
        raise ConfigError(problems)


def find_problems(config: Config) -> list[Problem]:
    """What is wrong with a single run's configuration, before anything of it is built."""
    problems = components.check(config, settings)
    for group in choices.defaults():
        if group not in config and group not in OPTIONAL:
            known = ", ".join(configuration.options(group))
            problems.append(Problem(group, f"was taken out, and a run needs an option of it: {known}"))
        elif group not in WITHOUT_TARGET and config.get(group) is not None and "_target_" not in config[group]:
            problems.append(Problem(f"{group}._target_", f"was taken out, and says what {group} is"))
    groups = {*choices.defaults(), *OPTIONAL}
    for name in (name for name, value in config.items() if isinstance(value, dict) and name not in groups):
        if near := difflib.get_close_matches(name, groups, n=1, cutoff=0.8):  # others may be referred to by ${name…}
            problems.append(Problem(name, f"is no group; did you mean {near[0]}?"))
    for group in ("callbacks", "logger", "metrics"):
        for name, node in config.get(group, {}).items():
            if not (isinstance(node, dict) and "_target_" in node):
                problems.append(Problem(f"{group}.{name}", f"has no _target_: take it out with ~{group}.{name}"))
    if "lr" not in config.get("optimizer", {"lr": None}):
        problems.append(Problem("optimizer.lr", "is required: it is what the schedule multiplies"))
    trainer = config.get("trainer", {})
    for argument, group in DERIVED.items():
        if argument in trainer:
            problems.append(Problem(f"trainer.{argument}", f"follows from other settings: set {group} instead"))
    every = trainer.get("log_every_n_steps")
    if isinstance(every, int) and every < 1:
        message = f"{every} is not accepted: should be greater than 0; a large number logs the first and last step only"
        problems.append(Problem("trainer.log_every_n_steps", message))
    sound = not problems
    for group in ("match", "tune"):  # a single run has no arms that they could act on
        if sound and group in config and hasattr(component := build(config[group]), "problems"):
            problems += component.problems(None)
    return problems


def _resolve(config: DictConfig, run_dir: Path) -> tuple[Config, Path | None]:
    """The configuration as plain containers; where a run is resumed, its recorded one, and the checkpoint."""
    resume = config.get("resume")
    trust_typed(typing.cast(Config, OmegaConf.to_container(config, resolve=False)))
    if resume is None or launch.is_launched():  # whoever launched has found the checkpoint
        return configuration.plain(config) | {"resume": resume}, None if resume is None else Path(resume)
    if isinstance(resume, bool):
        message = f"{str(resume).lower()} is no run: resume=auto goes on with the last unfinished one of this name"
        raise ConfigError([Problem("resume", message)])
    if not resume:
        raise ConfigError([Problem("resume", "is empty: give a run's folder, one of its checkpoints, or auto")])
    if resume == "auto" and command_line.is_multirun():
        message = "auto looks for the last run of a name, and a sweep has many: give the folder of one run"
        raise ConfigError([Problem("resume", message)])
    checkpoint, remarks = resuming.find(str(resume), run_dir)
    if checkpoint is not None and (remarks or resume == "auto"):
        remarks = [*remarks, f"Going on from {checkpoint}"]
    for remark in remarks if global_rank() == 0 else ():
        display.say(remark)
    if checkpoint is None:
        return configuration.plain(config) | {"resume": None}, None
    return resuming.resumed_config(checkpoint, config) | {"resume": str(checkpoint)}, checkpoint


def prepare(run: Run, plan: Plan) -> Plan:
    """Prepare the data if need be, and plan with what it really holds."""
    if asked(run.data, "is_prepared"):
        return plan
    try:
        run.data.prepare_data()
        before, plan = plan, plan_run(run, plan.micro_batch_size if run.batch.micro_size == AUTO else None)
    except (ValueError, ConnectionError, *REFUSALS) as error:
        raise ConfigError([Problem("", reason(error))]) from error
    if global_rank() == 0 and (plan.steps, plan.vocab_size) != (before.steps, before.vocab_size):
        size = f"{plan.vocab_size:,} tokens of vocabulary, {plan.parameters['total']:,} parameters"
        display.say(f"  as prepared, it has {size}, and the run {plan.steps:,} steps (planned: {before.steps:,})")
    if global_rank() == 0 and plan.epochs:
        epochs = (f"{epochs:.2f} epochs of {source}" for source, epochs in plan.epochs.items())
        display.say(f"  this run sees {', '.join(epochs)}")
    for note in plan.notes if global_rank() == 0 else ():
        if note not in before.notes:  # of what was not known before
            display.say(f"  {note}")
    return plan


def _record_of(run: Run, plan: Plan) -> dict[str, str]:
    """The files of a run's record that are known before the first step."""
    overrides = list(dict.fromkeys(resuming.recorded_overrides(run.folder) + command_line.invocation_overrides()))
    to_json, data = getattr(getattr(run.data, "tokenizer", None), "to_json", None), asked(run.data, "summary")()
    read = ("key", "tokenizer")  # by programs; the rest is for people
    return {
        **({"tokenizer.json": to_json()} if to_json is not None else {}),
        "data.json": record.to_json(texts(data, hidden) | {name: data[name] for name in read if name in data}),
        "config.yaml": configuration.to_yaml(recorded(_as_typed(run.config, run.folder))),
        "plan.json": record.to_json(plan.to_dict()),
        "environment.json": record.to_json(record.surroundings() | {"overrides": overrides}),
        **own_sources(run.config),
    }


def _as_typed(config: Config, folder: Path) -> Config:
    """Without the key of its shards, which a resumed run was given: it began with the same."""
    is_typed = "data.shards_key" in command_line.chosen(command_line.invocation_overrides())
    if config["resume"] is None or is_typed or "shards_key" not in config["data"]:
        return config
    before = read_mapping(folder / "config.yaml")["data"].get("shards_key")
    return configuration.set_value(config, "data.shards_key", before)


def _changes_of(folder: Path, plan: Plan, changes: Sequence[str]) -> dict[str, str]:
    """The file of the record that says what a run was resumed with, if that changes what it learns."""
    if not (folder / "plan.json").exists():
        return {}
    before = read_mapping(folder / "plan.json", "resume", record.Steps)["steps"]
    longer = [f"steps={plan.steps} (was {before})"] if before != plan.steps else []
    told = [
        *record.changes(folder, "resume"),
        *(line for line in changes if not line.startswith(resuming.SWITCHABLE)),
        *longer,
    ]
    return {record.CHANGES: record.to_json({"changes": told})} if told else {}


def _refuse_to_overwrite(run_dir: Path) -> None:
    """A new run has a folder of its own; an arm of a sweep starts anew where it left nothing to go on from."""
    kept = [*(run_dir / resuming.CHECKPOINTS).glob("*.ckpt")] if not command_line.is_multirun() else []
    if kept or (run_dir / "summary.json").exists():
        go_on = f"resume={configuration.quoted(run_dir)}"
        message = f"{run_dir} holds a run already: give another folder, or go on with it by {go_on}"
        raise ConfigError([Problem("hydra.run.dir", message)])
