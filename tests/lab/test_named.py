"""The named ablations of conf/experiment: each composes, is planned as a whole, and takes some minutes."""

import itertools

import pytest
import yaml

from hydra_plugins.thunderhead_sweeps.sweepers import planner
from programs import run
from thunderhead.core import config
from thunderhead.core.config import CONF_DIR
from thunderhead.lab.grid import Candidate, make_arms, sweep_options
from thunderhead.lab.tune import Bracket

OF_THE_LECTURE = (
    *("attention", "activation", "norm", "position", "optimizer", "scheduler", "batch", "dropout", "repetition"),
    "precision",
)
TOKENS_PER_SECOND = 60_000  # of two runs at once on 2 quiet cores
SECONDS_AROUND = 6  # a run, of starting, validating and sampling


def test_there_is_one_for_each_choice_of_the_lecture() -> None:
    found = {file.stem.removeprefix("ablation_") for file in (CONF_DIR / "experiment").glob("ablation_*.yaml")}
    assert found >= set(OF_THE_LECTURE)


@pytest.mark.parametrize("name", OF_THE_LECTURE)
def test_it_is_a_sweep_of_minutes(name: str) -> None:
    content = yaml.safe_load((CONF_DIR / "experiment" / f"ablation_{name}.yaml").read_text())
    params = {key: str(value).split(",") for key, value in content["hydra"]["sweeper"]["params"].items()}
    assert content["name"] == f"ablation_{name}"
    assert params.pop("seed") == ["1", "2", "3"]
    candidates = []
    for values in itertools.product(*params.values()):
        choices = dict(zip(params, values, strict=True))
        lines = [f"experiment=ablation_{name}", "trainer=cpu", *(f"{key}={value}" for key, value in choices.items())]
        candidates.append(Candidate(choices, config.plain(config.compose(lines))))
    match, bracket = sweep_options(candidates)
    arms = make_arms(candidates, planner())
    assert len(arms) == len(candidates) > 1
    runs = 3 + (len(bracket.multipliers["optimizer.lr"]) if isinstance(bracket, Bracket) else 0)
    tokens = arms[0].plan.tokens if match.by == "flops" else max(arm.plan.tokens for arm in arms)
    minutes = len(arms) * runs * (tokens / TOKENS_PER_SECOND + SECONDS_AROUND) / 60
    assert 3 < minutes < 25


@pytest.mark.parametrize(("lines", "status", "told"), [
    pytest.param(("experiment=scaling_law",), 0, "d48 flops=1.2e+12: 1 run(s)", marks=pytest.mark.slow),
    (("experiment=scaling_law", "hydra.sweeper.smallest_effect=0.1"), 2,
     "hydra.sweeper.smallest_effect a scaling law compares with none"),
    (("experiment=ladder", "attention=mha,gqa"), 0, "Learning rates by size: muP, from those of width 32"),
    (("experiment=ladder", "attention=mha,gqa", "hydra.sweeper.metric=val_loss"), 2,
     "hydra.sweeper.metric is of comparisons at one size"),
])  # fmt: skip
def test_sweeps_with_sweepers_of_their_own_are_planned(lines: tuple[str, ...], status: int, told: str) -> None:
    """Whose settings stand on top of those of hydra/sweeper=grid."""
    done = run("train.py", *lines, "dry_run=true")
    assert done.returncode == status, done.stderr
    assert told in done.stdout + done.stderr
