"""Sweeps of stand-ins for runs: matched, tuned, failing, ended and gone on with."""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra._internal.core_plugins.basic_launcher import BasicLauncher

from hydra_plugins.thunderhead_sweeps.sweepers import GridSweeper, planner
from thunderhead import command_line
from thunderhead.core import config
from thunderhead.core.config import ConfigError, read_mapping
from thunderhead.lab.analysis import analyse
from thunderhead.lab.execution import LocalExecutor, _outcome, share
from thunderhead.lab.grid import Candidate, run_grid
from thunderhead.lab.jobs import Job
from thunderhead.lab.runs import read_runs
from thunderhead.lab.statistics import compare
from thunderhead.lab.sweep import Sweep
from thunderhead.processes import SIGNALS
from thunderhead.training import record
from tiny import tiny

FAKE = (sys.executable, str(Path(__file__).with_name("fake_training.py")))
MQA = "MultiQueryAttention"


@pytest.fixture
def candidates(text_corpus: Path, shards_dir: Path) -> Callable[..., list[Candidate]]:
    """candidates("match=params", attention=[…], seed=[…]) composes the combinations."""

    def compose(*overrides: str, **values: list[str]) -> list[Candidate]:
        combinations: list[dict[str, str]] = [{}]
        for group, options in values.items():
            combinations = [c | {group: option} for c in combinations for option in options]
        found = []
        for choices in combinations:
            lines = [*overrides, *(f"{group}={option}" for group, option in choices.items())]
            found.append(Candidate(choices, config.plain(config.compose(tiny(text_corpus, shards_dir, *lines)))))
        return found

    return compose


@pytest.fixture
def grid(candidates: Callable[..., list[Candidate]], tmp_path: Path) -> Callable[..., int]:
    """grid("match=params", attention=[…], seed=[…]) runs the combinations in tmp_path/sweep; gives the exit status."""

    def run(
        *overrides: str, n_jobs: int = 2, baseline: str | None = None, max_seeds: int | None = None, **values: list[str]
    ) -> int:
        sweep = Sweep(tmp_path / "sweep", LocalExecutor(n_jobs, FAKE, imports=()), ["-m"], planner())
        return run_grid(candidates(*overrides, **values), sweep, baseline=baseline, max_seeds=max_seeds)

    return run


def starts(folder: Path, pattern: str = "*") -> dict[str, str]:
    found = sorted(folder.glob(f"{pattern}/starts.txt"))
    return {f.parent.name.rpartition("-")[0]: f.read_text().replace("\n", " ").strip() for f in found}


