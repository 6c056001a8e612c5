"""Every option of every group beside every option of every other group: trains, or is refused by name.

Most of the pairs at once, the rest in the slow suite.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import combinations
from pathlib import Path

import pytest

from thunderhead.core.config import ConfigError
from thunderhead.training.record import read_rows
from tiny import PAIRED as GROUPS

# Dynamo hides this warning of its own look at activations, which does not help where warnings are errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

# Pairs of options that exclude each other, and what the refusal says.
INVALID = {
    **{
        ("debug=fast", f"budget={budget}"): "^budget.steps: is unknown to .*Budget"
        for budget in GROUPS["budget"]
        if budget != "steps"
    },
    ("data=induction", "budget=epochs"): "^budget.epochs: a synthetic task has no epochs",
    **{
        ("data=induction", f"curation={curation}"): "^curation: .*TaskData takes no filters"
        for curation in GROUPS["curation"]
        if curation != "none"
    },
    **{
        ("parametrization=mup", f"optimizer={optimizer}"): "^parametrization=mup: .* does not say how its updates scale"
        for optimizer in ("sgd", "adafactor")
    },
    **{
        ("callbacks=ema", f"strategy={strategy}"): r"^callbacks: .* whole, and strategy=\w+ divides them"
        for strategy in ("fsdp", "fsdp_tp", "hsdp", "tensor_parallel")
    },
    **{
        (f"strategy={strategy}", "compile=model"): "^compile.scope: compile=model cannot trace .* use compile=block"
        for strategy in ("fsdp", "fsdp_tp", "hsdp")
    },
}


def is_valid(options: Iterable[str]) -> bool:
    return not any(set(options).issuperset(pair) for pair in INVALID)


def pairs(options: Iterable[str]) -> set[frozenset[str]]:
    """All pairs of group=option from different groups."""
    couples = (frozenset(couple) for couple in combinations(options, 2))
    return {couple for couple in couples if len({option.partition("=")[0] for option in couple}) == 2}


def covering_rows() -> list[list[str]]:
    """Choices of one option per group that together hold every valid pair.

    Greedy, as AETG does it (Cohen et al. 1997): each row begins with a pair that is still missing, and takes in every
    other group the option that completes the most of those.
    """
    left, rows = set(WANTED), []
    groups = sorted(GROUPS, key=lambda group: -len(GROUPS[group]))
    while left:
        wanted = Counter(option for pair in left for option in pair)
        first = max(sorted(left, key=sorted), key=lambda pair: sum(wanted[option] for option in pair))
        row = {option.partition("=")[0]: option for option in first}
        for group in groups:
            if group not in row:
                options = [f"{group}={option}" for option in GROUPS[group]]
                valid = [option for option in options if is_valid([*row.values(), option])]
                completed = {o: sum(frozenset((o, other)) in left for other in row.values()) for o in valid}
                row[group] = max(valid, key=lambda option: (completed[option], wanted[option]))
        rows.append(sorted(row.values()))
        left -= pairs(row.values())
    return rows


WANTED = pairs(f"{group}={option}" for group in GROUPS for option in GROUPS[group]) - {frozenset(p) for p in INVALID}
ROWS = covering_rows()


def test_the_rows_cover_every_pair() -> None:
    assert set().union(*map(pairs, ROWS)) == WANTED
    soon = set().union(*map(pairs, ROWS[:SOON]))
    assert len(soon) > 0.6 * len(WANTED)
    assert {option for pair in soon for option in pair} == {option for pair in WANTED for option in pair}


@pytest.mark.parametrize("pair", INVALID, ids="+".join)
def test_an_invalid_pair_is_refused_by_name(pair: tuple[str, str], run: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=INVALID[pair]):
        run(*pair)


SOON = 11  # of the rows, which begin with those that hold the most pairs; the others take twice as long
CASES = [pytest.param(row, marks=[pytest.mark.slow] if i >= SOON else []) for i, row in enumerate(ROWS)]


@pytest.mark.parametrize("row", CASES, ids=lambda row: ",".join(name.partition("=")[2] for name in row))
@pytest.mark.usefixtures("fresh_compiler")
def test_every_pair_trains(row: list[str], run: Callable[..., Path]) -> None:
    if "precision=fp16-mixed" in row:  # which overflows on purpose while it looks for its scale: an anomaly
        row = [option for option in row if option != "debug=anomaly"]
    folder = run(*row)
    losses = [float(r["train/loss"]) for r in read_rows(folder / "metrics.csv")[1] if r["train/loss"]]
    assert losses
    assert all(math.isfinite(loss) for loss in losses)
