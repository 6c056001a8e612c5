"""document_losses.json: what each document of validation gave to the loss."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from thunderhead.core.config import read_mapping
from thunderhead.core.module import LanguageModel
from thunderhead.core.run import build_data
from thunderhead.training.callbacks import documents


@pytest.mark.parametrize("most", [documents.MOST, 3])
def test_each_document_has_its_part(run: Callable[..., Path], most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a walk over the text that is validated on, in which a document ends after its EOS."""
    monkeypatch.setattr(documents, "MOST", most)
    folder = run("callbacks=default", "data.max_validation_bytes=12000", "batch.micro_size=4", "validation.every=1")
    summary, kept = read_mapping(folder / "summary.json"), read_mapping(folder / "document_losses.json")
    assert kept["steps"] == summary["steps"]
    (found,) = kept["sources"].values()
    model = LanguageModel.load_from_checkpoint(folder / "checkpoints" / "last.ckpt").eval()
    data: Any = build_data(read_mapping(folder / "config.yaml"), context_length=32, sequences_per_step=4)
    data.prepare_data()
    (source,) = data.validation_sources()
    blocks = data.val_dataset(source)
    nats, n_targets = [0.0], [0]
    for number in range(len(blocks)):
        tokens = blocks[number]
        with torch.no_grad():
            logits = model.decoder.logits(torch.where(tokens < 0, ~tokens, tokens)[None, :-1])[0].double()
        for scores, target in zip(logits, tokens[1:].tolist(), strict=True):
            if target >= 0:
                nats[-1] += F.cross_entropy(scores, torch.tensor(target)).item()
                n_targets[-1] += 1
                if target == data.eos_id:
                    nats.append(0.0)
                    n_targets.append(0)
    assert n_targets.pop() == nats.pop() == 0
    assert len(nats) > 3
    in_a_row = -(-len(nats) // most)
    groups = [slice(start, start + in_a_row) for start in range(0, len(nats), in_a_row)]
    assert found["targets"] == [sum(n_targets[group]) for group in groups]
    # float32 logits, and four decimals in the file
    assert found["nats"] == pytest.approx([sum(nats[group]) for group in groups], rel=1e-5, abs=1e-4)
    assert sum(found["nats"]) / sum(found["targets"]) == pytest.approx(summary["val_loss"], rel=1e-5)
    assert sum(found["nats"]) / found["bytes"] / math.log(2) == pytest.approx(summary["bits_per_byte"], rel=1e-5)


def test_a_task_has_no_documents(run: Callable[..., Path]) -> None:
    assert not (run("data=induction", "data.max_validation_tokens=256") / "document_losses.json").exists()
