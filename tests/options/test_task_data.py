"""Runs on synthetic tasks: loss and accuracy of the answers only, and a record that says so."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning import Trainer
from torch.nn import functional as F
from torch.utils.data import DataLoader

from thunderhead.core import config
from thunderhead.core.config import ConfigError
from thunderhead.core.metrics import as_metric
from thunderhead.core.model.loss import IGNORED_TARGET
from thunderhead.core.model_spec import ModelSpec
from thunderhead.core.module import LanguageModel, inputs_and_targets
from thunderhead.corpus.command import prepare_corpus
from thunderhead.options.synthetic_tasks import Induction
from thunderhead.options.task_data import TaskSequences, is_most_probable, sample_answers
from thunderhead.release.sample import NextTokenModel
from thunderhead.training.record import read_rows, read_summary
from tiny import tiny

TASK = Induction(vocabulary=20)


def test_inputs_and_targets() -> None:
    text = torch.tensor([[3, 0, 2, 1]])
    inputs, targets = inputs_and_targets(text)
    assert torch.equal(inputs, text[:, :-1])
    assert torch.equal(targets, text[:, 1:])
    inputs, targets = inputs_and_targets(torch.tensor([[~3, ~0, 0, 1, ~2]]))
    assert inputs.tolist() == [[3, 0, 0, 1]]
    assert targets.tolist() == [[IGNORED_TARGET, 0, 1, IGNORED_TARGET]]


def test_loss_and_accuracy_are_those_of_the_answers() -> None:
    resolved = config.plain(config.compose(tiny("x", "x", "compile=none")))
    model = LanguageModel(
        ModelSpec.of(resolved),
        seed=1,
        vocab_size=TASK.eos_id + 1,
        eos_id=TASK.eos_id,
        total_steps=1,
        metrics=lambda source: {"accuracy": as_metric(is_most_probable)},
    )
    data = TaskSequences(TASK, "val", 0, 32)
    batches = [data.__getitems__([0, 1, 2]), data.__getitems__([3])]
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.validate(model, DataLoader(batches, batch_size=None), verbose=False)
    found = {name: value.item() for name, value in trainer.callback_metrics.items()}

    losses, right = [], []
    for n in range(4):
        tokens, is_answer = TASK.sequence("val", 0, n, 32)
        with torch.no_grad():
            logits = model.decoder.logits(torch.from_numpy(tokens[None, :-1]))[0]
        for position in is_answer.nonzero()[0]:
            expected = torch.tensor(tokens[position])
            losses.append(F.cross_entropy(logits[position - 1], expected).item())
            right.append(logits[position - 1].argmax().item() == expected)
    assert len(losses) == 4 * 15
    assert found["val/loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)  # the order of float32 sums
    assert found["val/accuracy"] == pytest.approx(sum(right) / len(right))
    assert "val/bits_per_byte" not in found


class Copier:
    """Says what followed the latest earlier occurrence of each token, as a perfect model would."""

    training = False
    context_length = 32

    def __init__(self, wrong: int = 0):
        self.wrong = wrong

    def logits(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        row = tokens_BT[0].tolist()
        said = [row[t - row[t - 1 :: -1].index(row[t])] if row[t] in row[:t] else 0 for t in range(len(row))]
        return F.one_hot(torch.tensor([(s + self.wrong) % 20 for s in said]), TASK.eos_id + 1).float()[None]

    def eval(self) -> None: ...

    def train(self, mode: bool = True) -> None: ...


def test_answers_are_marked() -> None:
    copier: NextTokenModel = Copier()
    right = sample_answers(copier, TASK, torch.device("cpu"), sequences=2)  # type: ignore[arg-type]
    assert [line.count("✓") for line in right.splitlines()] == [15, 15]
    assert "✗" not in right
    tokens, is_answer = TASK.sequence("val", 0, 0, 32)
    written = right.splitlines()[0].split(" ")
    assert [w.rstrip("✓") for w in written] == ["|", *(f"s{t}" for t in tokens[1:])]
    assert [w.endswith("✓") for w in written] == is_answer.tolist()
    wrong = sample_answers(Copier(wrong=1), TASK, torch.device("cpu"), sequences=1)  # type: ignore[arg-type]
    last = tokens[-1]
    assert wrong.endswith(f"s{last}✗s{(last + 1) % 20}")


def test_a_run_records_its_accuracy(run: Callable[..., Path]) -> None:
    folder = run("data=associative_recall", "callbacks=default", "logger=default")
    summary = read_summary(folder)
    assert summary is not None
    assert 0 <= summary["accuracy"] <= 1
    assert "bits_per_byte" not in summary
    assert summary["unigram_entropy"] == pytest.approx(math.log(16))
    rows = read_rows(folder / "metrics.csv")[1]
    assert [float(row["val/accuracy"]) for row in rows if row["val/accuracy"]][-1] == summary["accuracy"]
    assert len((folder / "sample.txt").read_text().splitlines()) == 3
    assert json.loads((folder / "tokenizer.json").read_text())["type"] == "symbols"
    assert json.loads((folder / "plan.json").read_text())["epochs"] == {}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["curation=basic"], "^curation: .*TaskData takes no filters, .*: use curation=none$"),
        (["budget=epochs"], r"^budget\.epochs: a synthetic task has no epochs: use budget=steps or budget=tokens$"),
        (["data.task.vocabulary=3"], r"^data\.task\.vocabulary=3 is too small"),
    ],
)
def test_what_makes_no_sense_is_refused(overrides: list[str], message: str, run: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=message):
        run("data=induction", *overrides)


def test_there_is_nothing_to_prepare() -> None:
    with pytest.raises(ConfigError, match="there is nothing to prepare"):
        prepare_corpus(config.compose(["data=induction"], "prepare"))
