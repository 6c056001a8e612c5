"""IsoFLOP grids of stand-ins whose losses follow a known law: what is run, left out, held out, found and refused."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from hydra_plugins.thunderhead_sweeps.sweepers import planner
from thunderhead.core import config
from thunderhead.core.config import ConfigError
from thunderhead.disk import write_text
from thunderhead.lab.execution import Running
from thunderhead.lab.isoflop import HeldOut, Settings, read_settings, run_isoflop
from thunderhead.lab.jobs import Job
from thunderhead.lab.sweep import Sweep
from thunderhead.scaling_law import read_law
from thunderhead.training.record import write_json
from tiny import tiny

E, A, B, ALPHA, BETA = 1.5, 40.0, 60.0, 0.45, 0.35
SIZES = {f"d{d}": {"model.d_model": d, "model.n_heads": 1} for d in (8, 12, 16, 24, 32)}
BUDGETS = [1e9, 2e9, 4e9]
PLAN = planner()  # which plans each configuration once
SEEDS = 0.001
"""What each seed adds to the loss."""


class Ended:
    """A job that is over."""

    def __init__(self, status: int):
        self.status = status

    def poll(self) -> int:
        return self.status

    def stop(self) -> None: ...
    def kill(self) -> None: ...


class LawExecutor:
    """Writes the record of a run whose loss is the law's, without training."""

    def __init__(self, fails: str = "none of them"):
        self.fails = fails
        self.started: list[Job] = []

    def free(self) -> int:
        return 1

    def start(self, jobs: Sequence[Job]) -> list[Running]:
        return [self._start(job) for job in jobs]

    def loss(self, job: Job, n: float, tokens: float) -> float:
        return E + A / n**ALPHA + B / tokens**BETA + SEEDS * float(job.config["seed"])

    def _start(self, job: Job) -> Ended:
        self.started.append(job)
        job.folder.mkdir(parents=True)
        if self.fails in job.name:
            (job.folder / "log.txt").write_text("a wire broke\n")
            return Ended(1)
        plan = PLAN(job.config)
        n, tokens = plan.parameters["total"], plan.tokens
        loss = self.loss(job, n, tokens)
        write_text(job.folder / "config.yaml", config.to_yaml(job.config))
        write_json(job.folder / "plan.json", plan._asdict())
        results = {"val_loss": loss, "tokens": tokens, "flops": plan.flops, "steps": plan.steps, "seconds": 1.0}
        write_json(job.folder / "summary.json", results | {"validation_data": "x", "validation_text": "x"})
        return Ended(0)


@pytest.fixture
def lines(text_corpus: Path, shards_dir: Path) -> list[str]:
    return tiny(text_corpus, shards_dir, "attention=mha", "budget=flops", "batch.global_tokens=64")


def run(lines: Sequence[str], folder: Path, executor: LawExecutor, **changes: Any) -> int:
    given = {"sizes": SIZES, "budgets": BUDGETS, "held_out": HeldOut("d32", 1.6e10), "min_steps": 80, "count": "total"}
    asked: dict[str, Any] = {"overrides": [], "seeds": []}
    return run_isoflop(
        Settings(**given | {name: value for name, value in changes.items() if name in given}),
        Sweep(folder, executor, ["-m"], PLAN),
        **asked | {name: value for name, value in changes.items() if name in asked},
        compose=lambda more: config.plain(config.compose([*lines, *more])),
    )