def test_failing_arms_do_not_stop_a_sweep_and_are_retried(
    grid: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_FAIL", "GroupedQueryAttention")
    assert grid(attention=["mla", "gqa"], seed=["1", "2"]) == 1
    said = capsys.readouterr().out
    assert said.count("a wire broke") >= 2
    assert "resume=" in said
    folder = tmp_path / "sweep"
    assert (folder / "report.html").is_file()
    assert "a wire broke" in (folder / "report.html").read_text()
    monkeypatch.delenv("FAKE_FAIL")
    assert grid(attention=["mla", "gqa"], seed=["1", "2"]) == 0
    # the failed ones were started again, the finished ones were not
    assert starts(folder) == {
        "attention_gqa-seed_1": "new new",
        "attention_gqa-seed_2": "new new",
        "attention_mla-seed_1": "new",
        "attention_mla-seed_2": "new",
    }
    assert "a wire broke" not in (folder / "report.html").read_text()
    states = {job["name"]: job["state"] for job in json.loads((folder / "sweep.json").read_text())["jobs"].values()}
    assert set(states.values()) == {"finished"}
    for part in ("config.yaml", "plan.json"):
        (file,) = folder.glob(f"attention_mla-seed_1-*/{part}")
        content = file.read_bytes()
        file.unlink()
        assert grid(attention=["mla", "gqa"], seed=["1", "2"]) == 1
        assert f"{part} of its record is gone: move {file.parent} away" in capsys.readouterr().out
        assert f"{part} of its record is gone" in (folder / "report.html").read_text()
        file.write_bytes(content)


# without SIGHUP where nohup has it ignored
@pytest.mark.parametrize("number", [SIGNALS[0], *(pytest.param(n, marks=pytest.mark.slow) for n in SIGNALS[1:])])
def test_a_sweep_ended_by_a_signal_leaves_a_report_and_goes_on(
    number: signal.Signals,
    grid: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "sweep"
    assert grid(attention=["mla"], seed=["1"]) == 0
    first = next(folder.glob("*/starts.txt")).parent  # finished before: not varied, so called by its key alone
    monkeypatch.setenv("FAKE_SLOW", "60")

    def end() -> None:
        for _ in range(200):
            if len(list(folder.glob("*/metrics.csv"))) == 2:
                break
            time.sleep(0.1)
        os.kill(os.getpid(), number)

    ender = threading.Thread(target=end)
    ender.start()
    assert grid(attention=["mla", "mqa"], seed=["1", "2"], n_jobs=1) == 128 + number
    ender.join()
    assert f"go on with: python train.py -m resume={folder}" in capsys.readouterr().out
    assert (folder / "report.html").is_file()
    partial = [f.parents[1] for f in folder.glob("*/checkpoints/last.ckpt")]
    assert len(partial) == 1
    monkeypatch.delenv("FAKE_SLOW")
    assert grid(attention=["mla", "mqa"], seed=["1", "2"]) == 0
    assert (partial[0] / "starts.txt").read_text() == "new\nresumed\n"
    assert (first / "starts.txt").read_text() == "new\n"


def test_matched_and_tuned(grid: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """lr: the default 2e-3 × 0.5 is the stand-in's optimum for one arm, and ×0.25 of 3e-2 the edge for the other."""
    values = {"optimizer": ["adamw", "adafactor"], "seed": ["1", "2"]}
    assert grid("match=flops", "tune=lr", "budget.steps=20", **values) == 0
    folder = tmp_path / "sweep"
    table = json.loads((folder / "tuning.json").read_text())
    assert table["adamw"]["best"] == {"optimizer.lr": pytest.approx(1e-3)}
    assert "at_edge" not in table["adamw"]
    assert table["adafactor"]["best"] == {"optimizer.lr": pytest.approx(7.5e-3)}
    assert table["adafactor"]["at_edge"] == ["optimizer.lr"]
    said = capsys.readouterr().out
    assert "lies on the edge" in said
    assert "Tuning on seed 0; compared are seeds 1, 2" in said
    assert "(5 trials, " in said
    # five trials an arm on a seed that is not compared
    assert len(list(folder.glob("tuning/*/summary.json"))) == 10
    assert len(list(folder.glob("*/summary.json"))) == 4
    assert len(list(folder.glob("**/match.json"))) == 4


def test_a_bad_combination_is_refused_before_anything_starts(grid: Callable[..., int], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        grid("attention=gqa", **{"attention.n_kv_heads": ["1", "3"], "seed": ["1"]})
    assert "attention.n_kv_heads=3 does not divide" in str(refused.value)
    assert "(in 3 1)" in str(refused.value)
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("overrides", "values", "message"),
    [
        (("match=params",), {"model.d_ff": ["64", "72"]}, "match=params solves for model.d_ff"),
        (("tune=lr",), {"optimizer.lr": ["0.1", "0.2"]}, "tune tries multiples of optimizer.lr"),
        ((), {"match": ["none", "params"]}, "cannot be swept over"),
    ],
)
def test_what_is_solved_for_cannot_be_swept(
    grid: Callable[..., int], overrides: tuple[str, ...], values: dict[str, list[str]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        grid(*overrides, **values)


def test_arms_are_told_apart_by_their_configurations(grid: Callable[..., int], tmp_path: Path) -> None:
    """The learning rate follows from the seed, so that two seeds are two arms; 1e-3 and 0.001 are one, trained once."""
    assert grid("optimizer.lr=${seed}", attention=["mha"], seed=["1", "2"]) == 0
    rows = (tmp_path / "sweep" / "results.csv").read_text().splitlines()
    assert [row.partition(",")[0] for row in rows[1:]] == ["mha seed=1", "mha seed=2"]
    assert grid(seed=["1"], **{"optimizer.lr": ["1e-3", "0.001"]}) == 0
    assert len((tmp_path / "sweep" / "results.csv").read_text().splitlines()) == 2


def test_combinations_that_are_the_same_run_are_told(
    grid: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert grid("dry_run=true", **{"optimizer.lr": ["1e-3", "0.001", "2e-3"]}, seed=["1"]) == 0
    assert "lr=1e-3: the same configuration as lr=0.001, and trained once" in capsys.readouterr().out


def test_an_unknown_baseline(grid: Callable[..., int]) -> None:
    with pytest.raises(ConfigError, match="no arm is called gpa: mha, gqa"):
        grid(attention=["mha", "gqa"], baseline="gpa")


def test_time_is_matched_by_measured_speeds(
    grid: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The stand-in logs 1,000 + step tokens a second at step `step`, and in its summary 1,000."""
    values = {"attention": ["mha", "mqa"], "seed": ["1", "2"]}
    assert grid("match=time", "match.steps=4", "budget.steps=50", **values) == 0
    said = capsys.readouterr().out
    assert "match=time: mqa: budget.steps=50 → 6.38 seconds for 6.38 (exact)" in said  # 50 · 128 / 1003.5
    assert "mqa: finished" in said
    assert "matched tokens, FLOPs, parameters and time (missed by +0.0 %)" in said
    folder = tmp_path / "sweep"
    assert len(starts(folder, "speed/*")) == 2
    for file in folder.glob("*/match.json"):  # measured, in place of the forecast
        assert json.loads(file.read_text())["target"] == json.loads(file.read_text())["reached"] == 6.4


def test_devices_are_shared() -> None:
    assert [share("0123", 2, slot) for slot in range(2)] == [["0", "1"], ["2", "3"]]
    assert [share("01", 3, slot) for slot in range(3)] == [["0"], ["1"], ["0"]]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_job_that_any_of_the_signals_ended_has_stopped(number: signal.Signals, tmp_path: Path) -> None:
    job = Job({}, {}, tmp_path)
    assert _outcome(job, 128 + number, pruned=False, killed=False).state == "stopped"


def test_seeds_are_added_where_it_is_open_and_as_planned(
    grid: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two arms are apart by much less than their noise, the third by a hundred times of it."""
    monkeypatch.setenv("FAKE_NOISE", "0.01")
    arms = {"optimizer.lr": ["1e-3", "1.01e-3", "3e-3"]}
    assert grid(max_seeds=5, **arms, seed=["1", "2", "3"]) == 0
    said = capsys.readouterr().out
    folders = {lr: (tmp_path / "sweep").glob(f"lr_{lr}-*") for lr in arms["optimizer.lr"]}
    seeds = {lr: {folder.name.split("seed_")[1][0] for folder in found} for lr, found in folders.items()}
    assert seeds == {"1e-3": set("1234"), "1.01e-3": set("1234"), "3e-3": set("123")}  # the fifth would hardly help
    assert "Not resolved: lr=1.01e-3, lr=1e-3; seed 4 is added, 4 of 5 at most" in said
    assert "Not resolved, and hardly to be by 5 seeds: lr=1.01e-3 − lr=1e-3" in said
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text())["looks"] == [3, 4, 5]
    page = (tmp_path / "sweep" / "report.html").read_text()
    assert "looks at 3, 4, 5 seeds were planned" in page
    assert "not resolved at 4 seeds, and hardly to be by the last look" in page

    assert grid(max_seeds=5, **arms, seed=["1", "2", "3"]) == 0  # goes the same way, and trains nothing again
    assert set(starts(tmp_path / "sweep").values()) == {"new"}
    for other in (6, None):
        with pytest.raises(ConfigError, match="looks at 3, 4, 5 seeds were planned when this sweep began"):
            grid(max_seeds=other, **arms, seed=["1", "2", "3"])


def test_intervals_are_as_wide_as_planned_looks_need(
    grid: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_NOISE", "0.01")
    losses = {"optimizer.lr": ["1e-3", "3e-3"], "seed": ["1", "2", "3"]}
    assert grid(max_seeds=8, **losses) == 0
    sweep = tmp_path / "sweep"
    runs = read_runs([sweep])
    assert len(runs) == 6  # resolved at the first look
    found = analyse(runs)
    planned = found.comparisons[0]
    (once,) = compare(found.losses, [(planned.arm, planned.against)])
    assert once.interval is not None
    assert planned.interval is not None
    assert planned.interval.low < once.interval.low < once.interval.high < planned.interval.high


@pytest.mark.parametrize(
    ("seeds", "max_seeds", "why"),
    [(["1"], 8, "adds seeds to two at least"), (["1", "2", "3"], 2, "2 is less than the 3")],
)
def test_what_cannot_be_planned_is_refused(
    grid: Callable[..., int], seeds: list[str], max_seeds: int, why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        grid(max_seeds=max_seeds, attention=["mla", "gqa"], seed=seeds)


def test_a_launcher_of_others_is_refused_in_one_line() -> None:
    sweeper = GridSweeper()
    sweeper.launcher = BasicLauncher()
    with pytest.raises(ConfigError, match=r"^hydra/launcher: BasicLauncher cannot run this sweep: [^\n]+$"):
        sweeper.begin()


def test_a_folder_of_earlier_sweeps_that_is_not_there_is_refused() -> None:
    sweeper = GridSweeper()
    sweeper.launcher = BasicLauncher()
    with pytest.raises(ConfigError) as caught:
        sweeper.begin("nowhere")
    assert [problem.path for problem in caught.value.problems] == ["hydra/launcher", "hydra.sweeper.reuse"]


def test_a_sweep_trains_what_earlier_ones_did_not(
    candidates: Callable[..., list[Candidate]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    here = {"packages": {}, "git": {"commit": "0123", "changed_files": []}}
    monkeypatch.setattr(record, "surroundings", lambda: here)
    first = Sweep(tmp_path / "sweeps" / "1", LocalExecutor(2, FAKE, imports=()), ["-m"], planner())
    assert run_grid(candidates(attention=["mha", "mqa"], seed=["1", "2"]), first) == 0
    for folder in first.folder.glob("attention_*"):
        record.write_json(folder / "environment.json", here)
    capsys.readouterr()
    second = Sweep(tmp_path / "sweeps" / "2", LocalExecutor(2, FAKE, imports=()), ["-m"], planner())
    second.reuse = tmp_path / "sweeps"
    assert run_grid(candidates(attention=["mha", "mqa", "gqa"], seed=["1", "2"]), second) == 0
    assert "4 of 6 runs were finished by earlier sweeps" in capsys.readouterr().out
    assert "4 of 6 runs were finished by earlier sweeps" in (second.folder / "report.html").read_text()
    reused = {file.parent.name.split("-")[0] for file in second.folder.glob("*/reused.json")}
    assert reused == {"attention_mha", "attention_mqa"}


def test_a_folder_has_one_sweep_and_one_process_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the one that ends last writes its report over the other's."""

    def sweep(*arguments: str) -> Sweep:
        executor = LocalExecutor(1, FAKE, imports=())
        return Sweep(tmp_path / "sweep", executor, ["-m", "hydra.sweep.dir=sweep", *arguments], planner())

    monkeypatch.setattr(command_line, "_repeated", False)
    first = sweep("seed=1,2")
    first.begin()
    with pytest.raises(ConfigError, match=r"^hydra\.sweep\.dir: .*sweep is still being run"):
        sweep("seed=1,2").begin()
    assert first.end(stopped=None) == 0
    with pytest.raises(ConfigError, match=r"^hydra\.sweep\.dir: .*holds another sweep .*resume="):
        sweep("optimizer.lr=1,2").begin()
    sweep("seed=1,2").begin()  # as after a kill: the same command again
    monkeypatch.setattr(command_line, "_repeated", True)  # resume=…, which knows what the sweep is
    sweep("seed=1,2,3").begin()


def test_arms_are_matched_by_the_vocabulary_that_preparing_finds(grid: Callable[..., int], tmp_path: Path) -> None:
    """A small corpus fills no vocabulary of 5,000: what is not there costs nothing."""
    own = ("tokenizer=bpe", "tokenizer.vocab_size=5000", f"data.shards_dir={tmp_path / 'shards'}", "budget.steps=40")
    assert grid("match=flops", *own, **{"model.d_ff": ["16", "256"]}) == 0
    plan = planner()
    for folder in (tmp_path / "sweep").glob("d_ff_*"):
        planned = plan(read_mapping(folder / "job" / "job.yaml"))
        assert planned.vocab_size < 5000
        match = read_mapping(folder / "match.json")
        assert match["reached"] == pytest.approx(planned.flops)
        assert match["reached"] == pytest.approx(match["target"], rel=0.05)
