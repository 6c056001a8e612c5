"""Runs that diverge: noticed in time, nothing of them saved, and said so."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from thunderhead.core.config import ConfigError, read_mapping
from thunderhead.training.record import read_rows

STEPS = ("budget.steps=12", "callbacks=default", "callbacks.checkpoint.every_n_train_steps=2", "validation.every=4")


def poison(steps: list[int], into: str = "gradient", value: str = "nan", once: bool = False) -> str:
    settings = f"steps: {steps}, into: {into}, value: {value}, once: {once}"
    return f"+callbacks.poison={{_target_: poison.Poison, {settings}}}"


def weights_are_finite(checkpoint: Path) -> bool:
    content = torch.load(checkpoint, weights_only=True)
    return all(weight.isfinite().all() for weight in content["state_dict"].values())


@pytest.mark.parametrize(
    ("into", "value", "every", "noticed"),
    [("gradient", "nan", 1, 7), ("gradient", "inf", 5, 7), ("weight", "nan", 5, 8), ("weight", "nan", 1000, 8)],
)
def test_a_run_that_diverges_stops_and_keeps_its_last_finite_state(
    into: str,
    value: str,
    every: int,
    noticed: int,
    run: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    tell: Callable[..., None],
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(*STEPS, poison([7], into, value), f"trainer.log_every_n_steps={every}")
    assert ended.value.code == 1
    told = capsys.readouterr()
    folder = Path(told.err.split("resume=")[1].split()[0])
    (said,) = (line for line in told.err.splitlines() if f"diverged at step {noticed}: " in line)
    summary = read_mapping(folder / "summary.json")
    assert summary["diverged"]["step"] == noticed
    assert math.isnan(summary["val_loss"])
    assert summary["steps"] <= 10  # the next logged step, validation or checkpoint
    checkpoints = sorted((folder / "checkpoints").glob("*.ckpt"))
    assert {file.name for file in checkpoints} >= {"best.ckpt", "last.ckpt"}
    assert all(weights_are_finite(file) for file in checkpoints)
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 6
    tell(saw=said, tokens_lost=128 * (summary["steps"] - 6))


def test_skip_leaves_out_the_steps_and_counts_them(run: Callable[..., Path]) -> None:
    folder = run(*STEPS, poison([3, 7]), "on_divergence=skip", "trainer.gradient_clip_val=null")
    summary = read_mapping(folder / "summary.json")
    assert (summary["steps"], summary["skipped_steps"], summary["skipped"]) == (12, 2, [3, 7])
    assert math.isfinite(summary["val_loss"])
    losses = [float(row["train/loss"]) for row in read_rows(folder / "metrics.csv")[1]]
    assert all(map(math.isfinite, losses))


def test_skip_changes_no_weight_nor_any_state_of_the_optimizer(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step that was left out is as if it had not been, but for the schedule, which is constant here."""
    states: list[dict[str, Any]] = []
    for steps in ([3], []):
        more = () if steps else ("budget.steps=2",)
        folder = run(*STEPS[1:], "budget.steps=3", *more, poison(steps), "on_divergence=skip", "scheduler=constant",
                     "scheduler.warmup=0")  # fmt: skip
        content = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
        states.append({**content["state_dict"], **content["optimizer_states"][0]["state"][0]})
    assert states[0].keys() == states[1].keys()
    assert all(
        torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(*map(dict.values, states), strict=True)
    )


def test_skipping_for_ever_is_divergence(run: Callable[..., Path]) -> None:
    with pytest.raises(SystemExit) as ended:
        run("budget.steps=40", "callbacks=default", poison(list(range(5, 41))), "on_divergence=skip")
    assert ended.value.code == 1


def test_rollback_goes_back_and_leaves_out_the_data(run: Callable[..., Path]) -> None:
    """A poisoned sample, as it were: the step diverges for as long as it comes, and it comes no more."""
    folder = run(*STEPS, poison([7], once=True), "on_divergence=rollback", "trainer.log_every_n_steps=1")
    summary = read_mapping(folder / "summary.json")
    assert summary["steps"] == 12
    assert math.isfinite(summary["val_loss"])
    # 4 sequences a step: back from step 7 to the checkpoint of step 6, and on with sample 28
    assert summary["rollbacks"] == [{"step": 7, "to": 6, "first_sample": 24, "next_sample": 28}]
    content = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["TextData"]["samples"] == 12 * 4 + 4
    assert not (folder / "checkpoints" / "rollback").exists()
    rows = read_rows(folder / "metrics.csv")[1]
    assert [int(row["step"]) for row in rows] == [*range(1, 13)]
    assert all(math.isfinite(float(row["train/loss"])) for row in rows)


def test_rollback_gives_up_at_last(run: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        run(*STEPS, poison([7]), "on_divergence=rollback", "trainer.log_every_n_steps=1", "budget.steps=8")
    assert ended.value.code == 1
    (summary,) = (read_mapping(file) for file in tmp_path.rglob("summary.json"))
    assert [event["next_sample"] for event in summary["rollbacks"]] == [24 + 4 * n for n in range(1, 11)]


def test_rollback_needs_checkpoints(run: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"^on_divergence: rollback needs checkpoints"):
        run("on_divergence=rollback")