def test_a_grid_finds_the_law_and_predicts_the_held_out_run(
    lines: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    executor = LawExecutor()
    assert run(lines, tmp_path, executor) == 0
    said = capsys.readouterr().out
    names = [job.name for job in executor.started]
    # the largest size has too few steps of the smallest budget, which is told; the held-out run comes last
    assert "Left out, with fewer than min_steps=80 optimizer steps: d32 at 1e+09 FLOPs (62 steps)." in said
    assert len(names) == len(SIZES) * len(BUDGETS) - 1 + 1
    assert "d32 flops=1e+09" not in names
    assert names[-1] == "d32 flops=1.6e+10"

    for job in executor.started:
        plan = PLAN(job.config)
        budget = float(job.choices["budget.flops"])
        assert budget - plan.flops_per_token * plan.tokens_per_step < plan.flops <= budget

    # said before the held-out run is trained
    before, after = said.index("losses are predicted by the form sum"), said.index("Predicted for d32 flops=1.6e+10: ")
    assert before < after < said.index("Scaling law")

    # and the same again where it is known by then
    told = [line for line in said.splitlines() if "predicted by the form" in line or line.startswith("Predicted for")]
    run(lines, tmp_path, LawExecutor())
    assert set(told) <= set(capsys.readouterr().out.splitlines())

    law = read_law(tmp_path / "law.json")
    # all runs are of seed 1
    assert (law.E, law.alpha, law.beta) == pytest.approx((E + SEEDS, ALPHA, BETA), rel=0.05)
    assert law.flops[1] < 1.1 * max(BUDGETS)  # the held-out run was not fitted
    content = json.loads((tmp_path / "law.json").read_text())
    (held_out,) = content["held_out"]
    assert held_out["flops"] == pytest.approx(1.6e10, rel=0.05)
    assert abs(held_out["error"]) < 1e-3
    assert len(content["fitted"]) == len(names) - 1
    with (tmp_path / "results.csv").open() as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert [row["held_out"] for row in rows.values()].count("True") == 1
    page = (tmp_path / "report.html").read_text()
    assert "Left out, with fewer than min_steps=80" in page
    assert "The held-out run of" in page
    assert "The held-out run of" in said


def test_seeds_and_a_failed_run(lines: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    executor = LawExecutor(fails="d12 flops=2e+09 seed=2")
    sizes = {name: SIZES[name] for name in ("d8", "d12", "d16")}
    changes = {"sizes": sizes, "budgets": BUDGETS[:2], "held_out": None, "seeds": ["1", "2"]}
    assert run(lines, tmp_path, executor, **changes) == 1
    said = capsys.readouterr().out
    assert len(executor.started) == 3 * 2 * 2
    assert "not fitted: d12 flops=2e+09 seed=2: exit status 1: a wire broke" in said
    assert f"-m resume={tmp_path}" in said
    content = json.loads((tmp_path / "law.json").read_text())
    assert len(content["fitted"]) == len(executor.started) - 1
    assert content["held_out"] == []
    assert {point["name"].rpartition("-")[0] for point in content["fitted"]} >= {"size_d12-flops_2e_09-seed_1"}


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"sizes": dict(list(SIZES.items())[:2]), "held_out": None}, ["sizes: a law needs at least 3 sizes, not 2"]),
        ({"budgets": [1e9, 1e9]}, ["budgets: a law needs at least 2 budgets, not 1"]),
        (
            {"held_out": HeldOut("d33", 2e9)},
            ["'d33' is no size: d8, d12, d16, d24, d32", "2e+09 must be above the largest budget, 4e+09"],
        ),
        (
            {"overrides": ["model.d_model=64", "budget.flops=1e9", "match=params", "budget=steps"]},
            [
                "model.d_model: is set by hydra.sweeper.sizes",
                "budget.flops: is set by hydra.sweeper.budgets",
                "match: would undo the grid",
                "an IsoFLOP grid needs budget=flops",
            ],
        ),
    ],
)
def test_what_cannot_give_a_law_is_refused_at_once(
    lines: list[str], tmp_path: Path, changes: dict[str, Any], messages: list[str]
) -> None:
    executor = LawExecutor()
    with pytest.raises(ConfigError) as refused:
        run(lines, tmp_path / "sweep", executor, **changes)
    for message in messages:
        assert message in str(refused.value)
    assert executor.started == []
    assert not (tmp_path / "sweep").exists()


def test_a_size_that_cannot_be_built_is_refused(lines: list[str], tmp_path: Path) -> None:
    sizes = SIZES | {"d30": {"model.d_model": 30, "model.n_heads": 4}}
    with pytest.raises(ConfigError, match="n_heads=4"):
        run(lines, tmp_path / "sweep", LawExecutor(), sizes=sizes)


def test_the_sweepers_settings_are_checked() -> None:
    good: dict[str, Any] = {"sizes": SIZES, "budgets": BUDGETS, "min_steps": 50, "count": "total"}
    assert read_settings(good | {"held_out": {"size": "d32", "flops": 1e10}}).held_out == HeldOut("d32", 1e10)
    assert read_settings(good | {"held_out": None}).held_out is None
    with pytest.raises(ConfigError) as refused:
        read_settings(good | {"held_out": {"size": "d32"}, "budgets": [-1.0], "count": "some"})
    for path in ("hydra.sweeper.held_out", "hydra.sweeper.budgets", "hydra.sweeper.count"):
        assert path in str(refused.value)
