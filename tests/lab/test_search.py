"""Optuna: what Hydra's sweeps become, and a search over stand-ins for runs."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from hydra_plugins.thunderhead_sweeps.sweepers import planner
from thunderhead.core import config
from thunderhead.core.config import ConfigError
from thunderhead.lab.execution import LocalExecutor
from thunderhead.lab.search import reports, run_search, space_of
from thunderhead.lab.sweep import Sweep
from tiny import tiny

FAKE = (sys.executable, str(Path(__file__).with_name("fake_training.py")))


def parsed(*lines: str):
    return OverridesParser.create().parse_overrides(list(lines))


def test_sweeps_become_distributions() -> None:
    space, fixed = space_of(
        parsed("attention=mha,gqa", "a=range(1,8,2)", "b=interval(0.0,1.0)", "c=tag(log,interval(1e-4,1e-2))", "d=3")
    )
    assert space == {
        "attention": CategoricalDistribution(["mha", "gqa"]),
        "a": IntDistribution(1, 7, step=2),
        "b": FloatDistribution(0.0, 1.0),
        "c": FloatDistribution(1e-4, 1e-2, log=True),
    }
    assert fixed == ["d=3"]
    with pytest.raises(ConfigError, match="nothing to search"):
        space_of(parsed("d=3"))


def test_a_search_finds_the_optimum_and_goes_on(text_corpus: Path, shards_dir: Path, tmp_path: Path) -> None:
    space, _ = space_of(parsed("optimizer.lr=tag(log,interval(1e-4,1e-2))"))

    def search(n_trials: int) -> int:
        return run_search(
            space, [], lambda lines: config.plain(config.compose(tiny(text_corpus, shards_dir, *lines))),
            Sweep(tmp_path / "sweep", LocalExecutor(1, FAKE, imports=()), [], planner()), n_jobs=1, n_trials=n_trials,
            seed=1, pruner="none", n_startup_trials=3,
        )  # fmt: skip

    assert search(4) == 0
    assert search(7) == 0
    study = json.loads((tmp_path / "sweep" / "study.json").read_text())["trials"]
    assert len(study) == 7
    assert len(list((tmp_path / "sweep").glob("*/starts.txt"))) == 7  # the first four were found, not run again
    best = min(study, key=lambda trial: trial["val_loss"])
    assert 0.5e-3 < best["params"]["optimizer.lr"] < 2e-3


def test_a_trial_above_the_median_is_ended_and_told(
    text_corpus: Path, shards_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two trials finish; of the later ones those that are worse at their first validation never see their second."""
    monkeypatch.setenv("FAKE_SLOW", "1.5")
    space, _ = space_of(parsed("optimizer.lr=tag(log,interval(1e-4,1e-2))"))

    def search(n_trials: int) -> list[dict[str, Any]]:
        status = run_search(
            space, [], lambda lines: config.plain(config.compose(tiny(text_corpus, shards_dir, *lines))),
            Sweep(tmp_path / "sweep", LocalExecutor(1, FAKE, imports=()), [], planner()), n_jobs=1, n_trials=n_trials,
            seed=3, pruner="median", n_startup_trials=2,
        )  # fmt: skip
        assert status == 0
        study: list[dict[str, Any]] = json.loads((tmp_path / "sweep" / "study.json").read_text())["trials"]
        return study

    study = search(5)
    assert [trial["state"] for trial in study[:2]] == ["complete", "complete"]
    pruned = [trial for trial in study if trial["state"] == "pruned"]
    assert pruned
    states = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["jobs"]
    folders = [tmp_path / "sweep" / folder for folder, job in states.items() if job["state"] == "pruned"]
    assert len(folders) == len(pruned)
    for folder in folders:
        assert not (folder / "summary.json").exists()
        assert max(reports(folder)) == 1
    page = (tmp_path / "sweep" / "report.html").read_text()
    assert page.count("pruned at step 1 of 2: its validation loss was above the median") == len(pruned)
    # a second start knows them by what they logged, and starts none again
    before = {file: file.read_text() for file in (tmp_path / "sweep").glob("*/starts.txt")}
    assert search(5) == study
    assert {file: file.read_text() for file in (tmp_path / "sweep").glob("*/starts.txt")} == before


def test_a_combination_that_is_refused_is_a_failed_trial(
    text_corpus: Path, shards_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A space cannot be checked before the search as a grid can; three heads do not fit a width of 32."""
    space, _ = space_of(parsed("model.n_heads=2,3"))

    def search(folder: Path, seed: int) -> int:
        return run_search(
            space, [], lambda lines: config.plain(config.compose(tiny(text_corpus, shards_dir, *lines))),
            Sweep(folder, LocalExecutor(1, FAKE, imports=()), [], planner()), n_jobs=1, n_trials=4, seed=seed,
            pruner="none", n_startup_trials=4,
        )  # fmt: skip

    assert search(tmp_path / "later", seed=2) == 1
    trials = json.loads((tmp_path / "later" / "study.json").read_text())["trials"]
    states = {(trial["params"]["model.n_heads"], trial["state"]) for trial in trials}
    assert states == {("2", "complete"), ("3", "fail")}
    assert "refused: model.n_heads" in capsys.readouterr().out
    assert "refused: model.n_heads" in (tmp_path / "later" / "report.html").read_text()
    with pytest.raises(ConfigError, match="n_heads=3"):
        search(tmp_path / "first", seed=0)
    assert not (tmp_path / "first").exists()
