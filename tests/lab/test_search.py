"""Optuna: what Hydra's sweeps become, and a search over stand-ins for runs."""

import functools
import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from hydra_plugins.thunderhead_sweeps.sweepers import planner
from thunderhead.core import config
from thunderhead.core.config import ConfigError
from thunderhead.lab.execution import LocalExecutor
from thunderhead.lab.search import reports, run_search, space_of
from thunderhead.lab.sweep import Sweep
from thunderhead.processes import Stopped
from tiny import tiny

FAKE = (sys.executable, str(Path(__file__).with_name("fake_training.py")))
LR = "optimizer.lr=tag(log,interval(1e-4,1e-2))"
Search = Callable[..., int]


def parsed(*lines: str):
    return OverridesParser.create().parse_overrides(list(lines))


def trials(folder: Path) -> list[optuna.trial.FrozenTrial]:
    """Of the one study there, as a dashboard reads it; without those that were made again."""
    storage = JournalStorage(JournalFileBackend(str(folder / "study.log")))
    found = optuna.load_study(study_name=None, storage=storage).trials
    again = {trial.user_attrs.get("again") for trial in found}
    return [trial for trial in found if trial.number not in again]


def with_value(resolved: config.Config, line: str) -> config.Config:
    path, _, value = line.partition("=")
    return config.set_value(resolved, path, float(value))


@pytest.fixture(scope="module")
def composed() -> dict[tuple[str, ...], config.Config]:
    """What was composed already, for the time that it takes."""
    return {}


@pytest.fixture
def search(
    text_corpus: Path, shards_dir: Path, tmp_path: Path, composed: dict[tuple[str, ...], config.Config]
) -> Search:
    """A search in `sweep` of the test's folder, without its report unless a `page` is asked for."""

    def run(
        n_trials: int,
        *lines: str,
        folder: str = "sweep",
        program: tuple[str, ...] = FAKE,
        page: bool = False,
        **settings: Any,
    ) -> int:
        space, fixed = space_of(parsed(*(lines or (LR,))))
        settings = {
            **{"n_jobs": 1, "seed": 1, "pruner": "none", "n_startup_trials": 3},
            **{"objective": "val_loss", "direction": "minimize"},
            **settings,
        }

        def compose(overrides):
            values = [o for o in overrides if o.startswith("optimizer.lr=")]
            rest = tuple(tiny(text_corpus, shards_dir, *(o for o in overrides if o not in values)))
            if rest not in composed:
                composed[rest] = config.plain(config.compose(rest))
            return functools.reduce(with_value, values, composed[rest])

        sweep = Sweep(tmp_path / folder, LocalExecutor(settings["n_jobs"], program, imports=()), ["-m"], planner())
        if not page:  # its figures take longer than the search
            sweep.report = lambda folder, *_, **__: folder
        return run_search(space, fixed, compose, sweep, n_trials=n_trials, **settings)

    return run


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


