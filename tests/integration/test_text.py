"""Texts on their way through a shell, Hydra, YAML and other processes: real runs in folders of any name."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import awkward
from programs import run
from thunderhead.command_line import shown
from thunderhead.core.config import quoted
from thunderhead.training.record import read_summary
from tiny import tiny

PROMPT = "say: \\ \"{x}\" ${HOME} 'y', ü=1e3\n[bold]$(id)\\"


def shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a shown command as a shell reads it, with the program of this checkout."""
    python = "python() { printf '%s\\0' \"$@\"; }; "
    read = subprocess.run(["bash", "-c", python + command], cwd=folder, capture_output=True, check=True).stdout
    return run(*read.decode().removesuffix("\0").split("\0"), cwd=folder)


def overrides(text_corpus: Path, shards_dir: Path, here: Path, *more: str) -> list[str]:
    """A tiny run of five steps with texts of every kind."""
    corpus = here / "my \"texts\", [a] {b: 'c'}"
    corpus.mkdir(parents=True)
    for file in sorted(text_corpus.iterdir())[:40]:
        shutil.copy(file, corpus)
    lines = tiny(text_corpus, shards_dir, "callbacks=default", "callbacks.checkpoint.every_n_train_steps=1")
    lines = [line for line in lines if not line.startswith("data.path=")]
    return [*lines, "budget.steps=5", f"data.path={quoted(corpus)}", f"generation.prompt={quoted(PROMPT)}", *more]


def hint(done: subprocess.CompletedProcess[str]) -> str:
    """The command to go on with that a run ended with."""
    assert done.returncode == 1, done.stdout + done.stderr
    _, begin, command = (done.stdout + done.stderr).partition("go on with: ")
    assert begin, done.stdout + done.stderr
    return re.split(r"\n(?=[EW]\d{4} )", command)[0].rstrip("\n")  # torch's launcher tells of a rank that ended, too


@pytest.mark.parametrize(
    ("name", "devices", "tried"),  # of the commands that come next
    [(awkward.FOLDERS[0], 1, 1), *(pytest.param(name, 1, 5, marks=pytest.mark.slow) for name in awkward.FOLDERS)]
    + [pytest.param(name, 2, 5, marks=pytest.mark.slow) for name in awkward.FOLDERS[:2]],
)
def test_the_hint_goes_on_in_a_folder_of_any_name(
    name: str, devices: int, tried: int, text_corpus: Path, shards_dir: Path, tmp_path: Path, tell: Callable[..., None]
) -> None:
    here = tmp_path / name
    poison = "+callbacks.poison={_target_: poison.Poison, steps: [4]}"
    lines = overrides(text_corpus, shards_dir, here, f"name={quoted(name)}", f"trainer.devices={devices}", poison)
    go_on = hint(shell(shown("train.py", *lines), here))
    tell(saw=f"… go on with: {go_on}")
    (run_dir,) = (here / "logs" / "runs" / name).iterdir()
    assert read_summary(run_dir).keys() >= {"diverged"}  # type: ignore[union-attr]
    done = shell(f"{go_on} '++callbacks.poison.steps=[]'", here)  # it says trust=[poison] itself
    assert done.returncode == 0, done.stdout + done.stderr
    assert (read_summary(run_dir) or {})["steps"] == 5
    recorded = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    assert recorded["generation"]["prompt"] == PROMPT
    assert recorded["name"] == name
    assert (run_dir / "sample.txt").read_text(encoding="utf-8").startswith(PROMPT)
    next_commands = dict(
        re.findall(r"^([a-z ]+?) +(python .*?)(?=\n[a-z ]+? +python |\s*\Z)", done.stdout, re.M | re.S)
    )
    assert list(next_commands) == ["write text", "export", "train longer", "compare"]
    for what, command in [*next_commands.items()][:tried]:
        more = "'++callbacks.poison.steps=[]' " if what == "train longer" else ""
        after = shell(f"{command} {more}", here)
        assert after.returncode == 0, command + after.stdout + after.stderr
    assert (read_summary(run_dir) or {})["steps"] == (10 if "train longer" in [*next_commands][:tried] else 5)


@pytest.mark.slow
@pytest.mark.parametrize("name", awkward.FOLDERS[:2])
def test_the_hint_goes_on_with_a_sweep(name: str, text_corpus: Path, shards_dir: Path, tmp_path: Path) -> None:
    here = tmp_path / name
    crash = "+callbacks.crash={_target_: crash.Crash, after: 3}"
    lines = overrides(text_corpus, shards_dir, here, f"name={quoted(name)}", "seed=1,2", crash)
    go_on = hint(shell(shown("train.py", "-m", *lines), here))
    done = shell(f"{go_on} '+callbacks.crash={{_target_: crash.Crash, after: 1000}}'", here)
    assert done.returncode == 0, done.stdout + done.stderr
    (sweep,) = (here / "logs" / "sweeps" / name).iterdir()
    prompts = [yaml.safe_load(file.read_text())["generation"]["prompt"] for file in sweep.glob("*/config.yaml")]
    assert prompts.count(PROMPT) == len(prompts) >= 2
    jobs = json.loads((sweep / "sweep.json").read_text())["jobs"]
    assert [job["state"] for job in jobs.values()] == ["finished", "finished"]
