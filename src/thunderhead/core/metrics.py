"""What is measured in training and validation: sums in float64 that keep NaN, over micro-batches and ranks.

torchmetrics' MeanMetric leaves NaN out, and so would hide that a model has diverged.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class Mean(Metric):
    """The mean of values with weights, `total / weight`, float64; NaN if any value was, and without values."""

    is_differentiable, higher_is_better, full_state_update = False, False, False
    total: Tensor
    weight: Tensor

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("weight", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, value: Tensor, weight: Tensor | float = 1.0) -> None:
        """Add a scalar that stands for `weight` values."""
        self.total += value.detach().double() * weight
        self.weight += weight

    def compute(self) -> Tensor:
        return self.total / self.weight


class BitsPerByte(Mean):
    """Bits that the model needs for a byte of text: comparable between tokenizers (Gao et al. 2101.00027, section 3.1).

    `bytes_per_target` is UTF-8 of the text itself, whatever a tokenizer changes or leaves out, over all targets that
    count: after all of them, the bytes are those of the text. Ends of documents are predicted, too, and have no bytes.
    """

    def __init__(self, bytes_per_target: float, **kwargs: Any):
        super().__init__(**kwargs)
        self.bytes_per_target = bytes_per_target

    def update(self, nats: Tensor, targets: Tensor) -> None:  # type: ignore[override]
        """Add the summed cross-entropy (nats) of all targets that count (int64, any shape; negative ones do not)."""
        self.total += nats.detach().double() / math.log(2)
        self.weight += (targets >= 0).sum().double() * self.bytes_per_target


class MeanOf(Mean):
    """The mean of a function over the targets that count.

    The function gives a value for each target (B, T), or the mean of a batch; it is called with those of `inputs`,
    `targets`, `logits`, `losses` … that it names (see `LanguageModel.validation_step`).
    """

    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        self.function, self.names = function, list(inspect.signature(function).parameters)

    def update(self, targets: Tensor, **others: Tensor) -> None:  # type: ignore[override]
        """Add the function's values for a batch; negative targets do not count, nor a batch of only such."""
        given, counts = {"targets": targets, **others}, targets >= 0
        if not counts.any():
            return
        value = torch.as_tensor(self.function(**{name: given[name] for name in self.names if name in given})).double()
        if value.shape != targets.shape and value.numel() != 1:
            name, wanted = getattr(self.function, "__name__", "a function"), f"one a target {list(targets.shape)}"
            raise WrongShapeError(f"{name} gives {list(value.shape)}: must be one number, or {wanted}")
        super().update(value[counts].mean() if value.shape == targets.shape else value.mean(), counts.sum())


class WrongShapeError(ValueError):
    """A metric gives neither one number nor one for each target."""


def as_metric(metric: Metric | Callable[..., Tensor]) -> Metric:
    """A metric as it is, or the mean of a function."""
    return metric if isinstance(metric, Metric) else MeanOf(metric)


KNOWN = ("inputs", "targets", "logits", "losses", "preds", "target", "nats")
"""What a metric may ask for; see `LanguageModel.validation_step`."""
TAKEN = ("loss", "val_loss", "perplexity")
"""Names of what is always measured."""


def refuse_unknown(name: str, metric: Metric) -> None:
    """Raise ValueError if a metric would overwrite another result, or asks for what is not known."""
    if name in TAKEN or "/" in name:
        raise ValueError(f"val/{name} is the name of another result: rename it, without a slash")
    function = metric.function if isinstance(metric, MeanOf) else metric.update
    kinds = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    asked = [p for p in inspect.signature(function).parameters.values() if p.kind not in kinds]
    if unknown := [p.name for p in asked if p.default is p.empty and p.name not in KNOWN]:
        raise ValueError(f"asks for {', '.join(unknown)}; known: {', '.join(KNOWN)}")


def try_out(metric: Metric, vocab_size: int) -> None:
    """Let a metric measure two tokens, rather than fail at the first validation.

    Raises ValueError if one of torchmetrics' names does not go together with the vocabulary or wants other shapes, and
    if any gives no scalar. What a function raises of invented values says nothing.
    """
    target, logits = torch.tensor([0, vocab_size - 1]), torch.zeros(2, vocab_size)
    given = {"preds": logits, "target": target, "inputs": target[None], "targets": target[None]}
    given |= {"logits": logits[None], "losses": torch.ones(1, 2), "nats": torch.tensor(2.0, dtype=torch.float64)}
    try:
        metric.update(**{name: given[name] for name in names_of(metric) if name in given})
        result = metric.compute()
    except WrongShapeError:
        raise
    except Exception:
        if {"preds", "target"}.issuperset(names_of(metric)):
            raise
        return
    finally:
        metric.reset()
    refuse_several(type(metric).__name__, result)


def refuse_several(name: str, result: object) -> None:
    """Raise WrongShapeError for what is not one number."""
    if torch.as_tensor(result).numel() != 1:
        raise WrongShapeError(f"{name} gives no single number")


def names_of(metric: Metric) -> list[str]:
    """What a metric asks for at each batch, by the names of its parameters."""
    return (
        [*metric.names, "targets"] if isinstance(metric, MeanOf) else list(inspect.signature(metric.update).parameters)
    )
