"""Every option of every group beside every option of every other group: trains, or is refused by name."""

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path

import pytest
from allpairspy import AllPairs

from thunderhead.config import ConfigError
from thunderhead.training.record import read_rows
from tiny import OPTIONS

# Dynamo hides this warning of its own look at activations, which does not help where warnings are errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

LEFT_OUT = {
    "experiment",  # sets the other groups; test_options has each
    "generation",  # one option
    "batch",  # one option
    "loss",  # one option
    "validation",  # one option
}
FEWER = {
    "model": ["nano", "micro"],  # the published ones differ in numbers only, which tiny runs overwrite
    "trainer": ["auto", "cpu"],  # gpu and mps are refused here
    "compile": ["none", "block", "model"],
}
GROUPS = {group: FEWER.get(group, options) for group, options in OPTIONS.items() if group not in LEFT_OUT}
# Pairs of options that exclude each other, and what the refusal says.
INVALID = {
    ("debug=fast", f"budget={budget}"): "^budget.steps: is unknown to .*Budget"
    for budget in GROUPS["budget"]
    if budget != "steps"
}


def names(options: Sequence[str]) -> set[str]:
    """group=option of the first groups."""
    return {f"{group}={option}" for group, option in zip(GROUPS, options, strict=False)}


def is_valid(options: Sequence[str]) -> bool:
    return not any(names(options).issuperset(pair) for pair in INVALID)


ROWS = [sorted(names(row)) for row in AllPairs(list(GROUPS.values()), filter_func=is_valid)]


def test_the_rows_cover_every_pair() -> None:
    covered = {frozenset(pair) for row in ROWS for pair in combinations(row, 2)} | {frozenset(pair) for pair in INVALID}
    options = [f"{group}={option}" for group in GROUPS for option in GROUPS[group]]
    wanted = {frozenset(pair) for pair in combinations(options, 2)}
    wanted = {pair for pair in wanted if len({name.partition("=")[0] for name in pair}) == 2}
    assert wanted <= covered


@pytest.mark.parametrize("pair", INVALID, ids="+".join)
def test_an_invalid_pair_is_refused_by_name(pair: tuple[str, str], run: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=INVALID[pair]):
        run(*pair)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: ",".join(name.partition("=")[2] for name in row))
@pytest.mark.usefixtures("fresh_compiler")
def test_every_pair_trains(row: list[str], run: Callable[..., Path]) -> None:
    folder = run(*row)
    losses = [float(r["train/loss"]) for r in read_rows(folder / "metrics.csv")[1] if r["train/loss"]]
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses)
