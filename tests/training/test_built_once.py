"""How often a run builds its components."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning import Callback
from torch.optim import AdamW

from thunderhead.core.model.decoder import Decoder
from thunderhead.corpus.text_data import TextData
from thunderhead.training.record import MetricsCsv

pytestmark = pytest.mark.usefixtures("memory_is_counted")


class Idle(Callback):
    """Does nothing."""


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many objects of each of these classes were made."""
    counts: Counter[str] = Counter()

    def count(cls: type) -> None:
        make = cls.__init__

        def init(self: Any, *arguments: Any, **settings: Any) -> None:
            counts[cls.__name__] += 1
            make(self, *arguments, **settings)

        monkeypatch.setattr(cls, "__init__", init)

    for cls in (Decoder, AdamW, MetricsCsv, Idle, TextData):
        count(cls)
    return counts


def test_a_prepared_run_builds_each_component_once(run: Callable[..., Path], built: Counter[str]) -> None:
    run()  # prepares the data
    built.clear()
    run(f"+callbacks.idle={{_target_: {__name__}.Idle}}")
    # of decoder and optimizer one that is planned with, without storage, and one that trains
    assert built == {"Decoder": 2, "AdamW": 2, "MetricsCsv": 1, "Idle": 1, "TextData": 1}


def test_preparing_builds_nothing_again(run: Callable[..., Path], built: Counter[str], shards_dir: Path) -> None:
    """Unless the vocabulary is another one than was thought, which the byte tokenizer's never is."""
    before = len(list(shards_dir.iterdir()))
    run("data.validation_fraction=0.31", f"+callbacks.idle={{_target_: {__name__}.Idle}}")
    assert built == {"Decoder": 2, "AdamW": 2, "MetricsCsv": 1, "Idle": 1, "TextData": 1}
    assert len(list(shards_dir.iterdir())) > before
