"""A run's folder is one process', or one group of processes', for as long as they train it."""

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path

from thunderhead import command_line
from thunderhead.core.config import ConfigError, Problem
from thunderhead.training import record
from thunderhead.training.resume import CHECKPOINTS


@contextlib.contextmanager
def shared(run_dir: Path, *, at_first: int = fcntl.LOCK_SH) -> Iterator[None]:
    """Keep others from a run's folder for as long as this process lives, beside the one that launched it.

    With LOCK_EX `at_first`, raises ConfigError if another trains this run: then nobody else has it, and the processes
    that this one launches may share it: it is free when the last of them has ended, however they do.
    """
    with contextlib.ExitStack() as stack:
        try:
            lock = stack.enter_context((run_dir / ".lock").open("a"))
            for kind in (at_first, fcntl.LOCK_SH):
                fcntl.flock(lock, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError([Problem("resume", f"{run_dir} is still being trained by another process")]) from None
        except OSError:  # a file system without locks: then nobody can be asked
            pass
        yield


@contextlib.contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Hold a run's folder for this process, until it ends, however it ends; and remove half-written checkpoints.

    The folder of a new run is removed again if the run is refused, or ends before its configuration is recorded; never
    what it was trained. Raises ConfigError if another process trains this run.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    before = {*run_dir.iterdir()}
    is_new = not before  # so that all in it is this run's
    with shared(run_dir, at_first=fcntl.LOCK_EX):
        for left in [*(run_dir / CHECKPOINTS).glob(".*.ckpt.*"), *(run_dir / CHECKPOINTS).glob("*rollback*")]:
            left.unlink()  # of AtomicCheckpointIO, or of `roll_back`
        record.discard(run_dir)
        try:
            yield
        except BaseException as error:
            # of processes that were launched, the exit status tells
            refused = isinstance(error, ConfigError) or (isinstance(error, SystemExit) and error.code == 2)
            trained = (run_dir / "metrics.csv").exists() or any((run_dir / CHECKPOINTS).glob("*.ckpt"))
            if is_new and not trained and (refused or not (run_dir / "config.yaml").exists()):
                shutil.rmtree(run_dir, ignore_errors=True)
                command_line.remove_if_empty(run_dir)
            elif refused:  # Lightning has let TensorBoard begin a file before
                for file in {*run_dir.glob("events.out.tfevents.*")} - before:
                    file.unlink()
            raise
        finally:
            record.discard(run_dir)  # of a resume that was refused
