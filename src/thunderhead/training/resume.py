"""Which run to go on with, and from which of its checkpoints."""

import contextlib
import itertools
import math
import os
import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from omegaconf import DictConfig

from thunderhead import command_line, disk
from thunderhead.core.config import (
    Config,
    ConfigError,
    Problem,
    damaged,
    differences,
    first_line,
    plain,
    read_mapping,
    set_value,
    show,
)
from thunderhead.core.data.datamodule import TokenDataModule
from thunderhead.core.environment import of_record, recorded
from thunderhead.core.model_spec import COMPONENTS, GROUPS, ModelSpec
from thunderhead.core.module import LanguageModel
from thunderhead.core.run import Run
from thunderhead.core.trust import refuse_unknown_variables, refuse_untrusted
from thunderhead.training import record
from thunderhead.training.own_code import CODE
from thunderhead.training.plan import Plan

CHECKPOINTS, ABANDONED = "checkpoints", "abandoned"
MOST_ROLLBACKS = 10
SWITCHABLE = ("strategy", "compile", "activation_checkpointing")
"""Groups that say how a run is computed and not what: a resumed run may choose others."""

OTHER_TEXT = "the losses before and after would be of different text"
KEPT = {
    ("batch", "global_tokens"): "tokens are counted in steps of this size",
    ("data", "max_validation_bytes"): OTHER_TEXT,
    ("data", "max_validation_tokens"): OTHER_TEXT,
}
"""Settings outside of the model that a resumed run keeps, by group and name, and why."""
LEARNED = ("precision.", "trainer.gradient_clip_", "trainer.deterministic", "callbacks.")
"""Where settings outside of the model may change what is learned: told if they change."""
SHARDS_DEPEND_ON = ("data.sources", "data.path", "data.validation", "data.validation_fraction", "tokenizer", "curation")


class Found(NamedTuple):
    """A checkpoint to go on from, if there is one, and what is to be said about the way to it."""

    checkpoint: Path | None
    remarks: list[str]


def find(resume: str, run_dir: Path) -> Found:
    """Find the newest intact checkpoint that `resume=…` means.

    It is a run's folder; one of its checkpoints; or `auto`, the last unfinished run beside `run_dir`, a new run's
    folder among those of the same name, which may find none.

    Raises ConfigError if the folder is no run's, or has no checkpoint that is intact.
    """
    if resume == "auto":
        return _last_unfinished(run_dir)
    path = Path(resume).absolute()  # the record holds no path that depends on where a run was resumed
    if path.is_file() and path.parent.name == ABANDONED:
        message = f"{path} is of a branch that was left: move it to {path.parents[1]}, and go on from it there"
        raise ConfigError([Problem("resume", message)])
    recorded_config(path.parents[1] if path.is_file() else path)
    if path.is_file():
        if problem := damage(path):
            raise ConfigError([Problem("resume", f"{path} is damaged ({problem}): give another, or the run's folder")])
        return Found(path, [])
    found = _newest(path)
    if found.checkpoint is None:
        why = "; ".join(found.remarks) or f"{path} has no checkpoints/*.ckpt to go on from"
        more = "start a new run, or copy a checkpoint of this one from a backup"
        raise ConfigError([Problem("resume", f"{why}: {more}")])
    return found


def _last_unfinished(run_dir: Path) -> Found:
    """Runs of a name are folders whose names end with the time of their start."""

    def started(folder: Path) -> str:
        time = re.search(r"\d{4}-\d\d-\d\d_.*", folder.name)
        return time[0] if time else folder.name

    remarks: list[str] = []
    for folder in sorted(run_dir.parent.iterdir(), key=started, reverse=True) if run_dir.parent.exists() else []:
        if folder == run_dir or not (folder / "config.yaml").is_file() or is_finished(folder):
            continue
        checkpoint, more = _newest(folder)
        remarks += more
        if checkpoint is not None:
            return Found(checkpoint, remarks)
    return Found(None, [*remarks, f"resume=auto: no unfinished run in {run_dir.parent}: starting anew"])


def is_finished(run_dir: Path) -> bool:
    """Whether a run has made all the steps of its plan, or a callback has ended it."""
    summary, plan = record.read_summary(run_dir), run_dir / "plan.json"
    if summary is None or not plan.is_file():
        return False
    return "stopped_early" in summary or summary["steps"] >= read_mapping(plan, "resume", record.Steps)["steps"]


def _newest(run_dir: Path) -> Found:
    """The intact checkpoint with the most steps, and what is wrong with those that come before it."""

    def steps(file: Path) -> float:
        try:
            return _steps(file)
        except Exception:  # whatever reading a damaged file raises; `damage` says it below
            return math.inf

    remarks: list[str] = []
    files = (run_dir / CHECKPOINTS).glob("*.ckpt")
    for file in sorted(files, key=lambda file: (steps(file), file.name == "last.ckpt", file.name), reverse=True):
        if (problem := damage(file)) is None:
            return Found(file, remarks)
        remarks.append(f"{file} is damaged and passed over ({problem})")
    return Found(None, remarks)


