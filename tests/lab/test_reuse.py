"""Runs of earlier sweeps are taken over, where nothing that counts is different."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from simulated import composed, write_run

from thunderhead.lab.jobs import Job, make_job, state
from thunderhead.lab.reuse import take_over
from thunderhead.lab.runs import looks_of, read_runs
from thunderhead.training import record

COMMIT = "0123456789abcdef"  # of simulated runs


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What makes runs now; to be changed."""
    environment = {"packages": {"torch": "2.13.0"}, "git": {"commit": COMMIT, "changed_files": ["?? notes.md"]}}
    monkeypatch.setattr(record, "surroundings", lambda: environment)
    return environment


def earlier(place: Path, seed: int = 1, **settings: Any) -> Path:
    """A finished run of a sweep in `place`, in the folder that the sweep gave it."""
    folder = make_job({"seed": str(seed)}, composed(()) | {"seed": seed}, place).folder
    return write_run(folder, seed=seed, loss=3 + seed / 10, **settings)


def job(place: Path, seed: int = 1, **changes: Any) -> Job:
    return make_job({"attention": "mha", "seed": str(seed)}, composed(()) | {"seed": seed} | changes, place)


def test_a_finished_run_is_copied_without_its_checkpoints(tmp_path: Path, here: dict[str, Any]) -> None:
    old = earlier(tmp_path / "sweeps" / "first")
    (old / "checkpoints").mkdir()
    (old / "checkpoints" / "last.ckpt").write_text("x")
    new, other = job(tmp_path / "sweeps" / "second"), job(tmp_path / "sweeps" / "second", seed=2)
    assert take_over([new, other], tmp_path / "sweeps") == 1
    assert state(new.folder) == "finished"
    assert state(other.folder) == "new"
    (run,), (same,) = read_runs([new.folder]), read_runs([old])
    assert run.summary == same.summary
    assert run.rows == same.rows
    assert json.loads((new.folder / "reused.json").read_bytes()) == {"from": str(old)}
    assert not (new.folder / "checkpoints").exists()
    assert (old / "checkpoints" / "last.ckpt").exists()
    assert [path.name for path in new.folder.parent.iterdir()] == [new.folder.name]
    assert take_over([new], tmp_path / "sweeps") == 0  # nor itself


@pytest.mark.parametrize(
    ("then", "now"),
    [
        ({}, {"git": {"commit": "fedcba", "changed_files": []}}),
        ({}, {"git": {"commit": COMMIT, "changed_files": [" M src/thunderhead/core/run.py"]}}),
        ({}, {"git": None}),
        ({}, {"packages": {"torch": "2.14.0"}}),
        ({"changed_files": [" M conf/train.yaml"]}, {}),
        ({"steps": 50}, {}),  # it was stopped
    ],
)
def test_what_is_not_surely_the_same_is_trained(
    then: dict[str, Any], now: dict[str, Any], tmp_path: Path, here: dict[str, Any]
) -> None:
    earlier(tmp_path / "first", **then)
    here |= now
    assert take_over([job(tmp_path / "second")], tmp_path / "first") == 0
    assert not (tmp_path / "second").exists()


def test_another_configuration_and_damage_are_trained(tmp_path: Path, here: dict[str, Any]) -> None:
    old = earlier(tmp_path / "first")
    assert take_over([job(tmp_path / "second", dropout={"p": 0.5})], tmp_path / "first") == 0
    (old / "environment.json").write_text("{")
    assert take_over([job(tmp_path / "second")], tmp_path / "first") == 0


def test_what_was_matched_stays_and_looks_are_kept_in_mind(tmp_path: Path, here: dict[str, Any]) -> None:
    old = earlier(tmp_path / "first", match={"by": "flops", "target": 1, "reached": 1, "set": {}})
    record.write_json(old / "looks.json", {"looks": [2, 3]})
    new = job(tmp_path / "second")
    record.write_json(new.folder / "match.json", {"by": "time", "target": 9, "reached": 8, "set": {}})
    assert take_over([new], tmp_path / "first", looks=[4]) == 1
    (run,) = read_runs([new.folder])
    assert run.match is not None
    assert (run.match.by, run.match.target) == ("time", 9)
    assert looks_of([new.folder]) == {2, 3, 4}
    shutil.rmtree(new.folder)
    assert take_over([new], tmp_path / "first") == 1
    assert not (new.folder / "match.json").exists()  # that of the earlier sweep says nothing here
