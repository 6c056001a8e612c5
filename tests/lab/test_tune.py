"""The same bracket for every arm, and a warning where the optimum lies on its edge."""

import math

import pytest

from thunderhead.lab.tune import at_edge, best, nonzero, trials

CONFIG = {"optimizer": {"lr": 0.002, "weight_decay": 0.0, "betas": [0.9, 0.99]}, "seed": 1}


def test_trials_multiply_the_arms_own_values() -> None:
    found = trials(CONFIG, {"optimizer.lr": [0.5, 1.0, 2.0], "optimizer.weight_decay": [0.3, 1.0, 3.0]})
    assert [t.config["optimizer"]["lr"] for t in found] == [0.001, 0.002, 0.004]  # no other arm has a weight decay
    assert found[1].config == CONFIG
    assert CONFIG["optimizer"]["lr"] == 0.002
    pairs = trials(
        CONFIG | {"optimizer": {"lr": 1.0, "weight_decay": 0.1}},
        {"optimizer.lr": [1, 2], "optimizer.weight_decay": [1, 3]},
    )
    assert [(t.value["optimizer.lr"], t.value["optimizer.weight_decay"]) for t in pairs] == [
        (1, 0.1), (1, pytest.approx(0.3)), (2, 0.1), (2, pytest.approx(0.3)),
    ]  # fmt: skip


def test_an_arm_with_a_value_of_0_has_as_many_trials() -> None:
    """Of 0 itself, and of multiples of what another arm has; where all have 0 there is one."""
    bracket = {"optimizer.weight_decay": [0.3, 1.0, 3.0]}
    others = nonzero([CONFIG, {"optimizer": {"lr": 1.0, "weight_decay": 0.1}}], bracket)
    assert others == {"optimizer.weight_decay": 0.1}
    found = trials(CONFIG, bracket, others)
    assert [t.value["optimizer.weight_decay"] for t in found] == [0.0, 0.1, pytest.approx(0.3)]
    assert [t.config["optimizer"]["weight_decay"] for t in found] == [t.value["optimizer.weight_decay"] for t in found]
    assert [at_edge(trial, found) for trial in found] == [[], [], ["optimizer.weight_decay"]]  # below 0 is nothing
    assert len(trials(CONFIG, bracket, nonzero([CONFIG], bracket))) == 1


@pytest.mark.parametrize("path", ["optimizer.betas", "optimizer.nothing", "nothing.lr"])
def test_only_numbers_are_multiplied(path: str) -> None:
    with pytest.raises(ValueError, match=f"tune.multipliers.{path}"):
        trials(CONFIG, {path: [1.0, 2.0]})


def test_best_is_the_lowest_finite_loss() -> None:
    assert best([3.0, math.nan, 2.0, None, math.inf]) == 2
    assert best([None, math.nan]) is None


def test_the_edge() -> None:
    found = trials(CONFIG, {"optimizer.lr": [0.5, 1.0, 2.0]})
    assert [at_edge(trial, found) for trial in found] == [["optimizer.lr"], [], ["optimizer.lr"]]
    only = trials(CONFIG, {"optimizer.weight_decay": [1.0, 3.0]})
    assert at_edge(only[0], only) == []
