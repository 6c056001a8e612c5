"""Which commands go on from a run: resumed, watched, generated from, compared."""

import shlex
from pathlib import Path

from lightning.pytorch.loggers import TensorBoardLogger

from thunderhead import command_line
from thunderhead.core.config import quoted, read_mapping
from thunderhead.core.data.datamodule import RunData
from thunderhead.core.run import Run
from thunderhead.core.trust import foreign
from thunderhead.training.resume import CHECKPOINTS


def go_on(run_dir: Path, *changes: str) -> str:
    """Say how to go on with a run that has ended before its time."""
    if not any((run_dir / CHECKPOINTS).glob("*.ckpt")):
        return "no checkpoint was kept"
    return f"go on with: {command_line.shown('train.py', f'resume={quoted(run_dir)}', *changes, *_trusting(run_dir))}"


def _trusting(run_dir: Path) -> list[str]:
    """What lets a program call the components of one's own that a run's record names."""
    file = run_dir / "config.yaml"
    modules = foreign(read_mapping(file)) if file.is_file() else []
    return [f"trust=[{','.join(modules)}]"] if modules else []


def _watch(run: Run) -> dict[str, str]:
    """How to look at the run's charts, beside its neighbours'."""
    if not any(isinstance(logger, TensorBoardLogger) for logger in run.loggers.values()):
        return {}
    logs = next((folder for folder in run.folder.parents if folder.name == "logs"), run.folder.parent)
    return {"watch": f"tensorboard --logdir {shlex.quote(str(from_here(logs)))}"}


def from_here(folder: Path) -> Path:
    """What is typed for a folder where we are."""
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def next_commands(run: Run) -> dict[str, str]:
    """What to do with a finished run, as commands; without a checkpoint it can be watched only."""
    found = _watch(run)
    if not any((run.folder / CHECKPOINTS).glob("*.ckpt")):
        return found
    folder, trusting = from_here(run.folder), _trusting(run.folder)
    place = quoted(folder)
    is_text = getattr(run.data, "tokenizer", None) and getattr(type(run.data), "sample", None) is RunData.sample
    if is_text:
        found["write text"] = command_line.shown("generate.py", f"run={place}", *trusting)
        found["export"] = command_line.shown("export.py", f"run={place}", *trusting)
    elif "shards_key" not in run.config["data"]:
        found["evaluate"] = command_line.shown("evaluate.py", f"run={place}", *trusting)
    amounts = {name: value for name, value in run.config["budget"].items() if isinstance(value, int | float)}
    if len(amounts) == 1:
        ((name, value),) = amounts.items()
        longer = f"budget.{name}={2 * value}"
        found["train longer"] = command_line.shown("train.py", f"resume={place}", longer, *trusting)
    return found | {"compare": command_line.shown("compare.py", f"runs={quoted(folder.parent)}")}
