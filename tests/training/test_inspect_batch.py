"""`python inspect_batch.py run=… step=…`: what was trained on, against what a callback saw."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback

from thunderhead.core import config
from thunderhead.core.config import ConfigError, read_mapping
from thunderhead.core.tokenizer import EOS
from thunderhead.corpus.trained_tokenizers import ByteTokenizer
from thunderhead.training.inspect_batch import first_sample, text_of_batch

SEEN: dict[int, list[torch.Tensor]] = {}


class Spy(Callback):
    """Keeps what each step is trained on."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: torch.Tensor, batch_idx: int) -> None:
        SEEN.setdefault(trainer.global_step + 1, []).append(batch.clone())


def shown(folder: Path, step: int, *overrides: str) -> list[tuple[str, str]]:
    """(headline, text) of each sequence."""
    text = text_of_batch(config.compose([f"run={folder}", f"step={step}", *overrides], "inspect_batch"))
    parts = text.split("\n\n── ")
    return [(head, body) for head, _, body in (part.partition("\n") for part in parts[1:])]


def expected(step: int) -> list[str]:
    tokenizer, rows = ByteTokenizer(), torch.cat(SEEN[step]).tolist()
    texts = []
    for row in rows:
        text = "".join(chr(token) if token < 128 else "\N{REPLACEMENT CHARACTER}" for token in row if token < 256)
        assert tokenizer.decode([t for t in row if t < 256]) == text  # the corpus is ASCII
        texts.append(text)
    return texts


@pytest.mark.parametrize("data", ["text", "mixture"])
def test_it_shows_what_the_step_was_trained_on(data: str, run: Callable[..., Path]) -> None:
    SEEN.clear()
    folder = run(f"data={data}", "budget.steps=4", "+callbacks.spy={_target_: test_inspect_batch.Spy}")
    for step in (1, 3, 4):
        found = shown(folder, step)
        assert [body.replace(f"\n{EOS}\n", "") for _, body in found] == expected(step)
        assert [int(head.split()[0].replace(",", "")) for head, _ in found] == [*range(4 * step - 4, 4 * step)]
        assert all(("code" in head or "prose" in head) if data == "mixture" else "text" in head for head, _ in found)
    assert shown(folder, 3, "sequences=2") == shown(folder, 3)[:2]


def test_after_a_rollback_the_window_is_left_out(run: Callable[..., Path]) -> None:
    SEEN.clear()
    poisoned = "+callbacks.poison={_target_: poison.Poison, steps: [4], once: true}"
    settings = ("callbacks=default", "callbacks.checkpoint.every_n_train_steps=2", "budget.steps=6", poisoned)
    folder = run(*settings, "on_divergence=rollback", "+callbacks.spy={_target_: test_inspect_batch.Spy}")
    [event] = read_mapping(folder / "summary.json")["rollbacks"]
    assert event["to"] < 4
    for step in (1, 5, 6):
        rows = torch.cat(SEEN[step][-2:])  # the last time that this step was taken: two micro-batches
        texts = [ByteTokenizer().decode([t for t in row if t < 256]) for row in rows.tolist()]
        assert [body.replace(f"\n{EOS}\n", "") for _, body in shown(folder, step)] == texts
    assert [first_sample(step, 4, [event]) for step in (1, event["to"] + 1)] == [0, event["next_sample"]]


def test_a_task_has_text_too(run: Callable[..., Path]) -> None:
    folder = run("data=induction")
    assert len(shown(folder, 2)) == 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["step=3"], "step: 3 is beyond the plan"),
        (["step=0"], "step: 0 is not accepted"),
        (["run=nowhere", "step=1"], "no run"),
    ],
)
def test_what_cannot_be_shown_is_refused(overrides: list[str], message: str, run: Callable[..., Path]) -> None:
    folder = run()
    with pytest.raises(ConfigError, match=message):
        text_of_batch(config.compose([f"run={folder}", *overrides], "inspect_batch"))


def test_shards_that_are_gone_are_told(run: Callable[..., Path], tmp_path: Path) -> None:
    folder = run()
    (folder / "config.yaml").write_text((folder / "config.yaml").read_text().replace("shards_dir: ", "shards_dir: x"))
    with pytest.raises(ConfigError, match="not there any more"):
        shown(folder, 1)
