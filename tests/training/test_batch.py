"""Batch arithmetic, against arithmetic written another way, and batch.micro_size=auto by the plan's estimate."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thunderhead import command_line, processes
from thunderhead.core.config import ConfigError, read_mapping
from thunderhead.parallel import launch
from thunderhead.training.batch import Batch, largest_that_fits
from thunderhead.training.record import read_rows
from tiny import train_here

pytestmark = pytest.mark.usefixtures("memory_is_counted")

MIB = 2**20
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


def losses(folder: Path) -> list[str]:
    return [row["train/loss"] for row in read_rows(folder / "metrics.csv")[1] if row["train/loss"]]


def test_the_estimate_decides_and_says_why() -> None:
    def needs(size: int) -> dict[str, int]:
        return {"parameters": 100 * MIB, "activations": size * 100 * MIB}

    assert largest_that_fits(8, needs, 900 * MIB, "of a test") == (
        8,
        "by the estimate it needs 0.88 GiB of 0.88 GiB, of a test; more do not divide the 8 sequences of a step",
    )
    assert largest_that_fits(8, needs, 899 * MIB, "of a test") == (
        4,
        "by the estimate it needs 0.49 GiB of 0.88 GiB, of a test; 8 would need 0.88 GiB",
    )
    assert largest_that_fits(8, needs, 200 * MIB, "of a test")[0] == 1
    with pytest.raises(ValueError, match=r"^batch.micro_size=auto: even one sequence needs about 0.20 GiB of 0.19 GiB"):
        largest_that_fits(8, needs, 199 * MIB, "of a test")
    with pytest.raises(ValueError, match=r"activations cannot be estimated.*: write a number$"):
        largest_that_fits(8, lambda size: {"parameters": 1}, 199 * MIB, "of a test")


# --------------------------------------------------------------------------------------------------------------------
# Runs


SETTINGS = ("dropout=gpt2", "batch.global_tokens=256", "budget.steps=3")  # 8 sequences a step


@pytest.fixture
def by_hand(run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with micro-batches of 4, on a host that has just enough memory for them."""
    folder = run(*SETTINGS, "batch.micro_size=4")
    needed = sum(read_mapping(folder / "plan.json")["memory"].values())
    monkeypatch.setattr(processes, "free_host_memory", lambda: 2 * needed + 1000)
    return folder


def test_a_run_finds_it_and_its_losses_are_those_of_the_number(
    by_hand: Path, run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    found = run(*SETTINGS, "batch.micro_size=auto")
    assert capsys.readouterr().out.count("batch.micro_size=auto: 4: by the estimate it needs") == 1
    assert losses(found) == losses(by_hand)
    plan = read_mapping(found / "plan.json")
    assert (plan["micro_batch_size"], plan["accumulation"]) == (4, 2)
    assert plan["why_micro_batch"].startswith("by the estimate it needs")
    assert "micro_size: auto" in (found / "config.yaml").read_text()  # so that arms of a sweep stay alike


def test_a_resumed_run_keeps_it(
    by_hand: Path, run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run(*SETTINGS, "batch.micro_size=auto", "callbacks=default", "callbacks.checkpoint.every_n_train_steps=1")
    monkeypatch.setattr(processes, "free_host_memory", lambda: 2**40)
    with patch.object(command_line, "invocation_overrides", lambda: ["budget.steps=4"]):
        train_here([f"resume={found}"], tmp_path / "new")
    plan = read_mapping(found / "plan.json")
    assert (plan["micro_batch_size"], plan["steps"]) == (4, 4)
    assert "micro_size: auto" in (found / "config.yaml").read_text()
    assert len(losses(found)) == 4


def test_a_run_resumed_on_more_ranks_finds_it_anew(
    by_hand: Path, run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four ranks have two sequences each, not four."""
    found = run(*SETTINGS, "batch.micro_size=auto", "callbacks=default", "callbacks.checkpoint.every_n_train_steps=1")
    monkeypatch.setattr(processes, "free_host_memory", lambda: 2**40)
    launched: list[int] = []

    def launch_(settings: dict[str, Any], run_dir: Path, n: int) -> dict[str, Any]:
        launched.append(settings["batch"]["micro_size"])
        return {"val_loss": 1.0}

    monkeypatch.setattr(launch, "launch", launch_)
    for devices in (2, 4):
        overrides = ["budget.steps=4", f"trainer.devices={devices}"]
        with patch.object(command_line, "invocation_overrides", lambda overrides=overrides: overrides):
            train_here([f"resume={found}"], tmp_path / "new")
    assert launched == [4, 2]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with (
        patch.object(command_line, "invocation_overrides", lambda: overrides),
        pytest.raises(ConfigError, match=r"^batch\.micro_size: auto cannot be agreed on by processes that torchrun"),
    ):
        train_here([f"resume={found}"], tmp_path / "new")


def test_a_dry_run_says_what_would_be_taken(
    by_hand: Path, run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    run(*SETTINGS, "batch.micro_size=auto", "dry_run=true")
    assert "batch.micro_size=auto: 4" in capsys.readouterr().out
    run(*SETTINGS, "batch.micro_size=auto", "dry_run=true", "trainer=gpu")
    said = " ".join(capsys.readouterr().out.split())
    assert "batch.micro_size=auto: 8: by the estimate" in said


def test_what_cannot_be_found_is_refused(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(processes, "free_host_memory", lambda: 1000)
    with pytest.raises(ConfigError, match=r"^batch\.micro_size=auto: even one sequence needs about"):
        run(*SETTINGS, "batch.micro_size=auto")
    with pytest.raises(ConfigError, match=r"^batch\.micro_size: 'automatic' is not accepted"):
        run("batch.micro_size=automatic")
    monkeypatch.setattr(processes, "free_host_memory", lambda: 2**40)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ConfigError, match=r"^batch\.micro_size: auto cannot be agreed on by processes that torchrun"):
        run("batch.micro_size=auto")
    assert not (tmp_path / "runs").exists()


def test_a_batch_that_ranks_cannot_share_is_refused(run: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"^batch\.global_tokens=100 is not a multiple of the 32 tokens"):
        run("batch.micro_size=auto", "batch.global_tokens=100")
