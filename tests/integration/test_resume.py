"""`resume=<run folder>` goes on as if nothing had happened."""

from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from lightning import Callback, LightningModule, Trainer

from thunderhead import config
from thunderhead.training.record import read_rows
from tiny import tiny, train_here


class Crash(Callback):
    """Raise after an optimizer step."""

    def __init__(self, *, after: int):
        self.after = after

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: object) -> None:
        if trainer.global_step == self.after:
            raise KeyError("pulled the plug")


SETTINGS = (
    "budget.steps=8",
    "batch.global_tokens=256",  # four micro-batches of 2 × 32 tokens
    "dropout=gpt2",
    "attention.dropout=0.1",
    "callbacks=default",
    "callbacks.checkpoint.every_n_train_steps=2",
    "validation.every=3",
)


@pytest.fixture
def losses(text_corpus: Path, shards_dir: Path, tmp_path: Path) -> Callable[..., list[tuple[str, str]]]:
    """Train under `name`, crash and resume if asked to; gives (step, loss) of each row in metrics.csv."""

    def train(name: str, *overrides: str, crash_after: int | None = None, resume_with: tuple[str, ...] = ()):
        run_dir = tmp_path / name
        run_dir.mkdir()
        lines = tiny(text_corpus, shards_dir, *SETTINGS, *overrides)
        if crash_after is None:
            train_here(lines, run_dir)
        else:
            crash = f"+callbacks.crash={{_target_: {__name__}.Crash, after: {crash_after}}}"
            with pytest.raises(KeyError, match="pulled the plug"):
                train_here([*lines, crash], run_dir)
            # the plug is pulled once
            overrides_of_resume = [*resume_with, "callbacks.crash.after=1000"]
            with patch.object(config, "invocation_overrides", lambda: overrides_of_resume):
                train_here([f"resume={run_dir}"], tmp_path / "unused")
        return [(row["step"], row["train/loss"]) for row in read_rows(run_dir / "metrics.csv")[1] if row["train/loss"]]

    return train


@pytest.mark.parametrize("crash_after", [4, 5])  # at a checkpoint, and one step later
@pytest.mark.parametrize("overrides", [(), ("precision=bf16-mixed", "optimizer=muon", "data.num_workers=1")])
def test_bitwise_equal(crash_after: int, overrides: tuple[str, ...], losses: Callable[..., list[tuple[str, str]]],
                       tmp_path: Path) -> None:  # fmt: skip
    whole = losses("whole", *overrides)
    resumed = losses("resumed", *overrides, crash_after=crash_after)
    assert len(whole) == 8
    assert resumed == whole
    weights = [
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "resumed")
    ]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_with_another_micro_batch(losses: Callable[..., list[tuple[str, str]]]) -> None:
    without_dropout = ("dropout=none", "attention.dropout=0.0")
    whole = losses("whole", *without_dropout)
    resumed = losses("resumed", *without_dropout, crash_after=5, resume_with=("batch.micro_size=1",))
    assert [step for step, _ in resumed] == [step for step, _ in whole]
    # the same sequences in other micro-batches: sums in another order
    torch.testing.assert_close(
        torch.tensor([float(loss) for _, loss in resumed]), torch.tensor([float(loss) for _, loss in whole])
    )


def test_a_run_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    with pytest.raises(config.ConfigError, match=r"has no checkpoints/last\.ckpt to go on from"):
        train_here([f"resume={tmp_path}"], tmp_path / "unused")
