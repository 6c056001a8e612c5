"""What a checkpoint must hold beside Lightning's own, and how it reaches the disk."""

import hashlib
import random
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection

from thunderhead import disk
from thunderhead.core.config import first_line
from thunderhead.core.run import seed_generators


class ExactResume(Callback):
    """What Lightning leaves out of a checkpoint, or takes from it too literally.

    It saves no random state: here each rank's is saved and restored, so that dropout goes on as if never stopped.
    Ranks draw from generators of their own (see `seed_of_rank`; those that compute a model together drop the same
    activations) from the start of training; a run resumed on other ranks starts these generators anew. It counts
    micro-batches: they are counted anew from the optimizer steps, so that a run may go on with another accumulation.
    And ModelCheckpoint may save between the micro-batches of a step (after a time, or once more right after a resume),
    whose gradients are lost then: the states saved are those before the step's first micro-batch, as the step will
    begin again. It saves before the validation of the same step, which a resumed run would leave out: it is made then.
    And it forgets what it has saved when the run's folder was moved: it is told where that is now.
    """

    def __init__(self, seed: int):
        self.seed = seed
        self._restored: tuple[list[int], list[dict[str, Any]]] = [], []  # data-parallel rank and state of each rank
        self._before_step: tuple[int | None, dict[str, Any]] = None, {}  # (step under way, state before it)
        self._validated_at: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seed this rank, or restore what it had."""
        (saved_ranks, states), ranks = self._restored, _data_parallel_ranks(trainer)
        if saved_ranks == ranks:
            _set_state(states[trainer.global_rank])
        else:
            seed_generators(seed_of_rank(self.seed, ranks[trainer.global_rank]))
        self._restored = [], []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep this rank's state before the first micro-batch of a step."""
        if self._before_step[0] != trainer.global_step and trainer.accumulate_grad_batches > 1:  # 0.15 ms
            self._before_step = trainer.global_step, _state()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validated_at = trainer.global_step

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the states of all ranks into the checkpoint, and which step was validated last."""
        checkpoint["validated_at"] = self._validated_at
        step, before = self._before_step
        state = before if step == trainer.global_step else _state()
        states: list[Any] = [state]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            states = [None] * trainer.world_size
            torch.distributed.all_gather_object(states, state)
        checkpoint["random_state"] = states
        checkpoint["data_parallel_ranks"] = _data_parallel_ranks(trainer)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember the states until training starts, count micro-batches anew, and have a validation made up for."""
        self._restored = checkpoint["data_parallel_ranks"], checkpoint["random_state"]
        loops = checkpoint["loops"]["fit_loop"]
        micro_batches = checkpoint["global_step"] * trainer.accumulate_grad_batches
        progress = loops["epoch_loop.batch_progress"]
        for scope in ("total", "current"):
            progress[scope] |= dict.fromkeys(progress[scope], micro_batches)
        _take_along(trainer, checkpoint)
        self._validated_at = checkpoint["validated_at"]
        # Lightning goes on with a validation that ended in a batch (started, not processed) if the step is one to
        # validate. Its totals go on counting from here, so a later checkpoint must not look like that again.
        is_validated = self._validated_at == checkpoint["global_step"]
        progress = loops["epoch_loop.val_loop.batch_progress"]
        progress["current"] |= dict.fromkeys(progress["current"], 0)
        progress["total"] |= {"ready": 1, "started": 1, "processed": int(is_validated), "completed": int(is_validated)}


