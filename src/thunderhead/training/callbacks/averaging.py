"""Averaged weights beside those that are trained: an exponential moving average, or the mean of the last few."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import torch
from annotated_types import Ge, Lt
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from thunderhead.core.metrics import Mean
from thunderhead.core.model.loss import IGNORED_TARGET
from thunderhead.core.module import LanguageModel, inputs_and_targets
from thunderhead.core.types import PositiveInt, Problem
from thunderhead.parallel.strategies import whole_weights


class AverageWeights(Callback):
    """After each optimizer step: average ← d · average + (1 − d) · weights, in float32 (Polyak & Juditsky 1992).

    d is `decay`, at the beginning less: (1 + steps) / (10 + steps), so that the random weights are soon forgotten (as
    TensorFlow's ExponentialMovingAverage). Training does not see the average. Each validation measures it on the same
    batches, as val/loss_averaged (nats a token), and checkpoints hold it beside the weights, for averaged=true of
    generate.py, evaluate.py and export.py. Lightning's WeightAveraging validates the average alone, and ends with it
    in place of the weights, from which no run could go on exactly.

    - decay: 0.999 averages over about 1,000 steps.
    """

    bytes_per_parameter = 4
    """For the plan of memory."""

    def __init__(self, *, decay: Annotated[float, Ge(0), Lt(1)] = 0.999):
        self.decay = decay
        self.average: dict[str, Tensor] = {}  # by parameter name of the decoder
        self._step = 0  # steps that it has
        self._losses: list[Mean] = []  # of each source of the validation under way

    def problems(self, run: Any) -> list[Problem]:
        """It holds whole weights, and is the only one: a checkpoint has room for one average."""
        found = whole_weights(run, "averaged weights are whole")
        others = [name for name, each in run.callbacks.items() if isinstance(each, AverageWeights)]
        if len(others) > 1 and run.callbacks[others[0]] is self:
            message = f"{' and '.join(others)} both average the weights, and a run has one average: choose one"
            found.append(Problem("callbacks", message))
        return found

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.average:
            self._begin(_parameters(pl_module))
            self._step = trainer.global_step
        self.average = {name: tensor.to(pl_module.device) for name, tensor in self.average.items()}

    def _begin(self, parameters: Mapping[str, Tensor]) -> None:
        self.average = _copies(parameters)

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Take a step's weights in; Lightning calls what writes checkpoints afterwards."""
        if trainer.global_step == self._step:  # between the micro-batches of a step
            return
        self._step = trainer.global_step
        self._take(_parameters(pl_module))

    def _take(self, parameters: Mapping[str, Tensor]) -> None:
        decay = min(self.decay, (1 + self._step) / (10 + self._step))
        weights = [parameter.float() for parameter in parameters.values()]
        torch._foreach_lerp_([*self.average.values()], weights, 1 - decay)

    @contextlib.contextmanager
    def in_place(self, pl_module: LightningModule) -> Iterator[None]:
        """Compute with the average for as long as this lasts."""
        parameters = _parameters(pl_module)
        weights = {name: parameter.data for name, parameter in parameters.items()}
        try:
            for name, parameter in parameters.items():
                parameter.data = self.average[name].to(parameter.dtype)
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.data = weights[name]

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        n_sources = len(pl_module.val_loss) if self.average and isinstance(pl_module, LanguageModel) else 0
        self._losses = [Mean().to(pl_module.device) for _ in range(n_sources)]

    def on_validation_batch_end(  # noqa: PLR0917 - Lightning's
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Measure the average on what the weights were measured on."""
        if not self._losses:
            return
        assert isinstance(pl_module, LanguageModel)
        inputs_BT, targets_BT = inputs_and_targets(batch)
        n_targets = (targets_BT != IGNORED_TARGET).sum()
        with self.in_place(pl_module), trainer.precision_plugin.forward_context():
            loss = pl_module.decoder(inputs_BT, targets_BT).cross_entropy
        self._losses[dataloader_idx].update(torch.where(n_targets > 0, loss, 0.0), n_targets)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Publish the plain mean over the sources, as val/loss is."""
        if self._losses:
            found = torch.stack([loss.compute() for loss in self._losses]).mean()
            pl_module.log("val/loss_averaged", found, logger=False, sync_dist=False)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["averaged"] = {f"decoder.{name}": tensor for name, tensor in self.average.items()}
        checkpoint["averaged_steps"] = self._step

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on from there; where a run had none before, the average begins with its weights."""
        saved = checkpoint.get("averaged", {})
        self.average = {name.removeprefix("decoder."): tensor.clone() for name, tensor in saved.items()}
        self._step = checkpoint.get("averaged_steps", 0)


class AverageLatest(AverageWeights):
    """The mean of the weights at the last k multiples of `every` steps: LAWA (Kaddour 2022, 2209.14981).

    Before there are k, of those that there are; before the first, there is no average. It is validated, kept and used
    as that of AverageWeights. Each of the k is held, so that one may be left out again, and the mean has no rounding
    of its past.

    - k: of Sanyal et al. 2023 (2306.03241), in pretraining at high learning rates.
    - every: steps; k · every is what the average reaches back.
    """

    def __init__(self, *, k: Annotated[int, Ge(2)] = 5, every: PositiveInt = 20):
        super().__init__()
        self.k, self.every = k, every
        self.bytes_per_parameter = 4 * (k + 1)
        self._latest: list[dict[str, Tensor]] = []  # the oldest first

    def _begin(self, parameters: Mapping[str, Tensor]) -> None:
        """There is nothing to begin with: random weights would be a part of the mean."""

    def _take(self, parameters: Mapping[str, Tensor]) -> None:
        if self._step % self.every == 0:
            self._latest = [*self._latest[1 - self.k :], _copies(parameters)]
            self.average = {
                name: torch.stack([each[name].to(parameters[name].device) for each in self._latest]).mean(0)
                for name in parameters
            }

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        checkpoint["averaged_latest"] = self._latest

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on from there; where a run had none before, it begins without."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        self._latest = checkpoint.get("averaged_latest", [])
        if not self._latest:  # another callback's average
            self.average = {}


def _copies(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: parameter.detach().float().clone() for name, parameter in parameters.items()}


def _parameters(pl_module: LightningModule) -> dict[str, Any]:
    assert isinstance(pl_module, LanguageModel)
    return dict(pl_module.decoder.named_parameters())
