"""Loggers, callbacks and metrics of others: their values are columns of the step's row, in logs, summary and report."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import programs
from outside.json_lines import JsonLines
from thunderhead.core.config import read_mapping
from thunderhead.core.module import LanguageModel
from thunderhead.training.record import read_rows
from tiny import tiny

OUTSIDE = Path(__file__).parent
SEARCH = f"hydra.searchpath=[file://{OUTSIDE}/conf]"


@pytest.fixture
def outside(run: Callable[..., Path]) -> Callable[..., Path]:
    return lambda *overrides: run(SEARCH, *overrides)


def lines_of(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_logger_gets_settings_plan_rows_and_text(outside: Callable[..., Path]) -> None:
    folder = outside(
        "logger=json_lines",
        "callbacks=monitored",
        "budget.steps=4",
        "validation.every=2",
        "trainer.log_every_n_steps=2",
    )
    settings, *rows, text = lines_of(folder)
    assert settings["settings"]["attention"]["n_kv_heads"] == 0.5
    assert settings["settings"]["planned"]["steps"] == 4
    assert text["text"] == "sample"
    assert [row["step"] for row in rows] == [1, 2, 4]  # one a step, whoever logs
    assert [row["tokens"] for row in rows] == [128, 256, 512]
    for row in rows:
        assert row["train/loss"] > 0
    # Lightning logs at log_every_n_steps as it counts them, which leaves the first step out
    assert [row["step"] for row in rows if row.get("spread", 0) > 0] == [2, 4]
    logged = [row for row in rows if "lr-AdamW/matrices" in row]
    assert [row["step"] for row in logged] == [2, 4]
    assert all(row["lr-AdamW/matrices"] == pytest.approx(row["lr"]) for row in logged)
    assert [row["step"] for row in rows if "val/loss" in row] == [2, 4]
    csv = read_rows(folder / "metrics.csv")[1]
    assert [(int(row["step"]), float(row["train/loss"])) for row in csv] == [
        (row["step"], row["train/loss"]) for row in rows
    ]


def test_a_metric_of_validation_is_one_function(outside: Callable[..., Path]) -> None:
    folder = outside("metrics=confidence", "callbacks=default")
    summary = read_mapping(folder / "summary.json")
    _, last = read_rows(folder / "metrics.csv")[1]
    assert float(last["val/confidence"]) == summary["metrics"]["confidence"]
    # by the model's own checkpoint, over validation tokens of no particular batch: a probability near 1/257
    model = LanguageModel.load_from_checkpoint(folder / "checkpoints" / "last.ckpt").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        probabilities = model.decoder.logits(torch.randint(257, (8, 32), generator=generator)).softmax(dim=-1)
    assert summary["metrics"]["confidence"] == pytest.approx(probabilities.amax(dim=-1).mean().item(), rel=0.2)


def test_a_sweep_with_foreign_loggers_and_callbacks_ends_in_a_report(
    text_corpus: Path, shards_dir: Path, tmp_path: Path
) -> None:
    lines = tiny(
        text_corpus, shards_dir, "budget.steps=2", "metrics=confidence", "logger=json_lines", "callbacks=monitored"
    )
    swept = ["attention=mha,gqa", "seed=1,2", f"hydra.sweep.dir={tmp_path}/sweep"]
    done = programs.run("train.py", f"--config-dir={OUTSIDE}/conf", "-m", *lines, *swept, path=OUTSIDE)
    assert done.returncode == 0, done.stdout + done.stderr
    report = (tmp_path / "sweep" / "report.html").read_text()
    assert "mha" in report
    assert "confidence" in report


class OtherText(JsonLines):
    """Its methods of these names are of another kind."""

    def log_text(self, content: str) -> None:  # type: ignore[override]
        raise AssertionError

    def log_figure(self, file: str) -> None:
        raise AssertionError


def test_a_logger_whose_methods_take_something_else_is_left_alone(run: Callable[..., Path]) -> None:
    folder = run(f"+logger.other={{_target_: {__name__}.OtherText}}")
    assert [line.get("step") for line in lines_of(folder)] == [None, 1, 2]
    assert (folder / "sample.txt").exists()
