"""Batch arithmetic, budgets and validation, against arithmetic written another way."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thunderhead.core.config import ConfigError
from thunderhead.core.optim.schedules import constant, cosine
from thunderhead.options.schedules import inverse_sqrt, wsd
from thunderhead.training.plan import (
    Batch,
    ChinchillaBudget,
    EpochsBudget,
    FlopsBudget,
    Sizes,
    StepsBudget,
    TokensBudget,
    Validation,
    training_flops_per_token,
    warmup_steps,
    whole_steps,
)

PARTS = {"embedding": 30, "position": 7, "attention": 100, "feedforward": 200, "norm": 5, "head": 30, "total": 372}
SIZES = Sizes(PARTS, flops_per_token=1000, tokens_per_step=64, epoch_tokens=10_000)

small = st.integers(1, 64)


@given(context=small, ranks=small, micro=small, accumulation=small)
def test_whole_batches_are_divided_exactly(context: int, ranks: int, micro: int, accumulation: int) -> None:
    batch = Batch(global_tokens=context * ranks * micro * accumulation, micro_size=micro)
    assert batch.accumulation(context, ranks) == accumulation


@given(tokens=st.integers(1, 100_000), context=small, ranks=small, micro=small)
def test_other_batches_are_refused_with_the_nearest_sizes(tokens: int, context: int, ranks: int, micro: int) -> None:
    at_once = context * ranks * micro
    if tokens % at_once == 0:
        tokens += 1
        if at_once == 1:
            return
    batch = Batch(global_tokens=tokens, micro_size=micro)
    with pytest.raises(ValueError, match="is not a multiple of") as refused:
        batch.accumulation(context, ranks)
    advice = str(refused.value).rpartition(": use ")[2]
    sizes = [int(n) for n in re.findall(r"batch\.global_tokens=(\d+)", advice)]
    around = [n for n in range(max(1, tokens - at_once), tokens + at_once + 1) if n % at_once == 0]
    assert sizes == around
    for size in sizes:  # the advice works
        assert replace(batch, global_tokens=size).accumulation(context, ranks) >= 1
    for size in re.findall(r"batch\.micro_size=(\d+)", advice):
        assert replace(batch, micro_size=int(size)).accumulation(context, ranks) >= 1


@pytest.mark.parametrize(
    ("tokens", "context", "ranks", "expected"),
    [
        (1024, 256, 1, (4, 1)),
        (1024, 1024, 1, (1, 1)),
        (4096, 256, 2, (4, 2)),
        (768, 256, 1, (3, 1)),
        (1280, 256, 1, (1, 5)),
    ],
)
def test_without_a_micro_size_it_is_four_or_what_divides(
    tokens: int, context: int, ranks: int, expected: tuple[int, int]
) -> None:
    batch = Batch(global_tokens=tokens)
    assert (batch.micro_batch(context, ranks), batch.accumulation(context, ranks)) == expected


def test_without_a_micro_size_too_few_tokens_are_refused_with_what_works() -> None:
    with pytest.raises(ValueError, match=r"use batch.global_tokens=2048$"):
        Batch(global_tokens=1024).accumulation(256, 8)


def test_the_nearest_micro_size_divides_the_sequences() -> None:
    with pytest.raises(ValueError, match=r"use batch.global_tokens=80 or .*=120 or batch.micro_size=4$"):
        Batch(global_tokens=96, micro_size=5).accumulation(8, 1)


@pytest.mark.parametrize(
    ("budget", "tokens"),
    [
        (StepsBudget(steps=10), 640),
        (TokensBudget(tokens=12_345), 12_345),
        (EpochsBudget(epochs=1.5), 15_000),
        (ChinchillaBudget(tokens_per_parameter=20.0, count="total"), 20 * 372),
        (ChinchillaBudget(tokens_per_parameter=20.0, count="non_embedding"), 20 * 305),  # 100 + 200 + 5
        (FlopsBudget(flops=5e6), 5000),
    ],
)
def test_budgets(budget: StepsBudget, tokens: int) -> None:
    assert budget.total_tokens(SIZES) == tokens


def test_epochs_need_the_data() -> None:
    with pytest.raises(ValueError, match="the data is not prepared yet"):
        EpochsBudget(epochs=1.0).total_tokens(SIZES._replace(epoch_tokens=None))


@given(tokens=st.integers(0, 10**15), step=st.integers(1, 10**7))
def test_whole_steps_round_down(tokens: int, step: int) -> None:
    if tokens < step:
        with pytest.raises(ValueError, match="less than one step"):
            whole_steps(tokens, step)
    else:
        steps = whole_steps(tokens, step)
        assert steps * step <= tokens < (steps + 1) * step


def test_a_backward_pass_costs_two_forward_passes() -> None:
    assert training_flops_per_token(100) == 300


def there_and_back(step: int, total_steps: int, *, top: int, height: float = 0.5) -> float:
    """A schedule of someone else: no setting called warmup, and a peak that is not 1."""
    return height * min((step + 1) / (top + 1), (total_steps - step) / (total_steps - top))


@given(total=st.integers(1, 100_000), data=st.data())
@settings(deadline=None, max_examples=30)
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
    assert Validation(every=every).steps(total) == steps


def test_validation_refuses_fractions_above_1() -> None:
    with pytest.raises(ValueError, match=r"validation.every=2.0: write steps as an integer, or a fraction below 1"):
        Validation(every=2.0).steps(10)


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
