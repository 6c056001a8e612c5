"""Ranks that agree to stop. tests/integration/test_stop.py sends signals to whole runs."""

from pathlib import Path

from ranks import Case, train_in_processes
from tiny import tiny

WORKER = str(Path(__file__).with_name("stop_worker.py"))


def test_no_rank_ends_before_the_checkpoint_is_written(text_corpus: Path, shards_dir: Path, tmp_path: Path) -> None:
    """Else launchers would end the rank that is writing."""
    lines = tiny(text_corpus, shards_dir, "strategy=ddp", "trainer.devices=2", "callbacks=default", "budget.steps=40")
    case = Case(tmp_path / "run", [*lines, "background_checkpoints=true"])
    assert train_in_processes(2, [case], tmp_path / "work", WORKER) == [{"status": 143, "kept": True}] * 2
