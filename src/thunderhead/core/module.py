"""LanguageModel: the LightningModule that hosts the decoder, its optimizer and its schedule. Hooks only."""

import contextlib
import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from lightning import LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor
from torch.nn import ModuleList
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from thunderhead.core.config import build, factory
from thunderhead.core.metrics import BitsPerByte
from thunderhead.core.model.decoder import Decoder
from thunderhead.core.model.loss import IGNORED_TARGET
from thunderhead.options.low_precision import compute_in, multiply_in_fp8
from thunderhead.parallel.strategies import MeshStrategy

# What a decoder is made of: groups whose nodes are factories, called by the decoder itself.
COMPONENTS = ("attention", "position", "activation", "norm", "dropout", "block", "loss", "activation_checkpointing")
# Groups that LanguageModel is built from, and keeps as plain hyper-parameters.
GROUPS = ("model", *COMPONENTS, "optimizer", "scheduler", "parameter_groups", "parametrization", "compile")
# Of records from before there was a choice.
STANDARD = {"_target_": "thunderhead.options.mup.Standard"}


def build_decoder(config: dict[str, Any], vocab_size: int, eos_id: int | None) -> Decoder:
    """The decoder that a resolved configuration describes, with weights not yet drawn.

    Args:
        config: plain containers with the groups `model` and COMPONENTS.
        vocab_size: tokens of the tokenizer.
        eos_id: its end-of-document token.

    Raises:
        ValueError: the components contradict each other; the message names the config paths.
    """
    decoder = _assemble(config, vocab_size, eos_id)
    parametrization = build(config.get("parametrization", STANDARD))
    base_config = parametrization.base({name: config[name] for name in ("model", *COMPONENTS)})
    if base_config is not None:
        try:
            with torch.device("meta"):
                parametrization.scale(decoder, _assemble(base_config, vocab_size, eos_id))
        except ValueError as error:
            raise ValueError(
                f"parametrization: the base model (model.d_model={base_config['model']['d_model']}) cannot be made: "
                f"{error} (change parametrization.base_d_model, or set its values in parametrization.base_values)"
            ) from error
    return decoder


def _assemble(config: dict[str, Any], vocab_size: int, eos_id: int | None) -> Decoder:
    components = {name: factory(config[name]) for name in COMPONENTS}
    return factory(config["model"])(tokenizer_vocab_size=vocab_size, eos_id=eos_id, **components)  # type: ignore[no-any-return]


def build_optimizer(config: dict[str, Any], decoder: Decoder) -> torch.optim.Optimizer:
    """The configured optimizer over the decoder's parameter groups.

    Raises:
        ValueError: a setting is out of range, parameter_groups.no_decay matches nothing, or the parametrization has
            no rule for this optimizer.
    """
    groups = factory(config["parameter_groups"])(decoder)
    try:
        optimizer: torch.optim.Optimizer = factory(config["optimizer"])(groups)
    except (ValueError, AssertionError) as error:  # torch's and others' own words, which do not say where
        raise ValueError(f"optimizer: {str(error).removeprefix('optimizer.')}") from error
    build(config.get("parametrization", STANDARD)).scale_learning_rates(optimizer, decoder)
    return optimizer


