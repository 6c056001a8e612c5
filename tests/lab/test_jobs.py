"""Jobs are known by their configuration, wherever they lie and whatever they are called."""

import copy
from pathlib import Path

import pytest
from hydra._internal.utils import get_args_parser

from thunderhead.command_line import flags_first, repeated_sweep
from thunderhead.core import config
from thunderhead.lab.jobs import arm_key, key, make_job, name_of, prepare_start, state, without_seed
from thunderhead.training.record import write_json


def test_the_key_is_of_the_configuration_alone() -> None:
    resolved = config.plain(config.compose([]))
    same = dict(reversed(resolved.items())) | {"name": "other", "resume": "folder", "dry_run": True}
    assert key(same) == key(resolved)
    for path, value in (("seed", 2), ("optimizer.eps", 1e-9), ("data.shards_dir", "elsewhere")):
        changed = copy.deepcopy(resolved)
        group, _, name = path.partition(".")
        if name:
            changed[group][name] = value
        else:
            changed[group] = value
        assert key(changed) != key(resolved), path
        assert (arm_key(changed) == arm_key(resolved)) == (path == "seed")


def test_names_and_folders(tmp_path: Path) -> None:
    choices = {"attention": "gqa", "optimizer.lr": "1e-3", "seed": "2"}
    job = make_job(choices, {"seed": 2}, tmp_path)
    assert (job.name, name_of(without_seed(choices))) == ("gqa lr=1e-3 seed=2", "gqa lr=1e-3")
    assert job.folder == tmp_path / f"attention_gqa-lr_1e-3-seed_2-{key({'seed': 2})}"
    odd = make_job({"data.path": "/a b,c=d"}, {}, tmp_path).folder.name
    assert not set(odd) & set(" ,=/'\"[]{}$")


def test_a_job_finds_the_folder_that_it_has(tmp_path: Path) -> None:
    first = make_job({"seed": "1"}, {"seed": 1}, tmp_path, "tuning")
    first.folder.mkdir(parents=True)
    assert make_job({"attention": "mha"}, {"seed": 1}, tmp_path).folder == first.folder
    assert make_job({"attention": "mha"}, {"seed": 2}, tmp_path).folder != first.folder


def test_partial_jobs_go_on(tmp_path: Path) -> None:
    job = make_job({}, {"seed": 1}, tmp_path)
    command = prepare_start(job, ("python", "train.py"))
    assert state(job.folder) == "new"
    assert command[:2] == ["python", "train.py"]
    assert not any(part.startswith("resume=") for part in command)
    (job.folder / "config.yaml").write_text("")
    (job.folder / "checkpoints").mkdir()
    (job.folder / "checkpoints" / "last.ckpt").write_text("")
    assert state(job.folder) == "partial"
    assert f"resume={job.folder}" in prepare_start(job, ("python", "train.py"))
    write_json(job.folder / "summary.json", {"steps": 1, "val_loss": 1.0})
    assert state(job.folder) == "finished"


def test_resume_repeats_a_sweeps_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "sweep"
    write_json(folder / "sweep.json", {"arguments": ["-m", "attention=mha,mqa", "seed=1,2", "hydra.sweep.dir='x'"]})
    place = f"hydra.sweep.dir={folder}"
    assert repeated_sweep(["-m", "resume=sweep"]) == ["-m", "attention=mha,mqa", "seed=1,2", place]
    assert repeated_sweep(["resume=sweep", "seed=1,2,3"]) == ["-m", "attention=mha,mqa", "seed=1,2,3", place]
    assert repeated_sweep(["resume=a_run", "x=1"]) == ["resume=a_run", "x=1"]


@pytest.mark.parametrize("typed", [["--config-dir", "b"], ["--config-dir=b"], ["-cd", "b", "seed=1,2"], []])
def test_a_sweep_of_own_options_is_repeated_in_any_order(typed: list[str], tmp_path: Path) -> None:
    """Hydra's own parser takes it: overrides on both sides of a flag are refused by it."""
    for recorded in (["-m", "x=1,2", "--config-dir=a"], ["x=1,2", "--config-dir", "a", "y=3", "-m"]):
        write_json(tmp_path / "sweep.json", {"arguments": recorded})
        both = [f"resume={tmp_path}", *typed], [*typed, "-m", f"resume={tmp_path}"]
        for arguments in both if typed else [[*each, "--config-dir", "b"] for each in both]:
            read = get_args_parser().parse_args(flags_first(repeated_sweep(arguments)))
            assert (read.multirun, read.config_dir) == (True, "b")
            assert "x=1,2" in read.overrides
            assert f"hydra.sweep.dir={tmp_path}" in read.overrides
    read = get_args_parser().parse_args(flags_first(["a=1", "--cfg", "job", "b=2", "-m", "--package", "p", "c=3"]))
    assert (read.cfg, read.package, read.overrides) == ("job", "p", ["a=1", "b=2", "c=3"])