def _take_along(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Let each ModelCheckpoint know the files it has saved: it forgets them if their folder has another name now.

    It has one when the run's folder was moved, or is given in another way. And it is found again by what it monitors,
    as what else it was told (every_n_train_steps) may change.
    """
    assert trainer.ckpt_path is not None
    here = Path(trainer.ckpt_path).absolute().parent
    states = {key: state for key, state in checkpoint["callbacks"].items() if key.startswith("ModelCheckpoint{")}
    for callback in trainer.checkpoint_callbacks:
        if not isinstance(callback, ModelCheckpoint) or Path(callback.dirpath or "").absolute() != here:
            continue  # what saves elsewhere has files elsewhere
        alike = [state for state in states.values() if state["monitor"] == callback.monitor]
        state = states.get(callback.state_key) or (alike[0] if len(alike) == 1 else None)
        if state is None:
            continue

        def moved(file: str, before: Path = Path(state["dirpath"])) -> str:
            return str(here / Path(file).name) if Path(file).parent == before else file

        state |= {name: moved(state[name]) for name in ("best_model_path", "kth_best_model_path", "last_model_path")}
        state["best_k_models"] = {moved(file): score for file, score in state["best_k_models"].items()}
        state["dirpath"] = callback.dirpath
        checkpoint["callbacks"][callback.state_key] = state


def seed_of_rank(seed: int, rank: int) -> int:
    """The seed of dropout on a data-parallel rank: a hash: rank 1 of seed 1 does not draw as rank 0 of seed 2."""
    return int.from_bytes(hashlib.sha256(f"{seed}/rank {rank}".encode()).digest()[:8]) >> 1


def _data_parallel_ranks(trainer: Trainer) -> list[int]:
    """The data-parallel rank of every rank: tensor-parallel ranks, which share one, are neighbours."""
    shared = getattr(trainer.strategy, "tensor_parallel_size", 1)
    return [rank // shared for rank in range(trainer.world_size)]


def _state() -> dict[str, Any]:
    """All random state of this process, in types that a weights-only load accepts."""
    numpy_state: dict[str, Any] = np.random.get_state(legacy=False)
    numpy_state["state"] = {"key": numpy_state["state"]["key"].tolist(), "pos": int(numpy_state["state"]["pos"])}
    state = {"python": random.getstate(), "numpy": numpy_state, "torch": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _set_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


class CheckpointError(RuntimeError):
    """A checkpoint could not be written: the disk is full, say."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint beside its place and rename it: a reader finds a whole file or none, also after a crash."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0  # that training has waited for it

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        start = time.perf_counter()
        self.write(checkpoint, path, storage_options)
        self.seconds += time.perf_counter() - start

    def write(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write to `path`, a file; remote paths are left to Lightning.

        Raises CheckpointError if it could not be written; what was at `path` before is still there.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            with disk.replacing(Path(path)) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:  # torch's writer turns the former into the latter
            why = disk.problem(error) or f"{path} could not be written: {first_line(error)}"
            raise CheckpointError(f"checkpoint {why}") from error


class BackgroundCheckpointIO(AtomicCheckpointIO):
    """The same while training goes on: what is to be saved is copied at once, and written by a thread of its own.

    A step's own file and last.ckpt come together; if three writes and removals are waiting already, training waits, so
    that copies do not pile up. Old files are removed in turn, after the new ones are written. A failed write is raised
    (CheckpointError) by the next save, or at the end. Lightning's AsyncCheckpointIO does none of these three.
    """

    def __init__(self) -> None:
        super().__init__()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._pending: deque[Future[None]] = deque()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Copy the checkpoint and have it written."""
        start = time.perf_counter()
        self._wait(at_most=2)
        copy = apply_to_collection(checkpoint, torch.Tensor, lambda tensor: tensor.detach().to("cpu", copy=True))
        self._pending.append(self._writer.submit(self.write, copy, path, storage_options))
        self.seconds += time.perf_counter() - start

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a file when all writes asked for before are done."""
        self._pending.append(self._writer.submit(super().remove_checkpoint, path))

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load what may have been saved just before."""
        self._wait()
        return super().load_checkpoint(*args, **kwargs)

    def teardown(self) -> None:
        """Wait until all is written; may be called several times, and is before the last save of a run."""
        self._wait()

    def _wait(self, at_most: int = 0) -> None:
        while self._pending and (len(self._pending) > at_most or self._pending[0].done()):
            self._pending.popleft().result()
