"""The loss of every document that is validated on: how much a result hangs on the text that was chosen."""

from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from numpy.typing import NDArray
from torch import Tensor

from thunderhead.core.data.datamodule import asked
from thunderhead.core.model.loss import IGNORED_TARGET
from thunderhead.core.module import inputs_and_targets
from thunderhead.training import record

MOST = 10_000
"""Entries of a source in the file: of more documents, as many in a row share one."""


class DocumentLosses(Callback):
    """Sum the loss of each validation up by document, and keep that of the last one.

    Nothing is kept of data without documents, of a loss that does not tell each target's, or where batches are left
    out.
    """

    def __init__(self) -> None:
        self._sums: dict[int, NDArray[np.float64]] = {}  # by loader: nats and targets so far, (2, documents)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._sums = {}

    def on_validation_batch_end(  # noqa: PLR0917 - Lightning's
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Tensor,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Give each target's loss to the document that has it."""
        documents = self._documents(trainer, dataloader_idx)
        if outputs is None or documents is None:
            return
        each_BT, targets_BT = outputs.double().cpu().numpy(), inputs_and_targets(batch)[1].cpu().numpy()
        loaders: Any = trainer.val_dataloaders
        first, (n_rows, n_columns) = loaders[dataloader_idx].batch_sampler.starts[batch_idx], targets_BT.shape
        places = first * n_columns + np.arange(n_rows * n_columns)
        counts = targets_BT.flatten() != IGNORED_TARGET
        numbers = np.searchsorted(documents.cumsum(), places[counts], side="right")
        sums = self._sums.setdefault(dataloader_idx, np.zeros((2, len(documents))))
        np.add.at(sums[0], numbers, each_BT.flatten()[counts])
        np.add.at(sums[1], numbers, 1.0)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add up what ranks have, and write it."""
        names = asked(trainer.datamodule, "validation_sources")()  # type: ignore[attr-defined]
        if trainer.sanity_checking or len(self._sums) < len(names):
            return
        kept = {}
        for number, source in enumerate(names):
            sums = torch.from_numpy(self._sums[number]).to(pl_module.device)
            nats, counted = trainer.strategy.reduce(sums, reduce_op="sum").cpu().numpy()
            documents = self._documents(trainer, number)
            assert documents is not None
            if not (counted >= documents).all():
                return
            nats *= documents / counted  # ranks that share a model have all counted
            starts = range(0, len(documents), -(-len(documents) // MOST))
            nats, targets = (np.add.reduceat(values, starts) for values in (nats, documents))
            _, n_bytes = asked(trainer.datamodule, "validation_documents")(source)  # type: ignore[attr-defined]
            kept[source] = {"nats": nats.round(4).tolist(), "targets": targets.tolist(), "bytes": n_bytes}
        if trainer.is_global_zero:
            record.keep_documents(trainer.default_root_dir, kept, trainer.global_step)

    @staticmethod
    def _documents(trainer: Trainer, loader: int) -> NDArray[np.int64] | None:
        """Targets of each document of a loader."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        names = asked(data, "validation_sources")()
        # data of others need not name its loaders
        found = asked(data, "validation_documents")(names[loader]) if loader < len(names) else None
        return None if found is None else found[0]
