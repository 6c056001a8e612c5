"""batch.micro_size=auto, by the estimate."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from thunderhead.core import config
from thunderhead.core.config import ConfigError
from thunderhead.parallel import launch
from thunderhead.training import hardware, micro_batch
from thunderhead.training.micro_batch import by_estimate, largest, sizes
from thunderhead.training.record import read_json, read_rows
from tiny import train_here

MIB = 2**20


def losses(folder: Path) -> list[str]:
    return [row["train/loss"] for row in read_rows(folder / "metrics.csv")[1] if row["train/loss"]]


@pytest.mark.parametrize(
    ("sequences", "expected"), [(1, [1]), (8, [1, 2, 4, 8]), (12, [1, 2, 4]), (7, [1]), (96, [1, 2, 4, 8, 16, 32])]
)
def test_sizes_are_the_powers_of_two_that_divide_the_batch(sequences: int, expected: list[int]) -> None:
    assert sizes(sequences) == expected


@pytest.mark.parametrize(("limit", "expected", "tried"), [(0, None, [1]), (5, 4, [1, 2, 4, 8]), (99, 8, [1, 2, 4, 8])])
def test_sizes_are_tried_until_one_does_not_fit(limit: int, expected: int | None, tried: list[int]) -> None:
    seen = []

    def fits(size: int) -> bool:
        seen.append(size)
        return size <= limit

    assert largest([1, 2, 4, 8], fits) == expected
    assert seen == tried


def test_the_estimate_decides_and_says_why() -> None:
    def needs(size: int) -> dict[str, int]:
        return {"parameters": 100 * MIB, "activations": size * 100 * MIB}

    all_fit = by_estimate(8, needs, 900 * MIB, "of a test")
    assert all_fit.size == 8
    assert (
        all_fit.why
        == "by the estimate it needs 0.88 GiB of 0.88 GiB, of a test; more do not divide the 8 sequences of a step"
    )
    some = by_estimate(8, needs, 899 * MIB, "of a test")
    assert some.size == 4
    assert some.why == "by the estimate it needs 0.49 GiB of 0.88 GiB, of a test; 8 would need 0.88 GiB"
    with pytest.raises(ValueError, match=r"^batch.micro_size=auto: even one sequence needs about 0.20 GiB of 0.19 GiB"):
        by_estimate(8, needs, 199 * MIB, "of a test")
    with pytest.raises(ValueError, match=r"activations cannot be estimated.*: write a number$"):
        by_estimate(8, lambda size: {"parameters": 1}, 199 * MIB, "of a test")


def test_memory_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "free_host_memory", lambda: 8 * 2**30)
    assert micro_batch.usable_memory("cpu", 2, 0) == (
        2 * 2**30,
        "50% of this host's free memory for each of 2 processes",
    )
    assert micro_batch.usable_memory("cuda", 1, 10 * 2**30)[0] == 9 * 2**30


# --------------------------------------------------------------------------------------------------------------------
# Runs


SETTINGS = ("dropout=gpt2", "batch.global_tokens=256", "budget.steps=3")  # 8 sequences a step


@pytest.fixture
def by_hand(run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with micro-batches of 4, on a host that has just enough memory for them."""
    folder = run(*SETTINGS, "batch.micro_size=4")
    needed = sum(read_json(folder / "plan.json")["memory"].values())
    monkeypatch.setattr(hardware, "free_host_memory", lambda: 2 * needed + 1000)
    return folder


def test_a_run_finds_it_and_its_losses_are_those_of_the_number(
    by_hand: Path, run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    found = run(*SETTINGS, "batch.micro_size=auto")
    assert capsys.readouterr().out.count("batch.micro_size=auto: 4: by the estimate it needs") == 1
    assert losses(found) == losses(by_hand)
    plan = read_json(found / "plan.json")
    assert (plan["micro_batch_size"], plan["accumulation"]) == (4, 2)
    assert len([note for note in plan["notes"] if note.startswith("batch.micro_size=auto: 4")]) == 1
    assert "micro_size: auto" in (found / "config.yaml").read_text()  # so that arms of a sweep stay alike


def test_a_resumed_run_keeps_it(
    by_hand: Path, run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run(*SETTINGS, "batch.micro_size=auto", "callbacks=default", "callbacks.checkpoint.every_n_train_steps=1")
    monkeypatch.setattr(hardware, "free_host_memory", lambda: 2**40)
    with patch.object(config, "invocation_overrides", lambda: ["budget.steps=4"]):
        train_here([f"resume={found}"], tmp_path / "new")
    plan = read_json(found / "plan.json")
    assert (plan["micro_batch_size"], plan["steps"]) == (4, 4)
    assert "micro_size: auto" in (found / "config.yaml").read_text()
    assert len(losses(found)) == 4


def test_a_run_resumed_on_more_ranks_finds_it_anew(
    by_hand: Path, run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four ranks have two sequences each, not four."""
    found = run(*SETTINGS, "batch.micro_size=auto", "callbacks=default", "callbacks.checkpoint.every_n_train_steps=1")
    monkeypatch.setattr(hardware, "free_host_memory", lambda: 2**40)
    launched: list[int] = []

    def launch_(settings: dict[str, Any], run_dir: Path, n: int) -> dict[str, Any]:
        launched.append(settings["batch"]["micro_size"])
        return {"val_loss": 1.0}

    monkeypatch.setattr(launch, "launch", launch_)
    for devices in (2, 4):
        overrides = ["budget.steps=4", f"trainer.devices={devices}"]
        with patch.object(config, "invocation_overrides", lambda overrides=overrides: overrides):
            train_here([f"resume={found}"], tmp_path / "new")
    assert launched == [4, 2]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with (
        patch.object(config, "invocation_overrides", lambda: overrides),
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
    assert "batch.micro_size=auto: 8: by the estimate" in " ".join(capsys.readouterr().out.split())


def test_what_was_found_is_what_is_launched(run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[dict[str, Any]] = []

    def launch_(settings: dict[str, Any], run_dir: Path, n: int) -> dict[str, Any]:
        launched.append(settings)
        return {"val_loss": 1.0}

    monkeypatch.setattr(launch, "launch", launch_)
    monkeypatch.setattr(hardware, "free_host_memory", lambda: 2**40)
    run(*SETTINGS, "batch.micro_size=auto", "trainer.devices=2", "strategy=ddp")
    assert launched[0]["batch"]["micro_size"] == 4


def test_what_cannot_be_found_is_refused(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(hardware, "free_host_memory", lambda: 1000)
    with pytest.raises(ConfigError, match=r"^batch\.micro_size=auto: even one sequence needs about"):
        run(*SETTINGS, "batch.micro_size=auto")
    with pytest.raises(ConfigError, match=r"^batch\.micro_size: 'automatic' is not accepted"):
        run("batch.micro_size=automatic")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ConfigError, match=r"^batch\.micro_size: auto cannot be agreed on by processes that torchrun"):
        run("batch.micro_size=auto")
    assert not (tmp_path / "runs").exists()


def test_a_batch_that_ranks_cannot_share_is_refused(run: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"^batch\.global_tokens=100 is not a multiple of the 32 tokens"):
        run("batch.micro_size=auto", "batch.global_tokens=100")
