"""Components from outside of the package, trained from start to end by `train.py` and its record."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from crash import Crash
from thunderhead import command_line
from thunderhead.core.config import read_mapping
from tiny import tiny, train_here

SEARCH = f"hydra.searchpath=[file://{Path(__file__).parent}/conf]"
pytestmark = pytest.mark.usefixtures("memory_is_counted")
SETTINGS = ("budget.steps=6", "validation.every=3", "trainer.log_every_n_steps=1")


@pytest.fixture
def trained(run: Callable[..., Path]) -> Callable[..., Path]:
    return lambda *overrides: run(SEARCH, *SETTINGS, *overrides)


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    "choices",
    [
        ("attention=gated_delta_rule", "attention.chunk=8", "position=none"),
        ("attention=local_global", "attention.window=8", "attention.global_every=2", "position=rope"),
    ],
    ids=lambda choices: choices[0],
)
def test_mixers_train_and_write_text(choices: tuple[str, ...], trained: Callable[..., Path]) -> None:
    folder = trained(*choices)
    losses = [float(row["train/loss"]) for row in rows_of(folder)]
    assert losses[-1] < losses[0]
    summary = read_mapping(folder / "summary.json")
    assert summary["cache_bytes_per_token"] > 0
    assert summary["decode_tokens_per_second"] > 0
    assert (folder / "sample.txt").read_text()


def test_experts_balance_is_logged_reported_and_resumed_bitwise(
    trained: Callable[..., Path], text_corpus: Path, shards_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ("activation=mixture_of_experts", "loss.z_loss=1.0e-4", "callbacks=default")
    every = "callbacks.checkpoint.every_n_train_steps=2"
    whole = trained(*lines, every)
    for row in rows_of(whole):
        # two layers, each at least about its least value 0.01 · 1, and little more in so few steps
        assert 0.019 < float(row["train/balance"]) < 0.04
        assert 0 < float(row["train/z_loss"]) < 0.1
    terms = read_mapping(whole / "summary.json")["loss_terms"]
    assert terms["balance"] == float(rows_of(whole)[-1]["train/balance"])
    dense, plan = read_mapping(trained() / "plan.json"), read_mapping(whole / "plan.json")
    # of four experts two are active, and a router of 32 × 4
    matrices = dense["parameters"]["feedforward"]
    assert plan["flops_per_token"] - dense["flops_per_token"] == 3 * 2 * (matrices + 2 * 32 * 4)
    assert plan["parameters"]["feedforward"] == 4 * matrices + 2 * 32 * 4

    folder = tmp_path / "killed"
    crash = "+callbacks.crash={_target_: crash.Crash, after: 5}"
    with pytest.raises(KeyError, match="pulled the plug"):
        train_here([SEARCH, *tiny(text_corpus, shards_dir, *SETTINGS, *lines, every), crash], folder)
    assert Crash is not None
    monkeypatch.setattr(command_line, "invocation_overrides", lambda: ["callbacks.crash.after=1000"])
    train_here([f"resume={folder}"], tmp_path / "new")
    kept = ("step", "train/loss", "train/balance", "train/z_loss", "grad_norm", "val/loss", "lr")
    assert [[row[name] for name in kept] for row in rows_of(folder)] == [
        [row[name] for name in kept] for row in rows_of(whole)
    ]


def test_every_learning_rate_is_logged(trained: Callable[..., Path]) -> None:
    folder = trained("optimizer=soap", "optimizer.lr=3.0e-3", "optimizer.embedding_lr=1.0e-3")
    for row in rows_of(folder):
        assert float(row["lr/embeddings"]) == pytest.approx(float(row["lr"]) / 3)
    assert read_mapping(folder / "summary.json")["val_loss"] < 5.6


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_a_foreign_data_module_trains_and_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = tiny(tmp_path, tmp_path, "data=progressions", *SETTINGS, "callbacks=default")
    kept = [line for line in lines if not line.startswith(("data.path", "data.shards_dir", "tokenizer"))]
    folder = tmp_path / "run"
    train_here([SEARCH, *kept, "callbacks.checkpoint.every_n_train_steps=2"], folder)
    summary = read_mapping(folder / "summary.json")
    assert summary["steps"] == 6
    assert rows_of(folder)[-1]["val/loss"] == str(summary["val_loss"])
    monkeypatch.setattr(command_line, "invocation_overrides", lambda: ["budget.steps=8"])
    train_here([f"resume={folder}"], tmp_path / "new")
    assert [row["step"] for row in rows_of(folder)] == [str(step) for step in range(1, 9)]
