"""Loaders of others: what a run can count on is checked, several for validation are told apart."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from outside.own_data import ProgressionData
from thunderhead.core.config import ConfigError, read_mapping
from thunderhead.training.record import read_rows


class Several(ProgressionData):
    """Several loaders for validation, and batches that may be of another size."""

    def __init__(
        self, context_length: int, micro_batch_size: int,
        *, n_val: int = 1, names: tuple[str, ...] = (), size: int | None = None, sequences: int = 200,
        dtype: str = "int64", vocabulary: float | None = None, validation: str = "",
    ) -> None:  # fmt: skip
        super().__init__(context_length, micro_batch_size, sequences=sequences)
        self.n_val, self.size, self.dtype, self.validation = n_val, size, dtype, validation
        if vocabulary is not None:
            self.vocab_size: Any = vocabulary
        if names:
            self.validation_sources = lambda: list(names)

    def train_dataloader(self) -> DataLoader[Tensor]:
        self.micro_batch_size = self.size or self.micro_batch_size
        loader = super().train_dataloader()
        dtype = getattr(torch, self.dtype)
        loader.collate_fn = lambda rows: torch.stack(rows).to(dtype)
        return loader

    def val_dataloader(self) -> Any:
        if self.validation == "none":
            return None
        if self.validation == "long":
            return DataLoader(torch.ones(4, self.context_length + 2, dtype=torch.int64))
        if self.validation == "no targets":
            return DataLoader(torch.full((4, self.context_length + 1), -2))
        return [self._loader(8 * n, 8) for n in range(self.n_val)]


@pytest.fixture
def trained(run: Callable[..., Path], with_nodes: Callable[[dict[str, Any]], None]) -> Callable[..., Path]:
    def train(*overrides: str, **settings: Any) -> Path:
        with_nodes({"data": {"_target_": f"{__name__}.Several", **settings}, "tokenizer": None})
        return run(*overrides)

    return train


def test_loaders_without_names_are_numbered(trained: Callable[..., Path]) -> None:
    folder = trained("callbacks=default", n_val=3)
    _, last = read_rows(folder / "metrics.csv")[1]
    losses = [float(last[f"val/loss/{number}"]) for number in range(3)]
    assert len(set(losses)) == 3
    assert read_mapping(folder / "summary.json")["val_loss"] == pytest.approx(sum(losses) / 3)


def test_as_many_loaders_as_names(trained: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"^data: validation_sources\(\) names 2, and there are 3 loaders$"):
        trained(n_val=3, names=["a", "b"])


@pytest.mark.filterwarnings("ignore:Total length of:UserWarning")  # Lightning's, of no batches
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_val": 0}, "^data: val_dataloader gives no batch"),
        ({"sequences": 0}, "^data: train_dataloader gives no batch"),
        ({"size": 4}, r"^data: a batch has the shape \(4, 33\), and should have \(2, 33\)"),
        ({"sequences": 7}, r"^data: 7 training sequences are no multiple of a batch of 2"),
        ({"sequences": 6}, r"^data: an epoch has 3 batches and a step 2, .*: give a multiple of 2"),
        ({"dtype": "int32"}, r"^data: a batch has torch\.int32"),
        ({"validation": "long"}, r"^data: a batch of validation has the shape \(1, 34\)"),
        ({"vocabulary": 9}, r"^data: a batch of validation has the token id 1\d"),
        ({"vocabulary": 0}, r"^data: vocab_size is 0"),
        ({"vocabulary": 17.0}, r"^data: vocab_size is 17\.0"),
    ],
)
def test_steps_that_would_be_smaller_are_refused(
    settings: dict[str, Any], message: str, trained: Callable[..., Path]
) -> None:
    with pytest.raises(ConfigError, match=message):
        trained(**settings)


@pytest.mark.parametrize(
    ("validation", "words"),
    [("none", "invalid dataloader"), ("no targets", "has no target")],
)
def test_a_validation_that_gives_no_loss_is_refused(
    validation: str, words: str, trained: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        trained(validation=validation)
    assert ended.value.code == 1
    assert words in capsys.readouterr().err


def test_epochs_of_whole_steps_are_not(trained: Callable[..., Path]) -> None:
    folder = trained("budget.steps=3", sequences=8)
    assert len(read_rows(folder / "metrics.csv")[1]) == 3


class Unseeded(Several):
    """Divides its data as many tutorials do, by the global generator."""

    def setup(self, stage: str) -> None:
        self.drawn = torch.rand(())

    def train_dataloader(self) -> DataLoader[Tensor]:
        loader = super().train_dataloader()
        order = torch.randperm(len(loader.dataset)) if self.drawn >= 0 else None  # type: ignore[arg-type]
        subset = torch.utils.data.Subset(loader.dataset, order.tolist())  # type: ignore[union-attr]
        return DataLoader(subset, batch_size=self.micro_batch_size, shuffle=True)


def test_data_that_draws_from_the_global_generator_follows_the_seed(
    run: Callable[..., Path], with_nodes: Callable[[dict[str, Any]], None]
) -> None:
    with_nodes({"data": {"_target_": f"{__name__}.Unseeded"}, "tokenizer": None})
    losses = [read_mapping(run(f"seed={seed}") / "summary.json")["val_loss"] for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]