def inputs_and_targets(batch_BT1: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens to read (B, T), and the next of each to predict (B, T).

    A negative number ~id = -1 - id is a token that is read and not predicted: its target is IGNORED_TARGET.
    """
    unasked_BT1 = batch_BT1 < 0
    inputs_BT = torch.where(unasked_BT1, ~batch_BT1, batch_BT1)[:, :-1]
    return inputs_BT, batch_BT1.masked_fill(unasked_BT1, IGNORED_TARGET)[:, 1:]


class LanguageModel(LightningModule):
    """Next-token prediction on batches of `(B, T+1)` token ids; see `inputs_and_targets` for negative ones.

    Args:
        config: resolved, plain containers: the groups in GROUPS. Stored in checkpoints, so that
            `LanguageModel.load_from_checkpoint(path)` needs nothing else.
        seed: of the initial weights.
        vocab_size: tokens of the tokenizer.
        eos_id: end-of-document token, or None.
        total_steps: optimizer steps of the schedule.
        token_bytes: bytes of text behind each token id, for bits per byte; None leaves that metric out.
        measure_accuracy: whether validation also says how often the most probable token is right.
        sources: names of the validation loaders; losses of several are told apart.
        precision: a resolved kind, see `hardware.Precision`; Lightning is told separately.
    """

    def __init__(
        self,
        config: dict[str, Any],
        *,
        seed: int,
        vocab_size: int,
        eos_id: int | None,
        total_steps: int,
        token_bytes: list[int] | None = None,
        measure_accuracy: bool = False,
        sources: Sequence[str] = ("all",),
        precision: str = "fp32",
    ):
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.decoder: Decoder
        self.step_loss = MeanMetric()  # over the micro-batches of one step, and over ranks
        # one for each source
        self.val_loss = cast(Sequence[MeanMetric], ModuleList(MeanMetric() for _ in sources))
        by_source = ModuleList(BitsPerByte(token_bytes) for _ in sources if token_bytes is not None)
        self.val_bits_per_byte = cast(Sequence[BitsPerByte], by_source)
        self.val_accuracy: MulticlassAccuracy | None = None
        if measure_accuracy:
            self.val_accuracy = MulticlassAccuracy(
                vocab_size, average="micro", ignore_index=IGNORED_TARGET, validate_args=False
            )
        self.grad_norm: Tensor | None = None
        self.measure_step = True  # set by the metrics callback: whether the current step will be logged

    def configure_model(self) -> None:
        """Build the decoder, divide it and draw its weights. Weights depend on the seed alone, not on the strategy."""
        if hasattr(self, "decoder"):
            return
        config, seed = self.hparams["config"], self.hparams["seed"]
        sizes = {"vocab_size": self.hparams["vocab_size"], "eos_id": self.hparams["eos_id"]}
        compilation = build(config["compile"])
        strategy = self._trainer.strategy if self._trainer is not None else None
        precision = self.hparams["precision"]
        compute_dtype = torch.bfloat16 if precision == "bf16-true" else None
        on_mesh = isinstance(strategy, MeshStrategy)
        with torch.device("meta") if on_mesh else contextlib.nullcontext():
            decoder = build_decoder(config, **sizes)
        if precision == "fp8":
            multiply_in_fp8(decoder)
        if isinstance(strategy, MeshStrategy):
            strategy.parallelize(decoder, compute_dtype, compilation.apply)
            decoder.to_empty(device=strategy.storage_device)
        else:
            compilation.apply(decoder)
        decoder.initialize(seed)
        if compute_dtype is not None and not (isinstance(strategy, MeshStrategy) and strategy.shards):
            compute_in(decoder, compute_dtype)
        self.decoder = decoder

    def configure_optimizers(self) -> Any:
        """The optimizer over the decoder's parameter groups, with the schedule as a factor on each peak LR."""
        config = self.hparams["config"]
        optimizer = build_optimizer(config, self.decoder)
        if hasattr(optimizer, "_step_supports_amp_scaling"):
            # A fused optimizer would unscale fp16's gradients itself, after they should have been clipped.
            optimizer._step_supports_amp_scaling = False
        scheduler = LambdaLR(optimizer, self._schedule())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _schedule(self) -> Callable[[int], float]:
        """The factor of the peak learning rate at a step."""
        return partial(factory(self.hparams["config"]["scheduler"]), total_steps=self.hparams["total_steps"])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let a resumed run have its own settings of the optimizer and the schedule, which torch would take from here.

        Those that did not change stay bit for bit; the learning rate is what the schedule says for the next step.
        May be called again: strategies that load the optimizer's state early have done so before.
        """
        if self._trainer is None or not checkpoint.get("optimizer_states"):  # loaded to generate text, not to go on
            return
        configs = self.hparams["config"], checkpoint["hyper_parameters"]["config"]
        now, then = (build_optimizer(config, self.decoder).param_groups for config in configs)
        [saved], [schedule] = checkpoint["optimizer_states"], checkpoint["lr_schedulers"]
        factor = self._schedule()(schedule["last_epoch"])
        for group, new, old in zip(saved["param_groups"], now, then, strict=True):
            group |= {key: new[key] for key in new if key != "params" and (key not in old or new[key] != old[key])}
            group |= {"initial_lr": new["lr"], "lr": new["lr"] * factor}
        schedule["base_lrs"] = [group["initial_lr"] for group in saved["param_groups"]]
        schedule["_last_lr"] = [group["lr"] for group in saved["param_groups"]]

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Follow the schedule, which counts all steps.

        fp16's gradient scaler leaves out steps whose gradients overflow, the first ones as a rule, while it looks for
        its scale; torch takes that for a schedule that is called before its optimizer.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step\\(\\)` before", UserWarning)
            scheduler.step()

    def training_step(self, batch_BT1: Tensor, batch_idx: int) -> Tensor:
        """The loss of one micro-batch."""
        terms = self.decoder(*inputs_and_targets(batch_BT1))
        if self.measure_step:
            self.step_loss.update(terms.cross_entropy.detach())
        return terms.loss  # type: ignore[no-any-return]

    def validation_step(self, batch_BT1: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Sum up the loss over all targets of the batch, which is of source `dataloader_idx`."""
        inputs_BT, targets_BT = inputs_and_targets(batch_BT1)
        loss = self.decoder(inputs_BT, targets_BT).cross_entropy
        self.val_loss[dataloader_idx].update(loss, weight=(targets_BT != IGNORED_TARGET).sum())
        if self.val_bits_per_byte:
            self.val_bits_per_byte[dataloader_idx].update(loss * targets_BT.numel(), targets_BT)
        if self.val_accuracy is not None:
            self.val_accuracy.update(self.decoder.logits(inputs_BT).argmax(dim=-1), targets_BT)

    def on_validation_epoch_end(self) -> None:
        """Publish val/loss (nats a target), val/perplexity, and val/bits_per_byte or val/accuracy.

        Of several sources, val/loss is the plain mean of their losses (val/loss/<source>), and so is val/bits_per_byte:
        it depends neither on the weights, so that mixtures can be compared by it, nor on the sources' sizes.
        """
        metrics: dict[str, Sequence[Metric]] = {"val/loss": self.val_loss, "val/bits_per_byte": self.val_bits_per_byte}
        values = {}
        for name, by_source in metrics.items():
            found = [metric.compute() for metric in by_source]
            for metric in by_source:
                metric.reset()
            if found:
                values[name] = torch.stack(found).mean()
            if len(found) > 1:
                values |= {
                    f"{name}/{source}": value for source, value in zip(self.hparams["sources"], found, strict=True)
                }
        if self.val_accuracy is not None:
            values["val/accuracy"] = self.val_accuracy.compute()
            self.val_accuracy.reset()
        values["val/perplexity"] = torch.exp(values["val/loss"])
        # The metrics callback writes them to the loggers, beside the tokens; here they are for checkpoints to monitor.
        self.log_dict(values, logger=False, rank_zero_only=False, sync_dist=False)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the global norm (Pascanu et al. 1211.5063), and keep it for the logs; also if nothing is clipped.

        DeepSpeed clips by itself, and gradients are not where they were.
        """
        if isinstance(self.trainer.strategy, DeepSpeedStrategy):
            return
        if gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        if gradient_clip_val or self.measure_step:
            norm = torch.nn.utils.clip_grad_norm_(self.decoder.parameters(), gradient_clip_val or math.inf)
            self.grad_norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
