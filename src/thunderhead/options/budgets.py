"""The budget group: how long to train.

An option says `total_tokens(sizes)`: the tokens to train on, before these are rounded down to whole steps. It may have
`notes(sizes, tokens)` for the plan.
"""

from dataclasses import dataclass
from typing import NamedTuple

from thunderhead.core.types import Count, PositiveFloat, PositiveInt, WholeNumber, counted
from thunderhead.scaling_law import Law, read_law

CHINCHILLA = 20.0
"""Tokens a parameter that are about compute-optimal (Hoffmann et al. 2203.15556)."""


class Sizes(NamedTuple):
    """What a budget may be worked out from."""

    parameters: dict[str, int]
    flops_per_token: int  # of training: forward and backward
    tokens_per_step: int
    epoch_tokens: int | None  # trained tokens in one pass over the data; None while the data is not prepared


@dataclass(frozen=True, kw_only=True)
class StepsBudget:
    """A number of optimizer steps."""

    steps: PositiveInt

    def total_tokens(self, sizes: Sizes) -> int:
        return self.steps * sizes.tokens_per_step


@dataclass(frozen=True, kw_only=True)
class TokensBudget:
    """A number of tokens."""

    tokens: WholeNumber

    def total_tokens(self, sizes: Sizes) -> int:
        return int(self.tokens)


@dataclass(frozen=True, kw_only=True)
class EpochsBudget:
    """Passes over the training data."""

    needs_epochs = True  # data without any refuses it
    epochs: PositiveFloat

    def total_tokens(self, sizes: Sizes) -> int:
        if sizes.epoch_tokens is None:
            raise ValueError("budget.epochs: the data is not prepared yet; run python prepare.py with these options")
        return int(self.epochs * sizes.epoch_tokens)


@dataclass(frozen=True, kw_only=True)
class ChinchillaBudget:
    """As many tokens as make a model of this size the best use of its training compute.

    - tokens_per_parameter: more than the optimum suits models that are used a lot; None = as `law` has it, or
      CHINCHILLA without one.
    - count: which parameters are counted: `total`, or `non_embedding` (see `thunderhead.core.types.counted`).
    - law: path of a law.json, fitted to runs like this one.
    """

    tokens_per_parameter: PositiveFloat | None = None
    count: Count = "total"
    law: str | None = None

    def total_tokens(self, sizes: Sizes) -> int:
        """Return what ratio or law say; ValueError if settings disagree."""
        parameters, ratio = counted(sizes.parameters, self.count), self.tokens_per_parameter
        if self.law is None:
            return int((CHINCHILLA if ratio is None else ratio) * parameters)
        law = _read(self.law)
        if ratio is not None:
            both = f"budget.tokens_per_parameter={ratio:g} and budget.law both say how many tokens"
            raise ValueError(f"{both}: set one of them to null")
        if law.count != self.count:
            otherwise = f"budget.count={self.count}, but the law in {self.law} counts otherwise"
            raise ValueError(f"{otherwise}: use budget.count={law.count}")
        return int(law.optimal_tokens(parameters))

    def notes(self, sizes: Sizes, tokens: int) -> list[str]:
        return [] if self.law is None else [_predict(_read(self.law), sizes, tokens)]


@dataclass(frozen=True, kw_only=True)
class FlopsBudget:
    """Training compute, forward and backward without recomputation: tokens = flops / training FLOPs per token.

    - law: path of a law.json, fitted to runs like this one: the plan tells the best size for this compute by it, and
      the predicted loss of this size.
    """

    flops: PositiveFloat
    law: str | None = None

    def total_tokens(self, sizes: Sizes) -> int:
        """Return the tokens that this compute pays for; ValueError, before anything begins, if there is no such law."""
        if self.law is not None:
            _read(self.law)
        return int(self.flops / sizes.flops_per_token)

    def notes(self, sizes: Sizes, tokens: int) -> list[str]:
        if self.law is None:
            return []
        law = _read(self.law)
        n, d, loss = law.optimum(self.flops)
        best = f"law: {self.flops:.3g} FLOPs are best spent on N = {n:.3g}, D = {d:.3g} tokens"
        return [f"{best}: predicted loss {loss:.3f}", _predict(law, sizes, tokens)]


def _read(path: str) -> Law:
    try:
        return read_law(path)
    except ValueError as error:
        raise ValueError(f"budget.law: {error}") from error


def _predict(law: Law, sizes: Sizes, tokens: int) -> str:
    """A law's prediction for a run, and how far that is from what it was fitted on."""
    n = counted(sizes.parameters, law.count)
    far = law.extrapolation(parameters=n, tokens=tokens, flops=sizes.flops_per_token * tokens)
    run = f"law: this N = {n:.3g} ({law.count}) with D = {tokens:.3g} tokens ({tokens / n:.3g} per parameter)"
    return f"{run}: predicted loss {law.loss(n, tokens):.3f}{f'; {far}' * bool(far)}"