def damage(checkpoint: Path) -> str | None:
    """Say what is wrong with a checkpoint; None if it holds what was written.

    torch.save writes a zip archive with a CRC-32 of each of its parts: torch.load does not compare them, this does.
    Reads the whole file once.
    """
    try:
        if not zipfile.is_zipfile(checkpoint):
            return "its end is missing: it was cut off, or is no checkpoint"
        with zipfile.ZipFile(checkpoint) as archive:
            part = archive.testzip()
        if part is not None:
            return f"the checksum of {part} is wrong"
        _steps(checkpoint)
    except Exception as error:  # torch, zipfile, zlib and struct have many names for nonsense
        return first_line(error)
    return None


def _steps(checkpoint: Path) -> int:
    """Optimizer steps made before a checkpoint; reads little of it."""
    return int(torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)["global_step"])


def set_aside(run_dir: Path, steps: int) -> None:
    """Move checkpoints of more steps into checkpoints/abandoned: who goes on from an earlier one leaves that branch."""
    for file in (run_dir / CHECKPOINTS).glob("*.ckpt"):
        with contextlib.suppress(Exception):  # a damaged one is of no branch
            if _steps(file) > steps:
                (file.parent / ABANDONED).mkdir(exist_ok=True)
                names = itertools.chain([file.name], (f"{file.stem}-{n}.ckpt" for n in itertools.count(2)))
                asides = (file.parent / ABANDONED / name for name in names)
                os.replace(file, next(aside for aside in asides if not aside.exists()))


def roll_back(
    run_dir: Path, data: TokenDataModule, diverged_at: int, before: list[dict[str, int]], write: bool
) -> Path | None:
    """The newest checkpoint, changed so that the run leaves out the data from there to the step that diverged.

    As PaLM went on after spikes of its loss (2204.02311, 5.1): the same weights on other data. One rank writes it.
    None if there is no checkpoint, or `before` tells of MOST_ROLLBACKS already.
    """
    newest, rolled = _newest(run_dir).checkpoint, run_dir / CHECKPOINTS / "rollback"
    if newest is None or len(before) >= MOST_ROLLBACKS:
        return None
    if write:
        assert data.trainer is not None
        after = data.samples_seen - (data.trainer.global_step - diverged_at) * data.sequences_per_step
        content = torch.load(newest, map_location="cpu", weights_only=True)
        seen, to = content[type(data).__qualname__], content["global_step"]
        event = {"step": diverged_at, "to": to, "first_sample": seen["samples"], "next_sample": after}
        content["callbacks"]["WatchDivergence"]["rollbacks"] = [*before, event]
        seen |= {"samples": after, "order": data.order_state(after)}
        with disk.replacing(rolled) as file:
            torch.save(content, file)
    return rolled


def check(checkpoint: Path, run: Run, plan: Plan) -> list[str]:
    """Tell which settings of the model and of its training have changed since an intact checkpoint, and may.

    Raises ConfigError if others have changed, weights do not fit, or the steps are made already; names all.
    """
    content = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)
    then, problems = content["hyper_parameters"], []
    refuse_untrusted(then["config"])
    changes = differences(then["config"], run.model.config)
    told = {path: f"{path}={show(now)} (was {show(before)})" for path, before, now in changes}
    for path, before, now in changes:
        if why := _why_not(path, now):
            change = f"{show(before)} → {show(now)}"
            problems.append(Problem(path, f"changed since the checkpoint ({change}): {why}: set it back"))
    before_all = recorded_config(checkpoint.parents[1])
    for path, before, now in differences(before_all, recorded(run.config)):
        if path.startswith(LEARNED) and not isinstance(
            run.callbacks.get(path.split(".")[1]), ModelCheckpoint | ProgressBar
        ):
            told.setdefault(path, f"{path}={show(now)} (was {show(before)})")
    for (group, setting), reason in KEPT.items():
        was, wanted = before_all[group].get(setting), run.config[group].get(setting)
        if was != wanted:
            change = f"{show(was)} → {show(wanted)}"
            problems.append(
                Problem(f"{group}.{setting}", f"changed since the checkpoint ({change}): {reason}: set it back")
            )
    finished = record.read_summary(checkpoint.parents[1])
    if finished is not None and finished["steps"] >= plan.steps and content["global_step"] >= plan.steps:
        message = f"the run has made all its {finished['steps']:,} steps: raise the budget, as budget.steps=…"
        problems.append(Problem("resume", message))
    elif content["global_step"] > plan.steps:
        made = f"the plan is for {plan.steps:,} steps, and the checkpoint has made {content['global_step']:,}"
        problems.append(Problem("budget", f"{made}: raise it, or go on from an earlier checkpoint"))
    shapes = {f"decoder.{name}": list(weight.shape) for name, weight in run.decoder_meta.state_dict().items()}
    saved = {name: list(weight.shape) for name, weight in content["state_dict"].items() if name.startswith("decoder.")}
    if name := next((name for name in saved | shapes if saved.get(name) != shapes.get(name)), None):
        guilty = [text for path, text in told.items() if path.partition(".")[0] in ("model", *COMPONENTS)]
        if then["vocab_size"] != plan.vocab_size and then["config"]["model"] == run.model.config["model"]:
            guilty.append(f"the tokenizer's vocabulary, {plan.vocab_size:,} (was {then['vocab_size']:,})")
        why = "the settings are the same, so the code has changed: go back to that of environment.json"
        if guilty:
            why = f"changed since the checkpoint: {', '.join(guilty)}: set it back"
        shape = f"has the shape {saved.get(name)} in the checkpoint, and now {shapes.get(name)}"
        problems.append(
            Problem("resume", f"the weights do not fit the model ({name.removeprefix('decoder.')} {shape}): {why}")
        )
    if problems:
        raise ConfigError(problems)
    return [*told.values()]


