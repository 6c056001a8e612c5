"""Nothing of a run's record holds what came from the environment; who goes on with the run needs the variable again."""

from collections.abc import Callable
from pathlib import Path

import pytest

from programs import run
from thunderhead.core.config import read_mapping
from tiny import tiny

SECRET = "s3cr3t-t0k3n"
TYPED = (
    "generation.prompt='${oc.env:THUNDERHEAD_TOKEN} and'",
    "+logger.mlflow={_target_: lightning.pytorch.loggers.CSVLogger, name: '${oc.env:THUNDERHEAD_TOKEN}'}",
)


def holding(folder: Path) -> list[str]:
    """The files and folders whose content or name holds the secret."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [str(path) for path in files if SECRET.encode() in path.read_bytes()]


def test_a_record_holds_no_secrets(
    text_corpus: Path, shards_dir: Path, tmp_path: Path, tell: Callable[..., None]
) -> None:
    run_dir = tmp_path / "run"
    lines = tiny(text_corpus, shards_dir, "callbacks=default", "logger=default", *TYPED, f"hydra.run.dir={run_dir}")
    first = run("train.py", *lines, THUNDERHEAD_TOKEN=SECRET)
    assert first.returncode == 0, first.stdout + first.stderr
    assert holding(run_dir) == []
    assert read_mapping(run_dir / "config.yaml")["generation"]["prompt"] == "${oc.env:THUNDERHEAD_TOKEN} and"

    more = (f"resume={run_dir}", "budget.steps=3")
    refused = run("train.py", *more, THUNDERHEAD_TOKEN=SECRET)
    assert refused.returncode == 2, refused.stdout + refused.stderr
    reads = "generation.prompt reads the environment variable THUNDERHEAD_TOKEN"
    (said,) = (line for line in refused.stderr.splitlines() if reads in line)
    tell(saw=said)
    unset = run("train.py", *more, "trust=[THUNDERHEAD_TOKEN]")
    assert unset.returncode == 2, unset.stdout + unset.stderr
    assert "'THUNDERHEAD_TOKEN' not found" in unset.stderr
    for allowed in (("trust=[THUNDERHEAD_TOKEN]",), (*TYPED, "budget.steps=4")):
        again = run("train.py", *more, *allowed, THUNDERHEAD_TOKEN=SECRET)
        assert again.returncode == 0, again.stdout + again.stderr
        assert holding(run_dir) == []
    assert read_mapping(run_dir / "summary.json")["steps"] == 4


@pytest.mark.slow
def test_a_sweep_holds_no_secrets(text_corpus: Path, shards_dir: Path, tmp_path: Path) -> None:
    """Of runs on two devices each, which are started from files of their own."""
    sweep = tmp_path / "sweep"
    lines = tiny(text_corpus, shards_dir, "callbacks=default", "trainer.devices=2", *TYPED)
    swept = run("train.py", "-m", "seed=1,2", f"hydra.sweep.dir={sweep}", *lines, THUNDERHEAD_TOKEN=SECRET)
    assert swept.returncode == 0, swept.stdout + swept.stderr
    assert len([*sweep.glob("*/summary.json")]) == 2
    assert holding(sweep) == []
    told = run("compare.py", f"runs=[{sweep}]", f"hydra.run.dir={tmp_path / 'report'}", THUNDERHEAD_TOKEN=SECRET)
    assert told.returncode == 0, told.stdout + told.stderr
    assert holding(tmp_path / "report") == []


def test_a_value_may_be_a_word_like_any_other(text_corpus: Path, tmp_path: Path) -> None:
    """Of class paths, names in records and the vocabulary: programs read these."""
    run_dir, words = tmp_path / "run", {"A": "thunderhead", "B": "val_loss", "C": "sentence"}
    lines = tiny(text_corpus, tmp_path / "shards", "callbacks=default", f"hydra.run.dir={run_dir}")
    prompt = "generation.prompt='" + " ".join(f"${{oc.env:{name}}}" for name in words) + "'"
    trained = run("train.py", *lines, prompt, **words)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert read_mapping(run_dir / "config.yaml")["model"]["_target_"].startswith("thunderhead.")
    assert "val_loss" in read_mapping(run_dir / "summary.json")
    assert "${" not in (run_dir / "tokenizer.json").read_text()
    assert (run_dir / "sample.txt").read_text().startswith(" ".join(f"${{oc.env:{name}}}" for name in words))
    again = run("train.py", f"resume={run_dir}", "budget.steps=3", "trust=[A,B,C]", **words)
    assert again.returncode == 0, again.stdout + again.stderr
