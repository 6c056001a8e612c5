"""Budgets, against arithmetic by hand."""

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from test_scaling_law import CHINCHILLA
from thunderhead.options.budgets import ChinchillaBudget, EpochsBudget, FlopsBudget, Sizes, StepsBudget, TokensBudget

PARTS = {"embedding": 30, "position": 7, "attention": 100, "feedforward": 200, "norm": 5, "head": 30, "total": 372}
SIZES = Sizes(PARTS, flops_per_token=1000, tokens_per_step=64, epoch_tokens=10_000)


@pytest.mark.parametrize(
    ("budget", "tokens"),
    [
        (StepsBudget(steps=10), 640),
        (TokensBudget(tokens=12_345), 12_345),
        (EpochsBudget(epochs=1.5), 15_000),
        (ChinchillaBudget(), 20 * 372),
        (ChinchillaBudget(tokens_per_parameter=5.0, count="non_embedding"), 5 * 305),  # 100 + 200 + 5
        (FlopsBudget(flops=5e6), 5000),
    ],
)
def test_budgets(budget: Any, tokens: int) -> None:
    assert budget.total_tokens(SIZES) == tokens
    assert getattr(budget, "needs_epochs", False) is isinstance(budget, EpochsBudget)


def test_epochs_need_the_data() -> None:
    with pytest.raises(ValueError, match="the data is not prepared yet"):
        EpochsBudget(epochs=1.0).total_tokens(SIZES._replace(epoch_tokens=None))


@pytest.fixture
def law(tmp_path: Path) -> str:
    (tmp_path / "law.json").write_text(json.dumps({"law": asdict(CHINCHILLA)}))
    return str(tmp_path / "law.json")


LARGE = Sizes(PARTS | {"total": 10**9}, flops_per_token=6 * 10**9, tokens_per_step=64, epoch_tokens=None)


def test_a_law_says_how_many_tokens_and_what_to_expect(law: str) -> None:
    tokens = ChinchillaBudget(law=law).total_tokens(LARGE)
    assert tokens == int(CHINCHILLA.optimal_tokens(1e9))
    predicted = CHINCHILLA.loss(1e9, tokens)
    assert [*map(numbers, ChinchillaBudget(law=law).notes(LARGE, tokens))] == [
        pytest.approx([1e9, tokens, tokens / 1e9, predicted], rel=5e-3)
    ]
    budget = FlopsBudget(flops=1.2e20, law=law)
    assert budget.total_tokens(LARGE) == 2 * 10**10
    best, this = budget.notes(LARGE, 2 * 10**10)
    optimum = CHINCHILLA.optimum(1.2e20)[:2]
    assert numbers(best) == pytest.approx([1.2e20, *optimum, CHINCHILLA.loss(*optimum)], rel=5e-3)
    assert numbers(this) == pytest.approx([1e9, 2e10, 20, CHINCHILLA.loss(1e9, 2e10)], rel=5e-3)
    assert "an extrapolation: 5 × the most tokens" in FlopsBudget(flops=1.5e22, law=law).notes(LARGE, 25 * 10**11)[1]


def numbers(note: str) -> list[float]:
    return [float(number) for number in re.findall(r"(?<![\w.])\d[\d.]*(?:e[+-]?\d+)?", note)]


def test_settings_that_contradict_a_law_are_refused(law: str) -> None:
    with pytest.raises(ValueError, match=r"^budget\.tokens_per_parameter=20 and budget\.law both say"):
        ChinchillaBudget(tokens_per_parameter=20.0, law=law).total_tokens(LARGE)
    with pytest.raises(ValueError, match=r"^budget\.count=non_embedding, .*: use budget\.count=total"):
        ChinchillaBudget(count="non_embedding", law=law).total_tokens(LARGE)
    with pytest.raises(ValueError, match=r"^budget\.law: nowhere cannot be read"):
        FlopsBudget(flops=1.0, law="nowhere").total_tokens(LARGE)
