"""What a damaged checkpoint looks like, and which one is taken."""

import random
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from thunderhead.core.config import ConfigError
from thunderhead.core.model_spec import GROUPS
from thunderhead.training.callbacks.state import AtomicCheckpointIO
from thunderhead.training.resume import damage, find
from thunderhead.training.run_folder import held


def save(file: Path, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    weights = {f"layer{i}": torch.randn(20, 20, generator=generator) for i in range(3)}
    AtomicCheckpointIO().save_checkpoint({"global_step": step, "state_dict": weights, "lr": 0.5}, file)


def test_no_flipped_bit_is_loaded(tmp_path: Path) -> None:
    """Any flipped bit is seen, or lies where torch.load does not look (dates, padding)."""
    file = tmp_path / "a.ckpt"
    save(file, 1)
    assert damage(file) is None
    whole, written = file.read_bytes(), torch.load(file, weights_only=True)
    draw, seen = random.Random(0), 0
    for _ in range(400):
        content = bytearray(whole)
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        file.write_bytes(content)
        if damage(file) is not None:
            seen += 1
            continue
        read = torch.load(file, weights_only=True)
        assert (read["global_step"], read["lr"]) == (1, 0.5)
        assert all(torch.equal(read["state_dict"][name], written["state_dict"][name]) for name in written["state_dict"])
    assert seen > 200


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_damaged(kept: float, tmp_path: Path) -> None:
    file = tmp_path / "a.ckpt"
    save(file, 1)
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * kept)])
    assert damage(file) == "its end is missing: it was cut off, or is no checkpoint"


def run_folder(folder: Path, *steps: int) -> Path:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text("".join(f"{group}: {{}}\n" for group in (*GROUPS, "data", "trainer")))
    for step in steps:
        save(folder / "checkpoints" / f"step-{step}.ckpt", step)
    return folder


def test_the_newest_is_taken_by_its_steps(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", 1000, 30, 200)  # neither in the order of names nor of times
    assert find(str(folder), tmp_path / "new") == (folder / "checkpoints" / "step-1000.ckpt", [])


def test_auto_looks_beside_the_new_run(tmp_path: Path) -> None:
    assert find("auto", tmp_path / "runs" / "03").checkpoint is None
    old, begun = run_folder(tmp_path / "runs" / "01", 5), run_folder(tmp_path / "runs" / "02")
    assert find("auto", tmp_path / "runs" / "03").checkpoint == old / "checkpoints" / "step-5.ckpt"
    save(begun / "checkpoints" / "last.ckpt", 2)
    assert find("auto", tmp_path / "runs" / "03").checkpoint == begun / "checkpoints" / "last.ckpt"
    for folder in (old, begun):
        (folder / "summary.json").write_text('{"steps": 7, "val_loss": 1.0}')
        (folder / "plan.json").write_text('{"steps": 7}')
    assert find("auto", tmp_path / "runs" / "03").checkpoint is None


def test_a_run_is_held_by_one_process(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    (folder / "checkpoints" / ".last.ckpt.x8s3").touch()  # left by a kill
    with FileLock(folder / ".lock"), pytest.raises(ConfigError, match="still being trained"), held(folder):
        pass
    with held(folder):
        assert list((folder / "checkpoints").iterdir()) == []


def test_a_refused_run_leaves_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which may be empty but for the run's."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError), held(Path("run")):
        raise ConfigError([])
    assert tmp_path.is_dir()
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("error", "recorded", "is_removed"),
    [
        (ConfigError([]), True, True),
        (SystemExit(2), True, True),  # of the processes that a run on several devices launches
        (KeyboardInterrupt(), False, True),
        (KeyboardInterrupt(), True, False),
        (SystemExit(1), True, False),
    ],
)
def test_what_a_refused_run_leaves(error: BaseException, recorded: bool, is_removed: bool, tmp_path: Path) -> None:
    new = tmp_path / "name" / "new"

    def end(folder: Path) -> None:
        with held(folder):
            assert (folder / ".lock").exists()
            if recorded:
                (folder / "config.yaml").touch()
            raise error

    with pytest.raises(type(error)):
        end(new)
    assert new.parent.exists() is new.exists() is not is_removed
    trained = tmp_path / "trained"

    def train(folder: Path) -> None:
        with held(folder):
            (folder / "checkpoints").mkdir()
            (folder / "checkpoints" / "last.ckpt").touch()
            raise error

    with pytest.raises(type(error)):
        train(trained)
    assert (trained / "checkpoints" / "last.ckpt").exists()
    before = tmp_path / "before"
    before.mkdir()
    (before / "notes.txt").touch()  # not ours
    with pytest.raises(type(error)):
        end(before)
    assert (before / "notes.txt").exists()


def test_the_last_run_is_the_one_that_started_last_whatever_it_is_called(tmp_path: Path) -> None:
    for name in (
        "mqa_2026-01-02_00-00-00",
        "2026-01-03_00-00-00",
        "zero_2026-01-01_00-00-00",
        "lr_0.1_2026-01-02_00-00-00-2",
    ):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        (tmp_path / name / "config.yaml").touch()
        (tmp_path / name / "checkpoints" / "last.ckpt").write_text("damaged")
    remarks = find("auto", tmp_path / "new").remarks
    found = [Path(remark.split()[0]).parents[1].name.partition("2026-01-")[2] for remark in remarks[:-1]]
    assert found == ["03_00-00-00", "02_00-00-00-2", "02_00-00-00", "01_00-00-00"]
