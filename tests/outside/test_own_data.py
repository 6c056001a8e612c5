"""Data of others: any LightningDataModule, and a subclass of ours, are built, asked and read like our own."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor

from thunderhead.core import components, config
from thunderhead.core.data.datamodule import Draw, asked
from thunderhead.core.data.manifest import Manifest
from thunderhead.core.run import build_data
from thunderhead.corpus.prepared_shards import PreparedShards

OUTSIDE = Path(__file__).parent
T, SEQUENCES = 16, 4


def built(*overrides: str) -> Any:
    """Compose, check and build the data of a run."""
    composed = config.compose([f"hydra.searchpath=[file://{OUTSIDE}/conf]", f"model.context_length={T}", *overrides])
    resolved = config.plain(composed)
    assert components.check(resolved) == []
    return build_data(resolved, context_length=T, sequences_per_step=SEQUENCES, micro_batch_size=2)


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(OUTSIDE))
    monkeypatch.delitem(sys.modules, "own_data", raising=False)


def test_filters_that_nothing_would_read_are_refused() -> None:
    with pytest.raises(config.ConfigError, match=r"^curation: .*takes no filters"):
        built("data=progressions", "curation=gopher")


class Recorder(lightning.LightningModule):
    """A model of one parameter that keeps the batches it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[Tensor] = []

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        self.seen.append(batch)
        return self.weight * batch.float().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_any_data_module_will_do() -> None:
    data = built("data=progressions", "+data.sequences=6")
    assert (data.vocab_size, asked(data, "eos_id")) == (14, 13)
    assert asked(data, "is_prepared")
    run = SimpleNamespace(context_length=T, sequences_per_step=SEQUENCES, budget=None, is_dry=False)
    assert asked(data, "problems")(run) == asked(data, "notes")() == []
    assert asked(data, "draw")(5) == Draw(5, None, None, (), ())
    assert asked(data, "ledger")(5)(12)["progressions"] == (12 * T, 1.0, 2.0)
    assert asked(data, "validation_sources")() == ["all"]
    assert asked(data, "validation_metrics")("all") == asked(data, "summary")() == {}
    for name in ("validation_data", "validation_text"):
        assert asked(data, name)() is None
    assert asked(data, "sample")(None, torch.device("cpu")) is None
    assert asked(data, "epoch_tokens") is asked(data, "unigram_entropy") is None
    model = Recorder()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = lightning.Trainer(accelerator="cpu", max_steps=4, max_epochs=-1, use_distributed_sampler=False, **quiet)
    trainer.fit(model, train_dataloaders=data.train_dataloader())
    assert [batch.shape for batch in model.seen] == [(2, T + 1)] * 4
    assert torch.equal(model.seen[3], model.seen[0])  # the next epoch
    assert model.seen[0][1].tolist() == [n % 13 for n in range(T + 1)]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+data.modulo=3", "data.modulo: is unknown to ProgressionData; did you mean modulus?"),
        ("+data.context_length=8", "data.context_length: is worked out by Thunderhead and cannot be set"),
        ("data.modulus=many", "data.modulus: 'many' is not accepted"),
    ],
)
def test_its_settings_are_checked_like_ours(override: str, message: str) -> None:
    composed = config.compose([f"hydra.searchpath=[file://{OUTSIDE}/conf]", "data=progressions", override])
    problems = components.check(config.plain(composed))
    assert [f"{path}: {told}"[: len(message)] for path, told in problems] == [message]


def test_a_subclass_of_prepared_shards_is_one(shards: Manifest) -> None:
    theirs = built("data=backwards", f"data.path={shards.folder}")
    ours = built("data=shards", f"data.path={shards.folder}")
    assert isinstance(theirs, PreparedShards)
    batches = []
    for data in (ours, theirs):
        assert data.problems(None) == []
        assert (data.is_prepared, data.vocab_size, data.epoch_tokens) == (True, 257, ours.epoch_tokens)
        assert data.tokenizer.name == "byte"
        assert data.draw(10) == ours.draw(10)
        strategy = SimpleNamespace(root_device=torch.device("cpu"))
        data.trainer = SimpleNamespace(global_step=0, max_steps=10, strategy=strategy, global_rank=0, world_size=1)
        data.prepare_data()
        data.setup("fit")
        batches.append(next(iter(data.train_dataloader())))
    assert torch.equal(batches[1][0], batches[0][0].flip(0))
    assert torch.equal(batches[1][1], batches[0][1])


class Unvalidated(lightning.LightningDataModule):
    """Says its vocabulary, and has nothing to validate on."""

    vocab_size = 7


def test_data_without_validation_are_refused_before_the_run() -> None:
    resolved = config.plain(config.compose([]))
    resolved["data"] = {"_target_": f"{__name__}.Unvalidated"}
    with pytest.raises(config.ConfigError, match=r"data: Unvalidated has no val_dataloader"):
        build_data(resolved, context_length=T, sequences_per_step=SEQUENCES)