def _why_not(path: str, now: Any) -> str | None:
    """Why a run cannot go on with a changed setting; None: it can."""
    if path.startswith(("parameter_groups.", "parametrization.")):
        return "the optimizer's state is kept in the groups that follow from it"
    if path == "optimizer._target_" or (path == "optimizer.amsgrad" and now):
        return "the checkpoint does not have the state that this needs"
    return None


def take_new_settings(model: LanguageModel, checkpoint: dict[str, Any]) -> None:
    """Let a resumed run have its own settings of the optimizer and the schedule, which torch would take from here.

    Those that did not change stay bit for bit; the learning rate is what the schedule says for the next step.
    May be called again: strategies that load the optimizer's state early have done so before.
    """
    if model._trainer is None or not checkpoint.get("optimizer_states"):  # loaded to generate text, not to go on
        return
    before = ModelSpec.of(checkpoint["hyper_parameters"]["config"])
    now, then = (spec.optimizer(model.decoder).param_groups for spec in (model.spec, before))
    [saved], [schedule] = checkpoint["optimizer_states"], checkpoint["lr_schedulers"]
    factor = model.schedule(schedule["last_epoch"])
    for group, new, old in zip(saved["param_groups"], now, then, strict=True):
        group |= {key: new[key] for key in new if key != "params" and (key not in old or new[key] != old[key])}
        group |= {"initial_lr": new["lr"], "lr": new["lr"] * factor}
    schedule["base_lrs"] = [group["initial_lr"] for group in saved["param_groups"]]
    schedule["_last_lr"] = [group["lr"] for group in saved["param_groups"]]


def resumed_config(checkpoint: Path, typed: DictConfig) -> Config:
    """The recorded configuration of a run, with what was typed to change; see SWITCHABLE.

    Raises ConfigError if something was typed that cannot change, or the record is damaged.
    """
    folder = checkpoint.parents[1]
    not_recorded = ("resume=", "trust=", "hydra")
    overrides = [o for o in command_line.invocation_overrides() if not o.startswith(not_recorded)]
    switched = {group: plain(typed[group]) for group in sorted(command_line.chosen(overrides).intersection(SWITCHABLE))}
    before = recorded_config(folder)
    try:
        sources = of_record(before)
    except ValueError as error:
        raise ConfigError([Problem("resume", f"{folder / 'config.yaml'} is damaged: {error}")]) from None
    refuse_unknown_variables(sources)
    config = command_line.with_overrides(sources, overrides, recorded_overrides(folder), switched)
    changed = [path for path, *_ in differences(before, recorded(config))]
    if any(path.startswith(SHARDS_DEPEND_ON) for path in changed):
        return set_value(config, "data.shards_key", None) if config["data"].get("shards_key") else config
    return config if "data.shards_key" in changed else record.with_its_shards(config, folder)


def recorded_config(run_dir: Path, where: str = "resume") -> Config:
    """The configuration of a run, without what its user trusted.

    Raises ConfigError for the setting `where` if the folder is no run's, config.yaml is damaged, or it names components
    that are not trusted here.
    """
    file = run_dir / "config.yaml"
    if not file.is_file():
        message = f"{run_dir} is no run folder (it has no config.yaml): give one of logs/runs/<name>/<time>"
        raise ConfigError([Problem(where, message)])
    config = read_mapping(file, where)
    if lacking := [group for group in (*GROUPS, "data", "trainer") if group not in config]:
        lacks = f"it has no {', no '.join(lacking[:3])}{' …' * (len(lacking) > 3)}"
        raise damaged(file, f"as the configuration of a run {lacks}", where)
    refuse_untrusted(config, run_dir / CODE)
    return {**config, "trust": []}


def recorded_overrides(run_dir: Path) -> list[str]:
    """Overrides that a run was started and resumed with; raises ConfigError if environment.json is damaged."""
    file = run_dir / "environment.json"
    return list(read_mapping(file, "resume", record.Surroundings).get("overrides", [])) if file.exists() else []
