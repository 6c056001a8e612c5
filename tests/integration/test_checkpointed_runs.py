"""Activation checkpointing through train.py: in several processes, compiled, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ranks import Case, train_in_processes
from thunderhead.core.config import ConfigError
from thunderhead.training.record import read_rows
from tiny import tiny

STRATEGIES = {
    "ddp": ["strategy=ddp", "dropout=gpt2"],
    "fsdp": ["strategy=fsdp", "dropout=gpt2"],
    "tensor_parallel": ["strategy=tensor_parallel", "dropout=gpt2"],
}
EVERY = [(strategy, option) for strategy in STRATEGIES for option in ("block", "every_kth", "selective")]


def losses(folder: Path) -> list[str]:
    return [row["train/loss"] for row in read_rows(folder / "metrics.csv")[1] if row["train/loss"]]


@pytest.mark.slow
def test_losses_are_the_same_under_every_strategy(text_corpus: Path, shards_dir: Path, tmp_path: Path) -> None:
    cases = {
        (strategy, option): Case(
            tmp_path / f"{strategy}-{option}",
            tiny(
                text_corpus,
                shards_dir,
                *("trainer=cpu", "trainer.devices=2", "trainer.log_every_n_steps=1", "budget=steps", "budget.steps=3"),
                *("attention=mha", *STRATEGIES[strategy], f"activation_checkpointing={option}", "batch.micro_size=1"),
            ),
        )
        for strategy, option in [*EVERY, *((strategy, "none") for strategy in STRATEGIES)]
    }
    results = train_in_processes(2, cases.values(), tmp_path / "work")
    assert not any("error" in result for result in results), results
    for strategy, option in EVERY:
        expected = losses(cases[strategy, "none"].folder)
        assert len(set(expected)) == 3
        assert losses(cases[strategy, option].folder) == expected, (strategy, option)


def test_dropout_that_would_not_be_repeated_is_refused(run: Callable[..., Path]) -> None:
    settings = ("compile=block", "compile.backend=eager", "activation_checkpointing=selective", "attention.dropout=0.1")
    with pytest.raises(ConfigError, match=r"^compile\.backend=eager: does not repeat dropout's random numbers"):
        run(*settings)
    run("compile=none", *settings[1:])
