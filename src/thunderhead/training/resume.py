"""Which run to go on with, and from which of its checkpoints."""

import contextlib
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from filelock import FileLock, Timeout
from omegaconf import DictConfig

from thunderhead import command_line
from thunderhead.core.config import Config, ConfigError, Problem, differences, plain, show
from thunderhead.core.module import COMPONENTS, LanguageModel, ModelSpec
from thunderhead.core.run import Run
from thunderhead.training import record
from thunderhead.training.plan import Plan

CHECKPOINTS = "checkpoints"
SWITCHABLE = ("strategy", "compile", "activation_checkpointing")
"""Groups that say how a run is computed and not what: a resumed run may choose others."""


class Found(NamedTuple):
    """A checkpoint to go on from, and what was passed over on the way to it, in sentences."""

    checkpoint: Path
    remarks: list[str]


def find(resume: str, run_dir: Path) -> Found | None:
    """Find what `resume=…` means.

    Args:
        resume: a run's folder; one of its checkpoints; or `auto`, the last unfinished run beside `run_dir`.
        run_dir: the folder of a new run, among those of the same name.

    Returns:
        The newest intact checkpoint; None if auto finds no unfinished run that has one.

    Raises:
        ConfigError: the folder is no run's, or has no checkpoint that is intact.
    """
    path = Path(resume).absolute()  # the record holds no path that depends on where a run was resumed
    if resume == "auto":
        return _last_unfinished(run_dir)
    if path.is_file():
        if problem := damage(path):
            raise ConfigError([Problem("resume", f"{path} is damaged ({problem}): give another, or the run's folder")])
        if not (path.parents[1] / "config.yaml").is_file():
            raise ConfigError([Problem("resume", f"{path} does not lie in the checkpoints of a run's folder")])
        return Found(path, [])
    if not (path / "config.yaml").is_file():
        message = f"{path} is no run folder (it has no config.yaml): give one of logs/runs/<name>/<time>"
        raise ConfigError([Problem("resume", message)])
    found, remarks = _newest(path)
    if found is None:
        why = "; ".join(remarks) or f"{path} has no checkpoints/*.ckpt to go on from"
        raise ConfigError(
            [Problem("resume", f"{why}: start a new run, or copy a checkpoint of this one from a backup")]
        )
    return Found(found, remarks)


def _last_unfinished(run_dir: Path) -> Found | None:
    """Runs of a name are folders named by the time of their start."""
    remarks: list[str] = []
    for folder in sorted(run_dir.parent.iterdir(), reverse=True) if run_dir.parent.exists() else []:
        if folder == run_dir or not (folder / "config.yaml").is_file() or is_finished(folder):
            continue
        checkpoint, more = _newest(folder)
        remarks += more
        if checkpoint is not None:
            return Found(checkpoint, remarks)
    return None


def is_finished(run_dir: Path) -> bool:
    """Whether a run has made all the steps of its plan, or a callback has ended it."""
    summary, plan = record.read_summary(run_dir), run_dir / "plan.json"
    if summary is None or not plan.is_file():
        return False
    return "stopped_early" in summary or summary["steps"] >= record.read_json(plan)["steps"]


