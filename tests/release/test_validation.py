"""evaluate.py of a run that has no text: its validation again, as in training."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from thunderhead.core import config
from thunderhead.core.config import ConfigError
from thunderhead.release.evaluate import evaluate
from thunderhead.training.record import read_rows, read_summary


def test_a_synthetic_task_has_the_accuracy_that_training_said(
    run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the last checkpoint, an earlier one and the averaged weights; on batches of another size."""
    task = ("data=induction", "data.task.vocabulary=32", "data.max_validation_tokens=1024", "optimizer.lr=0.02")
    kept = ("callbacks.checkpoint.every_n_train_steps=1", "callbacks.checkpoint.save_top_k=-1", "logger=csv")
    made = run(*task, "callbacks=ema", *kept, "budget.steps=8", "validation.every=4")
    summary, (_, rows) = read_summary(made), read_rows(made / "metrics.csv")
    assert summary is not None
    assert f"evaluate.py run={made}" in capsys.readouterr().out.replace("\n", "")

    def again(*asked: str) -> dict[str, float]:
        composed = config.compose([f"run={made}", "accelerator=cpu", "batch_size=3", *asked], "evaluate")
        return evaluate(composed)["validation"]

    found = again("json=true")
    assert json.loads(capsys.readouterr().out)["validation"] == found
    assert {*found} == {"loss", "perplexity", "accuracy"}
    assert found["loss"] == pytest.approx(summary["val_loss"], rel=1e-6)
    assert found["accuracy"] == pytest.approx(summary["accuracy"], rel=1e-6)
    assert 0 < found["accuracy"] < 1
    assert again("averaged=true")["loss"] == pytest.approx(summary["loss_averaged"], rel=1e-6)
    before = next(row for row in rows if row["step"] == "4")
    earlier = evaluate(config.compose([f"run={made}/checkpoints/step-4.ckpt", "accelerator=cpu"], "evaluate"))
    assert earlier["validation"]["accuracy"] == pytest.approx(float(before["val/accuracy"]), rel=1e-6)
    assert "accuracy" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"^stride: is of text"):
        again("stride=4")
