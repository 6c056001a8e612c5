"""The plan of a run, against arithmetic written another way."""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thunderhead.core.config import ConfigError
from thunderhead.core.optim.schedules import constant, cosine
from thunderhead.options.schedules import inverse_sqrt, wsd
from thunderhead.training.plan import Validation, warmup_steps, whole_steps


@given(tokens=st.integers(0, 10**15), step=st.integers(1, 10**7))
def test_whole_steps_round_down(tokens: int, step: int) -> None:
    if tokens < step:
        with pytest.raises(ValueError, match="less than one step"):
            whole_steps(tokens, step)
    else:
        steps = whole_steps(tokens, step)
        assert steps * step <= tokens < (steps + 1) * step


def there_and_back(step: int, total_steps: int, *, top: int, height: float = 0.5) -> float:
    """A schedule of someone else: no setting called warmup, and a peak that is not 1."""
    return height * min((step + 1) / (top + 1), (total_steps - step) / (total_steps - top))


@given(total=st.integers(1, 100_000), data=st.data())
@settings(max_examples=30)
def test_warm_up_is_found_by_asking_the_schedule(total: int, data: st.DataObject) -> None:
    w = data.draw(st.integers(0, total - 1))
    for schedule in (constant, cosine, wsd, inverse_sqrt):
        if schedule is not wsd or w <= total - max(1, round(0.2 * total)):
            assert warmup_steps(partial(schedule, warmup=w), total) == (w if w > 1 else 0), schedule
    assert warmup_steps(partial(there_and_back, top=w), total) == (w + 1 if w else 0)


@pytest.mark.parametrize(
    ("every", "total", "steps"),
    [(0.25, 100, 25), (0.25, 2, 1), (0.001, 100, 1), (0.5, 7, 4), (10, 100, 10), (200, 100, 100)],
)
def test_validation(every: float, total: int, steps: int) -> None:
    assert Validation(every=every).steps(total, cost=3.0) == steps


@given(total=st.integers(1, 10_000), cost=st.floats(0.01, 1000), share=st.floats(0, 1))
def test_validation_in_proportion(total: int, cost: float, share: float) -> None:
    every = Validation(every="auto", share=share).steps(total, cost)
    validated = {*range(every, total + 1, every), total}  # after these steps
    assert len(validated) <= 4
    assert validated == {total} or len(validated) * cost <= share * total
    if share * total >= 4 * cost and total % 4 == 0:
        assert len(validated) == 4


def test_the_plan_says_what_validation_costs(run: Callable[..., Path]) -> None:
    """A step computes three times what a forward pass does: 480 tokens of validation cost 1.25 steps of 128."""
    settings = ("validation.every=auto", "budget.steps=40", "data=induction", "data.max_validation_tokens=480")
    folder = run(*settings)
    plan = json.loads((folder / "plan.json").read_text())
    assert plan["validation_every"] == 14  # 3 × 1.25 ≤ 0.1 × 40 < 4 × 1.25
    assert plan["validation_share"] == pytest.approx(3 * 480 / (3 * 40 * 128))
    assert "TaskData takes no tokenizer: tokenizer= changes nothing" in plan["notes"]


def test_a_budget_of_ones_own_gives_a_number() -> None:
    assert whole_steps(1e3, 100) == 10
    for wrong in ("1000", math.nan, None):
        with pytest.raises(ValueError, match=r"^budget: .*total_tokens"):
            whole_steps(wrong, 100)  # type: ignore[arg-type]


# --- the plan of a run


def test_the_plan_in_the_record_adds_up(run: Callable[..., Path]) -> None:
    plan = json.loads((run("budget=tokens", "budget.tokens=500") / "plan.json").read_text())
    assert plan["steps"] == 3  # 500 tokens hold 3 steps of 128
    assert plan["tokens"] == 384
    assert plan["accumulation"] == 2  # 128 tokens = 2 micro-batches of 2 sequences of 32
    assert plan["sequences_per_step"] == 4
    assert plan["flops"] == 384 * plan["flops_per_token"]
    assert plan["parameters"]["total"] == sum(n for part, n in plan["parameters"].items() if part != "total")


def test_all_problems_of_a_plan_at_once(run: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError) as refused:
        run("attention.n_kv_heads=3", "data.path=/nowhere", "trainer.devices=0", "strategy=single")
    text = str(refused.value)
    assert len(refused.value.problems) == 3
    for name in ("attention.n_kv_heads=3", "path=/nowhere", "trainer.devices=0"):
        assert name in text


def test_a_batch_and_a_warmup_that_do_not_fit_are_told_together(run: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError) as refused:
        run("batch.global_tokens=100", "batch.micro_size=2", "scheduler.warmup=5")
    text = str(refused.value)
    assert "batch.global_tokens=100 is not a multiple of the 64 tokens" in text
    assert "scheduler.warmup=5" in text
