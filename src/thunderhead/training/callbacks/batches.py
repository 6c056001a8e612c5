"""Refuse data whose batches are not those that the plan counts on: tokens, gradients and budgets would be wrong."""

from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from thunderhead.training.plan import Plan


class CheckBatches(Callback):
    """Check the training batches of any LightningDataModule.

    At the end of an epoch Lightning takes a step with the micro-batches that are left, each still weighted as one of
    a whole step, and a DataLoader gives the sequences that are left.

    Args:
        plan: of the run.
    """

    def __init__(self, plan: Plan):
        self.plan = plan

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse epochs that end within a step.

        Raises:
            ValueError: they do, before the run ends.
        """
        n_batches, accumulated = trainer.num_training_batches, self.plan.accumulation
        if n_batches > self.plan.steps * accumulated:  # the run ends before
            return
        loader: Any = trainer.train_dataloader
        size = loader.batch_size if isinstance(loader, DataLoader) and not loader.drop_last else None
        if size and hasattr(loader.sampler, "__len__") and len(loader.sampler) % size:
            raise ValueError(
                f"data: {len(loader.sampler):,} training sequences are no multiple of a batch of {size}, and the last"
                " batch of an epoch would be smaller: make the DataLoader with drop_last=True"
            )
        if n_batches % accumulated:
            raise ValueError(
                f"data: an epoch has {n_batches:,} batches and a step {accumulated}, so that the last step of an epoch"
                f" would be smaller: give a multiple of {accumulated}, or set batch.micro_size higher"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Compare a batch with the plan.

        Raises:
            ValueError: it is no tensor, or of another shape.
        """
        expected = (self.plan.micro_batch_size, self.plan.context_length + 1)
        if not isinstance(batch, Tensor):
            raise ValueError(f"data: a batch is a {type(batch).__name__}, and should be a tensor of token ids (B, T+1)")
        if batch.shape != expected:
            raise ValueError(
                f"data: a batch has the shape {tuple(batch.shape)}, and should have {expected}: make its loader"
                " with self.micro_batch_size, which the plan sets, and model.context_length + 1 tokens"
            )
