"""LanguageModel: the LightningModule that hosts the decoder, its optimizer and its schedule.

Shape letters: B sequences, T tokens a sequence, V vocabulary, N targets that count.
"""

import contextlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import Metric

from thunderhead.core.config import ConfigError, Problem
from thunderhead.core.metrics import Mean, names_of, refuse_several
from thunderhead.core.model import init
from thunderhead.core.model.decoder import Decoder
from thunderhead.core.model.loss import IGNORED_TARGET
from thunderhead.core.model_spec import ModelSpec
from thunderhead.core.model_spec import build_decoder as build_decoder  # noqa: PLC0414 - for notebooks
from thunderhead.core.trust import refuse_untrusted


def inputs_and_targets(batch_BT1: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens to read (B, T), and the next of each to predict (B, T).

    A negative number ~id = -1 - id is a token that is read and not predicted: its target is IGNORED_TARGET.
    """
    unasked_BT1 = batch_BT1 < 0
    inputs_BT = torch.where(unasked_BT1, ~batch_BT1, batch_BT1)[:, :-1]
    return inputs_BT, batch_BT1.masked_fill(unasked_BT1, IGNORED_TARGET)[:, 1:]


class NoAverageError(ValueError):
    """A checkpoint holds no averaged weights."""


class LanguageModel(LightningModule):
    """Next-token prediction on batches of `(B, T+1)` token ids; see `inputs_and_targets` for negative ones.

    - seed: of the initial weights; total_steps: optimizer steps of the schedule.
    - metrics: makes the further metrics of validation of a source, by name.
    - sources: names of the validation loaders; losses of several are told apart.
    - precision: how weights become what is computed with (`options.precision`); None: as they are.
    - compile_decoder: marks modules for compilation, or does nothing.
    - on_resume: is called with a checkpoint before its optimizer state is taken.
    - initial_weights: takes the place of random weights: gives all of a decoder, whole, by parameter name.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        seed: int,
        vocab_size: int,
        eos_id: int | None,
        total_steps: int,
        metrics: Callable[[str], Mapping[str, Metric]] = lambda source: {},
        sources: Sequence[str] = ("all",),
        precision: Any = None,
        compile_decoder: Callable[[Decoder], None] = lambda decoder: None,
        on_resume: Callable[["LanguageModel", dict[str, Any]], None] = lambda model, checkpoint: None,
        initial_weights: Callable[[Decoder], Mapping[str, Tensor]] | None = None,
    ):
        super().__init__()
        sizes = {"seed": seed, "vocab_size": vocab_size, "eos_id": eos_id, "total_steps": total_steps}
        self.save_hyperparameters({"config": spec.config, **sizes, "sources": list(sources)}, logger=False)
        self.spec, self.precision = spec, precision
        self.compile_decoder, self.on_resume, self.initial_weights = compile_decoder, on_resume, initial_weights
        self.decoder: Decoder
        # The means of the loss terms over one step's micro-batches, and over ranks. No ModuleDict: names are free.
        self.step_terms: dict[str, Mean] = {}
        self._new_metrics, self._measured = metrics, nn.ModuleList()  # the latter moves to the device with the module
        self.val_loss: list[Mean] = []
        self.val_metrics: list[Mapping[str, Metric]] = []
        self._measure(sources)
        self.grad_norm: Tensor | None = None
        self.measure_step = True  # set by the metrics callback: whether the step under way will be logged
        self.measure_norm = False  # whether the norm of every step is wanted, and who wants it
        self.on_grad_norm: Callable[[LanguageModel, Tensor], None] | None = None

    def _measure(self, sources: Sequence[str]) -> None:
        """Make what each source is measured by."""
        self.hparams["sources"] = list(sources)
        self.val_loss, self.val_metrics = [Mean() for _ in sources], [self._new_metrics(s) for s in sources]
        self._measured = nn.ModuleList([*self.val_loss, *(m for own in self.val_metrics for m in own.values())])

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, path: Any, map_location: Any = "cpu", *, averaged: bool = False, **kwargs: Any
    ) -> Self:
        """The model of a checkpoint, which holds all that is needed; ready to use, not compiled.

        `averaged`: with the averaged weights in it, of callbacks=ema or lawa; NoAverageError if there are none.
        Raises ConfigError if it is of components that this installation does not have: `trust` them first.
        """
        content = torch.load(path, map_location=map_location, weights_only=True)
        settings = content["hyper_parameters"]
        refuse_untrusted(settings["config"])
        model = cls(ModelSpec.of(settings.pop("config")), **settings, **kwargs)
        model.configure_model()
        if averaged and not content.get("averaged"):
            raise NoAverageError(f"averaged=true: {path} holds no averaged weights, which callbacks=ema or lawa keep")
        weights = content["state_dict"] | (content["averaged"] if averaged else {})
        wrong = model.load_state_dict(weights, strict=False)  # validation's own metrics are not part of it
        for names, what in ((wrong.missing_keys, "lacks"), (wrong.unexpected_keys, "has, and its model has not,")):
            if of_decoder := [name for name in names if name.startswith("decoder.")]:
                raise ConfigError([Problem("", f"{path} is of another model: it {what} {of_decoder[0]}")])
        return model

    def configure_model(self) -> None:
        """Build the decoder, divide it and draw its weights. Weights depend on the seed alone, not on the strategy."""
        if hasattr(self, "decoder"):
            return
        strategy: Any = self._trainer.strategy if self._trainer is not None else None
        divide = getattr(strategy, "parallelize", None)  # of strategies that divide the model among devices
        with init.without_parameters() if divide is not None else contextlib.nullcontext():
            decoder = self.spec.decoder(self.hparams["vocab_size"], self.hparams["eos_id"])
        if self.precision is not None:
            self.precision.before_sharding(decoder)
        if divide is not None:
            divide(decoder, self.precision.gathered_dtype if self.precision is not None else None, self.compile_decoder)
            init.give_storage(decoder, strategy.storage_device)
        else:
            self.compile_decoder(decoder)
        if self.initial_weights is None:
            decoder.initialize(self.hparams["seed"])
        else:
            init.copy_weights(decoder, self.initial_weights(decoder))
        if self.precision is not None:
            self.precision.after_initialize(decoder, is_sharded=getattr(strategy, "shards", False))
        self.decoder = decoder

    def schedule(self, step: int) -> float:
        """The factor of the peak learning rate at a step."""
        return self.spec.schedule(step, self.hparams["total_steps"])

    def configure_optimizers(self) -> Any:
        """The optimizer over the decoder's parameter groups, with the schedule as a factor on each peak LR."""
        optimizer = self.spec.optimizer(self.decoder)
        if hasattr(optimizer, "_step_supports_amp_scaling"):
            # A fused optimizer would unscale fp16's gradients itself, after they should have been clipped.
            optimizer._step_supports_amp_scaling = False
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": LambdaLR(optimizer, self.schedule), "interval": "step"},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.on_resume(self, checkpoint)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Follow the schedule, which counts all steps.

        fp16's gradient scaler leaves out steps whose gradients overflow, the first ones as a rule, while it looks for
        its scale; torch takes that for a schedule that is called before its optimizer.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step\\(\\)` before", UserWarning)
            scheduler.step()

    def training_step(self, batch_BT1: Tensor, batch_idx: int) -> Tensor:
        """The loss of one micro-batch. Lightning divides it by the number of them, and steps after the last."""
        terms = self.decoder(*inputs_and_targets(batch_BT1))
        if self.measure_step:
            for name, value in {"loss": terms.cross_entropy, **terms.auxiliary}.items():
                if name not in self.step_terms:
                    self.step_terms[name] = Mean().to(value.device)
                self.step_terms[name].update(value)
        return terms.loss  # type: ignore[no-any-return]

    def on_train_start(self) -> None:
        self._tell_sources_apart()

    def on_validation_start(self) -> None:
        self._tell_sources_apart()

    def _tell_sources_apart(self) -> None:
        """Number several validation loaders of data that does not name them.

        Raises:
            ValueError: it names others than there are.
        """
        named, n_loaders = self.hparams["sources"], len(self.trainer.num_val_batches)
        if n_loaders in (0, len(named)):
            return
        if len(named) > 1:
            raise ValueError(f"data: validation_sources() names {len(named)}, and there are {n_loaders} loaders")
        self._measure([str(number) for number in range(n_loaders)])
        self._measured.to(self.device)

    def validation_step(self, batch_BT1: Tensor, batch_idx: int, dataloader_idx: int = 0) -> Tensor | None:
        """Sum up the loss over all targets of a batch of source `dataloader_idx`, and what metrics ask for.

        A batch may have no target, where it fills up what ranks have; those that share the model compute it, too.
        Returns the cross-entropy of each target (B, T), for callbacks; None if the loss does not tell it.
        """
        inputs_BT, targets_BT = inputs_and_targets(batch_BT1)
        terms, n_targets = self.decoder(inputs_BT, targets_BT), (targets_BT != IGNORED_TARGET).sum()
        # a mean over nothing is NaN, unless the loss knows better
        loss = torch.where(n_targets > 0, terms.cross_entropy, 0.0)
        self.val_loss[dataloader_idx].update(loss, n_targets)
        metrics = list(self.val_metrics[dataloader_idx].values())
        asked = {name for metric in metrics for name in names_of(metric)}
        known: dict[str, Tensor] = {"inputs": inputs_BT, "targets": targets_BT, "nats": loss.double() * n_targets}
        if not asked <= known.keys():
            known["logits"] = logits_BTV = self.decoder.logits(inputs_BT).float()
            known["losses"] = F.cross_entropy(logits_BTV.mT, targets_BT, ignore_index=IGNORED_TARGET, reduction="none")
            counted_BT = targets_BT != IGNORED_TARGET
            # torchmetrics' names: (N, V), (N)
            known |= {"preds": logits_BTV[counted_BT], "target": targets_BT[counted_BT]}
        for metric in metrics if n_targets > 0 else ():
            metric.update(**{name: known[name] for name in names_of(metric) if name in known})
        return terms.each  # type: ignore[no-any-return]

    def on_validation_epoch_end(self) -> None:
        """Publish val/loss (nats a target), val/perplexity, and each further metric as val/<name>.

        Of several sources, val/loss is the plain mean of their losses (val/loss/<source>), and so is each metric: it
        depends neither on the weights, so that mixtures can be compared by it, nor on the sources' sizes.
        """
        by_name: dict[str, Sequence[Metric]] = {"val/loss": self.val_loss}
        by_name |= {f"val/{name}": [own[name] for own in self.val_metrics] for name in self.val_metrics[0]}
        values: dict[str, Tensor] = {}
        for name, by_source in by_name.items():
            found = [torch.as_tensor(metric.compute()) for metric in by_source]
            for value in found:
                refuse_several(name, value)
            values[name] = torch.stack(found).mean()
            if len(found) > 1:
                values |= {f"{name}/{source}": v for source, v in zip(self.hparams["sources"], found, strict=True)}
            for metric in by_source:
                metric.reset()
        values["val/perplexity"] = torch.exp(values["val/loss"])
        # The metrics callback writes them to the loggers, beside the tokens; here they are for checkpoints to monitor.
        self.log_dict(values, logger=False, rank_zero_only=False, sync_dist=False)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the global norm (Pascanu et al. 1211.5063), and keep it for the logs; also if nothing is clipped."""
        by_value = gradient_clip_algorithm == "value"
        if by_value:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        if self.measure_norm or (not by_value and (gradient_clip_val or self.measure_step)):
            largest = math.inf if by_value else gradient_clip_val or math.inf
            norm = nn.utils.clip_grad_norm_(self.decoder.parameters(), largest)
            self.grad_norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            if self.on_grad_norm is not None:
                self.on_grad_norm(self, self.grad_norm)
