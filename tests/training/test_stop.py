"""Ranks that agree to stop. tests/integration/test_stopped_runs.py sends signals to whole runs."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ranks import Case, train_in_processes
from thunderhead.training.callbacks import stop as stopping
from thunderhead.training.callbacks.stop import StopOnSignal
from tiny import tiny

WORKER = str(Path(__file__).with_name("stop_worker.py"))


def test_no_rank_ends_before_the_checkpoint_is_written(text_corpus: Path, shards_dir: Path, tmp_path: Path) -> None:
    """Else launchers would end the rank that is writing."""
    lines = tiny(text_corpus, shards_dir, "strategy=ddp", "trainer.devices=2", "callbacks=default", "budget.steps=40")
    case = Case(tmp_path / "run", [*lines, "background_checkpoints=true"])
    assert train_in_processes(2, [case], tmp_path / "work", WORKER) == [{"status": 143, "kept": True}] * 2


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """After which of 30 steps, every tenth of which is logged, one of two ranks asks the other."""

    def ask(mine: float, other: float, number: int = 0, meanwhile: int | None = None) -> list[int]:
        """Steps of `mine` and of `other` seconds; the other got the signal `number`, this one `meanwhile` it waits."""
        clock, steps = 0.0, []
        trainer: Any = SimpleNamespace(
            world_size=2, global_step=0, log_every_n_steps=10, accumulate_grad_batches=1, max_steps=30,
            strategy=SimpleNamespace(root_device="cpu"), checkpoint_callbacks=[], should_stop=False,
        )  # fmt: skip
        stop = StopOnSignal(Path("none"))

        def all_reduce(highest: torch.Tensor, op: Any) -> None:
            last = steps[-1] if steps else 0
            steps.append(trainer.global_step)
            highest.copy_(torch.maximum(highest, torch.tensor([number, other * (steps[-1] - last)])))
            stop.received = meanwhile

        monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
        monkeypatch.setattr(stopping.time, "monotonic", lambda: clock)
        module: Any = None
        stop.on_train_start(trainer, module)
        for step in range(1, 31):
            clock += mine
            trainer.global_step = step
            stop.on_train_batch_end(trainer, module, None, None, step - 1)
            if trainer.should_stop:
                break
        stop.on_train_end(trainer, module)
        assert stop.received == (number or meanwhile)
        assert trainer.should_stop == bool(number or meanwhile)
        return steps

    return ask


def test_ranks_ask_at_logged_steps_and_more_often_where_steps_are_slow(asked: Callable[..., list[int]]) -> None:
    assert asked(0.1, 0.1) == [1, 10, 20, 30]
    assert asked(2.0, 2.0) == [1, 3, 5, 7, 9, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30]
    assert asked(30.0, 30.0) == list(range(1, 31))


def test_ranks_ask_at_the_same_steps_whatever_their_clocks_say(asked: Callable[..., list[int]]) -> None:
    for mine, other in ((0.1, 2.0), (2.0, 3.0), (0.1, 30.0)):
        assert asked(mine, other) == asked(other, mine) == asked(max(mine, other), max(mine, other))


def test_a_signal_is_agreed_on_and_one_that_comes_meanwhile_is_not_forgotten(asked: Callable[..., list[int]]) -> None:
    assert asked(0.1, 0.1, number=15) == [1]
    assert asked(0.1, 0.1, meanwhile=15) == [1, 10]
