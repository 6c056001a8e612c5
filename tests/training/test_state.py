import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from thunderhead.training.callbacks import state
from thunderhead.training.callbacks.state import AtomicCheckpointIO, BackgroundCheckpointIO, CheckpointError
from thunderhead.training.resume import damage


class SlowDisk:
    """torch.save that waits until it may."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self._save = threading.Event(), torch.save
        monkeypatch.setattr(state.torch, "save", self.save)

    def save(self, *args: Any) -> None:
        assert self.go.wait(30)
        self._save(*args)


def test_training_goes_on_while_what_was_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, io = SlowDisk(monkeypatch), BackgroundCheckpointIO()
    weights, progress = torch.zeros(3), {"step": 1}
    io.save_checkpoint({"weights": weights, "progress": progress}, tmp_path / "a.ckpt")
    weights += 1
    progress["step"] = 2
    assert not (tmp_path / "a.ckpt").exists()
    disk.go.set()
    saved = io.load_checkpoint(tmp_path / "a.ckpt")  # waits for it
    assert saved["progress"] == {"step": 1}
    assert not saved["weights"].any()
    io.teardown()
    io.save_checkpoint({"weights": weights}, tmp_path / "b.ckpt")  # after a teardown: the last one of a run
    io.teardown()
    assert io.load_checkpoint(tmp_path / "b.ckpt")["weights"].all()


def test_old_files_go_when_new_ones_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = tmp_path / "old.ckpt", tmp_path / "new.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, old)
    disk, io = SlowDisk(monkeypatch), BackgroundCheckpointIO()
    io.save_checkpoint({"global_step": 2, "state_dict": {}}, new)
    io.remove_checkpoint(old)
    assert old.exists()
    disk.go.set()
    io.teardown()
    assert not old.exists()
    assert damage(new) is None


def test_a_failed_write_is_told_and_leaves_the_file_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, io = tmp_path / "last.ckpt", BackgroundCheckpointIO()
    io.save_checkpoint({"step": 1}, file)
    io.teardown()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    io.save_checkpoint({"step": 2}, file)
    with pytest.raises(CheckpointError, match=r"last\.ckpt could not be written: .*No space left"):
        io.teardown()
    monkeypatch.undo()
    assert io.load_checkpoint(file) == {"step": 1}
    assert os.listdir(tmp_path) == ["last.ckpt"]
    io.teardown()  # it was told once


KILLED = """
import os, pathlib, sys, torch
from thunderhead.training.callbacks import state
io, file, save = state.BackgroundCheckpointIO(), pathlib.Path(sys.argv[1]), torch.save
io.save_checkpoint({"step": 1}, file)
io.teardown()
def half(content, opened):
    save(content, opened)
    opened.truncate(opened.tell() // 2)
    opened.flush()
    os._exit(9)
state.torch.save = half
io.save_checkpoint({"step": 2}, file)
io.teardown()
"""


def test_a_kill_in_mid_write_leaves_the_file_before(tmp_path: Path) -> None:
    file = tmp_path / "last.ckpt"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(file)], check=False, timeout=120)
    assert killed.returncode == 9
    assert len(list(tmp_path.iterdir())) == 2  # with the torn one, which the next resume sweeps away
    assert torch.load(file, weights_only=True) == {"step": 1}


def test_a_run_saves_the_same_in_the_background(run: Callable[..., Path]) -> None:
    settings = ("callbacks=default", "budget.steps=3", "callbacks.checkpoint.every_n_train_steps=1")
    folders = [run(*settings, f"background_checkpoints={on}") / "checkpoints" for on in ("false", "true")]
    assert [sorted(os.listdir(folder)) for folder in folders[:1]] == [
        sorted(os.listdir(folder)) for folder in folders[1:]
    ]
    for name in os.listdir(folders[0]):
        saved = [torch.load(folder / name, weights_only=True) for folder in folders]
        torch.testing.assert_close(saved[0]["state_dict"], saved[1]["state_dict"], rtol=0, atol=0)
        assert saved[0]["global_step"] == saved[1]["global_step"]


@pytest.mark.parametrize("background", ["false", "true"])
def test_a_run_that_cannot_write_says_so(
    background: str, run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state.torch, "save", full)
    with pytest.raises(SystemExit) as ended:
        run("callbacks=default", "callbacks.checkpoint.every_n_train_steps=1", f"background_checkpoints={background}")
    assert ended.value.code == 1
    said = "".join(capsys.readouterr())
    assert "could not be written" in said
    assert "No space left" in said


def test_ranks_of_one_seed_draw_unlike_those_of_another() -> None:
    """Rank 1 of seed 1 must not be rank 0 of seed 2: statistics take seeds as independent."""
    seeds = [state.seed_of_rank(seed, rank) for seed in range(50) for rank in range(64)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