def test_a_search_finds_the_optimum_and_goes_on(
    search: Search, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also over the line that a crash left behind; the same trials as without a stop; the best one as a command."""
    assert search(2, LR, "name=its") == 0
    with (tmp_path / "sweep" / "study.log").open("a") as journal:
        journal.write('{"op_code":4,"worker')
    capsys.readouterr()
    assert search(5, LR, "name=its") == 0
    told = trials(tmp_path / "sweep")
    assert len(told) == len(list((tmp_path / "sweep").glob("*/starts.txt"))) == 5  # the first two were not run again
    best = min(told, key=lambda trial: trial.value)
    assert 0.5e-3 < best.params["optimizer.lr"] < 2e-3
    (command,) = re.findall(r"by itself: python train.py (.*)", capsys.readouterr().out)
    assert shlex.split(command) == ["name=its", f"optimizer.lr={best.params['optimizer.lr']:.6g}"]
    assert len(json.loads((tmp_path / "sweep" / "sweep.json").read_text())["jobs"]) == 5
    assert search(5, LR, folder="at_once") == 0
    assert [trial.params for trial in trials(tmp_path / "at_once")] == [trial.params for trial in told]


def test_a_trial_that_was_stopped_or_failed_is_made_again(
    search: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third of five is stopped, the fourth fails at first; what is drawn is as if nothing had happened."""
    run = Sweep.run

    def stopping(sweep: Sweep, *arguments: Any) -> None:
        if len(trials(sweep.folder)) == 3:
            raise Stopped(2)
        run(sweep, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Sweep, "run", stopping)
        assert search(5) == 130
    assert search(3) == 0
    assert search(4, program=(sys.executable, "-c", "raise SystemExit('no wire')")) == 1
    assert search(5) == 0
    assert search(5, folder="at_once") == 0
    assert [(t.params, t.value) for t in trials(tmp_path / "sweep")] == [
        (t.params, t.value) for t in trials(tmp_path / "at_once")
    ]


def test_a_trial_above_the_median_is_ended_and_told(
    search: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two trials finish; of the later ones those that are worse at their first validation never see their second."""
    monkeypatch.setenv("FAKE_SLOW", "1.5")

    def states() -> list[str]:
        assert search(5, pruner="median", n_startup_trials=2, seed=3, page=True) == 0
        return [trial.state.name for trial in trials(tmp_path / "sweep")]

    study = states()
    assert study[:2] == ["COMPLETE", "COMPLETE"]
    n_pruned = study.count("PRUNED")
    assert n_pruned
    jobs = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["jobs"]
    folders = [tmp_path / "sweep" / folder for folder, job in jobs.items() if job["state"] == "pruned"]
    assert len(folders) == n_pruned
    for folder in folders:
        assert not (folder / "summary.json").exists()
        assert max(reports(folder, "val_loss")) == 1
    # a second start knows them, and starts none again
    before = {file: file.read_text() for file in (tmp_path / "sweep").glob("*/starts.txt")}
    assert states() == study
    assert {file: file.read_text() for file in (tmp_path / "sweep").glob("*/starts.txt")} == before
    page = (tmp_path / "sweep" / "report.html").read_text()
    assert page.count("pruned at step 1 of 2: worse than the median") == n_pruned


def test_a_combination_that_is_refused_is_a_failed_trial(
    search: Search, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A space cannot be checked before the search as a grid can; three heads do not fit a width of 32."""

    def heads(folder: str, seed: int) -> int:
        return search(4, "model.n_heads=2,3", folder=folder, seed=seed, n_startup_trials=4, page=True)

    assert heads("later", seed=2) == 1
    states = {(trial.params["model.n_heads"], trial.state.name) for trial in trials(tmp_path / "later")}
    assert states == {("2", "COMPLETE"), ("3", "FAIL")}
    assert "refused: model.n_heads" in capsys.readouterr().out
    assert "refused: model.n_heads" in (tmp_path / "later" / "report.html").read_text()
    with pytest.raises(ConfigError, match="n_heads=3"):
        heads("first", seed=0)
    assert not (tmp_path / "first").exists()


def test_another_objective(search: Search, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the same folder, another study: the runs that both have are not made again."""
    assert search(3, LR, objective="perplexity", direction="maximize") == 0
    most = max(trials(tmp_path / "sweep"), key=lambda trial: trial.value)
    assert f"best: trial {most.number}, perplexity {most.value:.6g}" in capsys.readouterr().out
    assert search(3, LR, objective="val/loss") == 0
    assert len(list((tmp_path / "sweep").glob("*/starts.txt"))) == 3


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ("val_los", "did you mean val_loss"),
        ("throughput", "tokens_per_second"),
        ("val/loss/txt", "did you mean val/loss/text"),
    ],
)
def test_an_objective_that_nothing_measures_is_refused(
    search: Search, tmp_path: Path, objective: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        search(3, objective=objective)
    assert not (tmp_path / "sweep").exists()


def test_what_acts_on_a_grid_is_refused_and_a_dry_run_says_what_would_run(
    search: Search, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="match: acts on a grid"):
        search(3, LR, "match=params")
    assert search(3, LR, "dry_run=true") == 0
    assert "3 trials for val_loss (minimize); trial=0 lr=" in capsys.readouterr().out
    assert not (tmp_path / "sweep").exists()


def test_a_damaged_study_is_told(search: Search, tmp_path: Path) -> None:
    assert search(2) == 0
    journal = tmp_path / "sweep" / "study.log"
    whole = journal.read_text()
    damages = [
        whole.replace('{"op_code":4', '{"op_cod', 1),
        whole.replace('{"op_code":4', '{"op_code":99', 1),
        re.sub(r'"values":\[[^]]*\]', '"values":["a"]', whole, count=1),
    ]
    for damaged in damages:
        assert damaged != whole
        journal.write_text(damaged)
        with pytest.raises(ConfigError, match=r"study.log is damaged .*delete it"):
            search(3)
    journal.unlink()
    assert search(3) == 0
    assert len(list((tmp_path / "sweep").glob("*/starts.txt"))) == 3
