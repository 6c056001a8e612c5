"""Real disks (tmpfs) that are full or read-only: one line with the path and the bytes, and the next start goes on."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from fills import fill
from programs import run
from thunderhead import command_line
from thunderhead.core.config import ConfigError
from thunderhead.training.record import read_rows, read_summary
from tiny import tiny, train_here

STEPS = 60
SETTINGS = (
    *("callbacks=default", "callbacks.checkpoint.every_n_train_steps=4", "validation.every=100", "dropout=gpt2"),
    *(f"budget.steps={STEPS}", "generation.max_new_tokens=1"),
)
FILLS = "+callbacks.fills={_target_: fills.Fills, after: 9}"


def mount(*options: str | Path) -> None:
    subprocess.run(["mount", *map(str, options)], check=True, capture_output=True, text=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """disk("name", "4m") is a folder on a disk of that size."""
    mounted: list[Path] = []

    def make(name: str, size: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        try:
            mount("-t", "tmpfs", "-o", f"size={size}", "none", folder)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"this process may not mount a disk: {error}")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def resumed(run_dir: Path) -> None:
    with patch.object(command_line, "invocation_overrides", lambda: ["++callbacks.fills.after=1000"]):
        train_here([f"resume={run_dir}", "trust=[fills]"], run_dir.with_name("new"))


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def whole(text_corpus: Path, shards_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    folder.mkdir()
    train_here(tiny(text_corpus, shards_dir, *SETTINGS), folder)
    return folder


@pytest.mark.parametrize(
    ("case", "logger"),
    [("logging", "csv"), ("logging", "default"), ("saving", "csv"), ("background", "csv"), ("read-only", "csv")],
)
def test_a_run_says_what_the_disk_refused_and_goes_on_later(
    case: str,
    logger: str,
    whole: Path,
    disk: Callable[..., Path],
    text_corpus: Path,
    shards_dir: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    tell: Callable[..., None],
) -> None:
    record, checkpoints = disk("disk", "3m"), disk("checkpoints", "20m")
    run_dir, kept = record / "run", checkpoints
    run_dir.mkdir()
    if case in ("saving", "background"):
        kept = run_dir / "checkpoints"
    else:
        (run_dir / "checkpoints").symlink_to(checkpoints)
    fills = FILLS.replace("}", f", read_only: {checkpoints}}}") if case == "read-only" else FILLS
    background = f"background_checkpoints={str(case == 'background').lower()}"
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        train_here(tiny(text_corpus, shards_dir, *SETTINGS, f"logger={logger}", fills, background), run_dir)
    ended = time.time()
    said = "".join(capfd.readouterr())
    assert stopped.value.code == 1
    assert "Traceback" not in said, said
    (line,) = (line for line in said.splitlines() if "error" in line.lower())
    full = "No space left on device (" + "0 bytes free" * (case != "background")  # whose old one may go meanwhile
    assert ("Read-only file system" if case == "read-only" else full) in line
    assert str(run_dir) in line
    assert f"go on with: python train.py resume={run_dir}" in line
    assert not [name for name in os.listdir(kept) if name.startswith(".")]  # half-written
    last = torch.load(kept / "last.ckpt", weights_only=True)["global_step"]
    if case == "logging":  # an emergency checkpoint
        assert last > 9
        assert f"stopped at step {last} of {STEPS}" in line
    else:  # in the background, the removal of an old one may make room for this
        assert last in ((8, 12) if case == "background" else (8,))

    reached = int(read_rows(run_dir / "metrics.csv")[1][-1]["step"])
    tell(saw=line, seconds=ended - (run_dir / "filled").stat().st_mtime, tokens_lost=max(0, reached - last) * 128)
    (run_dir / "filler").unlink(missing_ok=True)
    mount("-o", "remount,rw", checkpoints)
    resumed(run_dir)
    assert [row["step"] for row in read_rows(run_dir / "metrics.csv")[1]] == [str(n) for n in range(1, STEPS + 1)]
    assert all(torch.equal(weights(run_dir)[name], weight) for name, weight in weights(whole).items())


def test_the_summary_comes_later(
    disk: Callable[..., Path],
    text_corpus: Path,
    shards_dir: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_dir = disk("disk", "3m") / "run"
    run_dir.mkdir()
    lines = tiny(text_corpus, shards_dir, "callbacks=default", "~callbacks.best", "logger=csv")
    with (
        patch("thunderhead.training.fit._summary", lambda *_: fill(run_dir) or {}),
        pytest.raises(SystemExit, match="1"),
    ):
        train_here(lines, run_dir)
    said = capsys.readouterr().err
    assert f"error: {run_dir}/summary.json could not be written: No space left on device (0 bytes free there)" in said
    (run_dir / "filler").unlink()
    train_here([f"resume={run_dir}"], run_dir.with_name("new"))
    assert read_summary(run_dir) is not None


def test_nothing_is_started_on_a_disk_that_takes_nothing(
    disk: Callable[..., Path], text_corpus: Path, shards_dir: Path, tmp_path: Path
) -> None:
    small, run_dir = disk("small", "200k"), tmp_path / "run"
    lines = tiny(text_corpus, shards_dir, "callbacks=default")
    for shards, folder in ((small / "shards", run_dir), (shards_dir, small / "run")):
        if folder != run_dir:
            fill(small)
        with pytest.raises(
            ConfigError, match=rf"{small}.* could not be written: No space left on device \(\d[\d,]* bytes"
        ):
            train_here([*lines, f"data.shards_dir={shards}"], folder)
        assert not folder.exists()
    mount("-o", "remount,size=8m", small)
    train_here([*lines, f"data.shards_dir={small / 'shards'}"], run_dir)
    assert read_summary(run_dir) is not None

    (run_dir / "summary.json").unlink()
    moved = Path(shutil.move(run_dir, small / "moved"))
    mount("-o", "remount,ro", small)
    with pytest.raises(ConfigError, match=rf"{moved}.* could not be written: Read-only file system"):
        train_here([f"resume={moved}", "budget.steps=3"], tmp_path / "new")


def program(name: str, *arguments: str, status: int) -> str:
    done = run(name, *arguments)
    said = done.stdout + done.stderr
    assert done.returncode == status, said
    assert "Traceback" not in said
    return said


@pytest.mark.slow
def test_programs_end_with_one_line(
    disk: Callable[..., Path], text_corpus: Path, shards_dir: Path, tmp_path: Path
) -> None:
    small = disk("small", "200k")
    said = program("prepare.py", "data=text", f"data.path={text_corpus}", "tokenizer=byte",
                   f"data.shards_dir={small}", status=1)  # fmt: skip
    assert "error: " in said
    assert "No space left on device (" in said
    assert str(small) in said
    mount("-o", "remount,ro", small)
    said = program("train.py", *tiny(text_corpus, shards_dir), f"hydra.run.dir={small / 'runs' / 'new'}", status=2)
    assert "Read-only file system (" in said
    sweep = [*tiny(text_corpus, shards_dir, "seed=1,2"), f"hydra.sweep.dir={small / 'sweep'}"]
    said = program("train.py", "-m", *sweep, status=2)
    assert "Read-only file system (" in said


@pytest.mark.slow
def test_a_report_says_what_the_disk_refused(
    run: Callable[..., Path], disk: Callable[..., Path], text_corpus: Path, shards_dir: Path
) -> None:
    small, runs = disk("small", "100k"), [run("seed=1"), run("seed=2"), run("seed=1", "attention=mha")]
    arguments = [f"runs={','.join(map(str, runs))}", f"hydra.run.dir={small / 'report'}"]
    said = program("compare.py", *arguments, status=1)
    assert f"{small}/report" in said
    assert "No space left on device (" in said
    mount("-o", "remount,size=8m", small)
    program("compare.py", *arguments, status=0)


@pytest.mark.slow
def test_ranks_save_together_when_one_cannot_log(
    disk: Callable[..., Path], text_corpus: Path, shards_dir: Path, tmp_path: Path
) -> None:
    run_dir = disk("disk", "3m") / "run"
    run_dir.mkdir()
    (tmp_path / "kept").mkdir()
    (run_dir / "checkpoints").symlink_to(tmp_path / "kept")
    ranks = ("trainer.devices=2", "strategy=ddp")
    said = program("train.py", *tiny(text_corpus, shards_dir, *SETTINGS, *ranks, FILLS),
                   f"hydra.run.dir={run_dir}", status=1)  # fmt: skip
    last = torch.load(tmp_path / "kept" / "last.ckpt", weights_only=True)["global_step"]
    assert last > 9
    assert f"stopped at step {last} of {STEPS}; go on with: python train.py resume={run_dir}" in said
    assert said.count("error") == 1
    (run_dir / "filler").unlink()
    program("train.py", f"resume={run_dir}", "++callbacks.fills.after=1000", "trust=[fills]", status=0)


@pytest.mark.slow
def test_a_sweep_says_what_the_disk_refused(disk: Callable[..., Path], text_corpus: Path, shards_dir: Path) -> None:
    sweep = disk("disk", "3m") / "sweep"
    lines = [*tiny(text_corpus, shards_dir, *SETTINGS, "seed=1,2", FILLS), f"hydra.sweep.dir={sweep}"]
    said = program("train.py", "-m", *lines, status=1)
    assert said.count("No space left on device (0 bytes free there)") == 3  # of both jobs, and of sweep.json
    for folder in sweep.glob("seed_*"):
        (folder / "filler").unlink(missing_ok=True)
        (folder / "filled").touch()
    mount("-o", "remount,size=30m", sweep.parent)
    program("train.py", f"resume={sweep}", FILLS, "trust=[fills]", status=0)


def test_a_read_only_folder_can_be_planned_in(disk: Callable[..., Path], tmp_path: Path) -> None:
    small, elsewhere = disk("small", "200k"), tmp_path / "tmp"
    elsewhere.mkdir()
    mount("-o", "remount,ro", small)
    for line in (["dry_run=true"], ["-m", "seed=1,2", "dry_run=true"]):
        planned = run("train.py", *line, "tokenizer=byte", cwd=small, TMPDIR=str(elsewhere))
        assert planned.returncode == 0, planned.stderr
        assert [*elsewhere.iterdir()] == []
    assert run("train.py", "budget.steps=1", cwd=small).returncode == 2
