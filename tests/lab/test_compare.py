"""`python compare.py` from outside: a report, or one clear refusal."""

import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from simulated import write_arms, write_run

from programs import run
from thunderhead import command_line
from thunderhead.core import config
from thunderhead.core.config import ConfigError
from thunderhead.lab.compare import compare_runs
from thunderhead.scaling_law import Law, read_law

compare = functools.partial(run, "compare.py")


def test_runs_of_several_sweeps(tmp_path: Path) -> None:
    write_arms(tmp_path / "a", {"attention=mha": [3.0, 3.1, 3.2]})
    write_arms(tmp_path / "b", {"attention=mqa": [3.05, 3.16, 3.25]})
    folders = f"runs={tmp_path / 'a'},{tmp_path / 'b'}"
    finished = compare(folders, "baseline=mqa", f"hydra.run.dir={tmp_path / 'out'}")
    assert finished.returncode == 0, finished.stderr
    assert "mha − mqa = −0.053 nats (95 % CI −0.068 … −0.039, 3 seeds" in finished.stdout
    assert {"report.html", "results.csv", "figures", "hparams"} <= {file.name for file in (tmp_path / "out").iterdir()}


@pytest.fixture
def compare_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """The same in this process; the report goes to tmp_path/out."""

    def call(*arguments: str) -> Path:
        (tmp_path / "out").mkdir(exist_ok=True)
        monkeypatch.setattr(command_line, "output_dir", lambda: tmp_path / "out")
        return compare_runs(config.compose(command_line.commas_to_list(list(arguments)), "compare"))

    return call


def test_runs_none_of_which_can_be_read_are_refused(compare_here: Callable[..., Path], tmp_path: Path) -> None:
    write_arms(tmp_path / "a", {"attention=mha": [3.0, 3.1]})
    for file in (tmp_path / "a").rglob("plan.json"):
        file.write_text("{")
    with pytest.raises(ConfigError, match=r"plan\.json is damaged") as refused:
        compare_here(f"runs={tmp_path / 'a'}")
    assert len(refused.value.problems) == 2
    assert not (tmp_path / "out").exists()


def test_what_a_sweep_planned_holds_for_its_folder_ever_after(
    compare_here: Callable[..., Path], tmp_path: Path
) -> None:
    write_arms(tmp_path / "a", {"attention=mha": [3.0, 3.1, 3.2], "attention=mqa": [3.05, 3.16, 3.25]})
    (tmp_path / "a" / "sweep.json").write_text(json.dumps({"arguments": [], "looks": [2, 3, 4]}))
    runs_alone = ",".join(str(file.parent) for file in (tmp_path / "a").rglob("plan.json"))
    for runs in (tmp_path / "a", tmp_path, runs_alone):  # the sweep, a folder above it, and its runs one by one
        assert "looks at 2, 3, 4 seeds were planned" in compare_here(f"runs={runs}").read_text()
    (tmp_path / "a" / "sweep.json").write_text(json.dumps({"arguments": [], "looks": [2]}))
    with pytest.raises(ConfigError, match="there are 3 seeds, but no look was planned at more than 2"):
        compare_here(f"runs={tmp_path / 'a'}")
    for damaged in ('{"looks": "three"}', '{"looks": [2, "3"]}', "[]", "{"):
        (tmp_path / "a" / "sweep.json").write_text(damaged)
        with pytest.raises(ConfigError, match=r"runs: .*sweep\.json is damaged"):
            compare_here(f"runs={tmp_path / 'a'}")


def test_a_scaling_law_of_finished_runs(
    tmp_path: Path, compare_here: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Sizes and budgets of their own choice; the largest run is held out."""
    for index, (n, tokens) in enumerate(itertools.product((1e4, 3e4, 1e5, 3e5), (1e6, 4e6, 2e7))):
        results = {"tokens": tokens, "flops": 6 * n * tokens, "val_loss": 1 + 20 / n**0.3 + 50 / tokens**0.3}
        write_run(tmp_path / "runs" / str(index), summary=results, plan={"parameters": {"total": n}})
    runs = f"runs={tmp_path / 'runs'}"
    compare_here(runs, "scaling=total", "fit_up_to=2e13")
    assert "The held-out run of 300 k parameters on 20 M tokens" in capsys.readouterr().out
    law = read_law(tmp_path / "out" / "law.json")  # what budgets read is what was fitted
    assert (law.E, law.alpha, law.beta, law.flops_coefficient) == pytest.approx((1, 0.3, 0.3, 6), rel=0.01)
    fitted = Law(**json.loads((tmp_path / "out" / "law.json").read_text())["law"])
    assert tuple(law.optimum(1e14))[:2] == tuple(fitted.optimum(1e14))[:2]
    for wrong, path in (
        (("scaling=total", "baseline=mha"), "baseline"),
        (("scaling=total", "metric=val_loss"), "metric"),
        (("fit_up_to=2e13",), "fit_up_to"),
    ):
        with pytest.raises(ConfigError, match=f"^{path}: "):
            compare_here(runs, *wrong)


def test_a_broken_run_does_not_stop_the_comparison(
    tmp_path: Path, compare_here: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    write_arms(tmp_path / "a", {"attention=mha": [3.0, 3.1], "attention=mqa": [3.1, 3.3]})
    (tmp_path / "a" / "1" / "metrics.csv").write_text("")
    assert compare_here(f"runs={tmp_path / 'a'}").is_file()
    assert f"not compared: {tmp_path / 'a' / '1'}: cannot be read: metrics.csv" in capsys.readouterr().out


def test_a_refusal_leaves_nothing(tmp_path: Path) -> None:
    write_arms(tmp_path / "a", {"attention=mha": [3.0], "attention=mqa": [3.1]})
    refused = compare(f"runs={tmp_path / 'a'}", "baseline=mla", f"hydra.run.dir={tmp_path / 'out'}")
    assert refused.returncode == 2
    assert "baseline no arm is called 'mla'" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("runs", ["runs=", "runs=[]", "runs=''"])
def test_no_runs_are_a_refusal(runs: str, compare_here: Callable[..., Path]) -> None:
    """As of an unset variable of the shell."""
    with pytest.raises(ConfigError, match=r"runs: give the folders"):
        compare_here(runs)


def test_damaged_losses_of_documents_cost_only_their_interval(
    tmp_path: Path, compare_here: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    write_arms(tmp_path / "a", {"attention=mha": [3.0, 3.1], "attention=mqa": [3.1, 3.3]})
    (tmp_path / "a" / "1" / "document_losses.json").write_text('{"steps": 100, "sour')
    assert "document_losses.json is damaged" in compare_here(f"runs={tmp_path / 'a'}").read_text()
    assert "mqa − mha = +0.1" in capsys.readouterr().out