def _newest(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The intact checkpoint with the most steps, and what is wrong with those that come before it."""
    steps, remarks = {}, []
    for file in sorted((run_dir / CHECKPOINTS).glob("*.ckpt")):
        try:
            steps[file] = _steps(file)
        except Exception:  # whatever reading a damaged file raises
            remarks.append(f"{file} is damaged and passed over ({damage(file)})")
    for file in sorted(steps, key=lambda file: (steps[file], file.name == "last.ckpt"), reverse=True):
        if problem := damage(file):
            remarks.append(f"{file} is damaged and passed over ({problem})")
        else:
            return file, remarks
    return None, remarks


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
        if part is None:
            _steps(checkpoint)
    except Exception as error:  # torch, zipfile, zlib and struct have many names for nonsense
        return (str(error).splitlines() or [type(error).__name__])[0]
    return f"the checksum of {part} is wrong" if part is not None else None


def _steps(checkpoint: Path) -> int:
    """Optimizer steps made before a checkpoint; reads little of it."""
    return int(torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)["global_step"])


class Change(NamedTuple):
    """A setting that is not what it was when a checkpoint was written."""

    path: str
    then: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.path}={show(self.now)} (was {show(self.then)})"


def check(checkpoint: Path, run: Run, plan: Plan) -> list[Change]:
    """Compare a checkpoint with the run that goes on from it.

    Args:
        checkpoint: intact.
        run: that goes on, its data prepared.
        plan: of that run.

    Returns:
        Settings of the model and of its training that have changed, and may.

    Raises:
        ConfigError: others have changed, weights do not fit, or the steps are made already; names all.
    """
    content = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)
    then = content["hyper_parameters"]
    changes = [Change(*difference) for difference in differences(then["config"], run.model.config)]
    problems = [
        Problem(change.path, f"changed since the checkpoint ({show(change.then)} → {show(change.now)}): {why}")
        for change in changes
        if (why := _why_not(change)) is not None
    ]
    if content["global_step"] > plan.steps:
        made = f"the plan is for {plan.steps:,} steps, and the checkpoint has made {content['global_step']:,}"
        problems.append(Problem("budget", f"{made}: raise it, or go on from an earlier checkpoint"))
    shapes = {f"decoder.{name}": list(weight.shape) for name, weight in run.decoder_meta.state_dict().items()}
    saved = {name: list(weight.shape) for name, weight in content["state_dict"].items() if name.startswith("decoder.")}
    if differing := [name for name in saved | shapes if saved.get(name) != shapes.get(name)]:
        guilty = [str(change) for change in changes if change.path.partition(".")[0] in ("model", *COMPONENTS)]
        if then["vocab_size"] != plan.vocab_size and then["config"]["model"] == run.model.config["model"]:
            guilty.append(f"the tokenizer's vocabulary, {plan.vocab_size:,} (was {then['vocab_size']:,})")
        name = differing[0]
        message = (
            f"the weights do not fit the model ({name.removeprefix('decoder.')} has the shape {saved.get(name)} in the"
            f" checkpoint, and now {shapes.get(name)}): "
        )
        message += (
            f"changed since the checkpoint: {', '.join(guilty)}: set it back"
            if guilty
            else "the settings are the same, so the code has changed: go back to that of environment.json"
        )
        problems.append(Problem("resume", message))
    if problems:
        raise ConfigError(problems)
    return changes


def _why_not(change: Change) -> str | None:
    """Why a run cannot go on with a changed setting; None: it can."""
    if change.path.startswith(("parameter_groups.", "parametrization.")):
        return "the optimizer's state is kept in the groups that follow from it: set it back"
    if change.path == "optimizer._target_" or (change.path == "optimizer.amsgrad" and change.now):
        return "the checkpoint does not have the state that this needs: set it back"
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

    Raises:
        ConfigError: something was typed that cannot change, or the record is damaged.
    """
    folder = checkpoint.parents[1]
    overrides = [o for o in command_line.invocation_overrides() if not o.startswith(("resume=", "hydra"))]
    switched = {group: plain(typed[group]) for group in sorted(command_line.chosen(overrides).intersection(SWITCHABLE))}
    return command_line.with_overrides(recorded_config(folder), overrides, recorded_overrides(folder), switched)


def recorded_config(run_dir: Path) -> dict[str, Any]:
    """The configuration that a run has.

    Raises:
        ConfigError: config.yaml is damaged.
    """
    file = run_dir / "config.yaml"
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError([Problem("resume", _damaged(file, error))]) from None
    if not isinstance(config, dict):
        raise ConfigError([Problem("resume", _damaged(file, "it holds no mapping"))])
    return config


def recorded_overrides(run_dir: Path) -> list[str]:
    """Overrides that a run was started and resumed with.

    Raises:
        ConfigError: environment.json is damaged.
    """
    file = run_dir / "environment.json"
    try:
        return list(record.read_json(file).get("overrides", []))
    except FileNotFoundError:
        return []
    except (ValueError, AttributeError) as error:
        raise ConfigError([Problem("resume", _damaged(file, error))]) from None


def _damaged(file: Path, why: object) -> str:
    return f"{file} is damaged ({' '.join(str(why).split())}): copy it from a backup, or start a new run"


@contextlib.contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Hold a run's folder for this process, until it ends, however it ends; and remove half-written checkpoints.

    The folder of a new run is removed again if the run is refused, or ends before its configuration is recorded.

    Raises:
        ConfigError: another process trains this run.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    is_new = not any(run_dir.iterdir())  # so that all in it is this run's
    lock = FileLock(run_dir / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError([Problem("resume", f"{run_dir} is still being trained by another process")]) from None
    except (NotImplementedError, OSError):  # a file system without locks: then nobody can be asked
        pass
    for left in (run_dir / CHECKPOINTS).glob(".*.ckpt.*"):  # see AtomicCheckpointIO
        left.unlink()
    record.discard(run_dir)
    try:
        yield
    except BaseException as error:
        # of processes that were launched, the exit status tells
        refused = isinstance(error, ConfigError) or (isinstance(error, SystemExit) and error.code == 2)
        if is_new and (refused or not (run_dir / "config.yaml").exists()):
            shutil.rmtree(run_dir, ignore_errors=True)
            with contextlib.suppress(OSError):
                run_dir.parent.rmdir()
        raise
    finally:
        record.discard(run_dir)  # of a resume that was refused
        lock.release()
