"""How long to train: the options of the group `budget`."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

from thunderhead.core.types import Count, PositiveFloat, PositiveInt, WholeNumber, counted
from thunderhead.options.scaling_law import Law, read_law

CHINCHILLA = 20.0
"""Tokens a parameter that are about compute-optimal (Hoffmann et al. 2203.15556)."""


class Sizes(NamedTuple):
    """What a budget may be worked out from."""

    parameters: dict[str, int]
    flops_per_token: int  # of training: forward and backward
    tokens_per_step: int
    epoch_tokens: int | None  # trained tokens in one pass over the data; None while the data is not prepared


class Budget(Protocol):
    """How long to train: an option of the group `budget`; a subclass of this."""

    def total_tokens(self, sizes: Sizes) -> int:
        """Tokens to train on, before rounding down to whole steps."""
        ...

    def notes(self, sizes: Sizes, tokens: int) -> list[str]:
        """Sentences for the plan about training on so many tokens."""
        return []


@dataclass(frozen=True, kw_only=True)
class StepsBudget(Budget):
    """A number of optimizer steps."""

    steps: PositiveInt

    def total_tokens(self, sizes: Sizes) -> int:
        """Tokens of that many steps."""
        return self.steps * sizes.tokens_per_step


@dataclass(frozen=True, kw_only=True)
class TokensBudget(Budget):
    """A number of tokens, rounded down to whole steps."""

    tokens: WholeNumber

    def total_tokens(self, sizes: Sizes) -> int:
        """The tokens as given."""
        return int(self.tokens)


@dataclass(frozen=True, kw_only=True)
class EpochsBudget(Budget):
    """Passes over the training data, rounded down to whole steps."""

    epochs: PositiveFloat
    needs_epochs: ClassVar = True
    """Of data that cannot be gone through."""

    def total_tokens(self, sizes: Sizes) -> int:
        """Tokens of that many passes.

        Raises:
            ValueError: the data is not prepared, so that nobody knows how long an epoch is.
        """
        if sizes.epoch_tokens is None:
            raise ValueError(
                "budget.epochs: the data is not prepared yet; run python prepare.py with these options first"
            )
        return int(self.epochs * sizes.epoch_tokens)


@dataclass(frozen=True, kw_only=True)
class ChinchillaBudget(Budget):
    """As many tokens as make a model of this size the best use of its training compute.

    Args:
        tokens_per_parameter: more than the optimum suits models that are used a lot; None = as `law` has it, or
            CHINCHILLA without one.
        count: which parameters are counted: `total`, or `non_embedding` (without token and position tables and an
            untied output head).
        law: path of a law.json, fitted to runs like this one.
    """

    tokens_per_parameter: PositiveFloat | None
    count: Count
    law: str | None = None

    def total_tokens(self, sizes: Sizes) -> int:
        """tokens_per_parameter × counted parameters, or what the law says.

        Raises:
            ValueError: the law cannot be read, or contradicts another setting.
        """
        parameters = counted(sizes.parameters, self.count)
        if self.law is None:
            each = CHINCHILLA if self.tokens_per_parameter is None else self.tokens_per_parameter
            return int(each * parameters)
        law = _read_law(self.law)
        if self.tokens_per_parameter is not None:
            raise ValueError(
                f"budget.tokens_per_parameter={self.tokens_per_parameter:g} and budget.law both say how many tokens: "
                "set one of them to null"
            )
        if law.count != self.count:
            raise ValueError(
                f"budget.count={self.count}, but the law in {self.law} counts otherwise: use budget.count={law.count}"
            )
        return int(law.optimal_tokens(parameters))

    def notes(self, sizes: Sizes, tokens: int) -> list[str]:
        """What the law says about this run."""
        return [] if self.law is None else [_says(_read_law(self.law), sizes, tokens)]


@dataclass(frozen=True, kw_only=True)
class FlopsBudget(Budget):
    """Training compute: tokens = flops / training FLOPs per token.

    Args:
        flops: forward and backward, without recomputation.
        law: path of a law.json, fitted to runs like this one: the plan tells the best size for this compute by it, and
            the predicted loss of this size.
    """

    flops: PositiveFloat
    law: str | None = None

    def total_tokens(self, sizes: Sizes) -> int:
        """Tokens that this compute pays for.

        Raises:
            ValueError: the law cannot be read.
        """
        if self.law is not None:
            _read_law(self.law)  # refused here, where nothing has begun
        return int(self.flops / sizes.flops_per_token)

    def notes(self, sizes: Sizes, tokens: int) -> list[str]:
        """What the law says about this run, and about the best one of this compute."""
        if self.law is None:
            return []
        law = _read_law(self.law)
        best = law.optimum(self.flops)
        optimum = (
            f"law: {self.flops:.3g} FLOPs are best spent on N = {best.parameters:.3g}, D = {best.tokens:.3g} tokens"
        )
        return [f"{optimum}: predicted loss {best.loss:.3f}", _says(law, sizes, tokens)]


def _read_law(path: str) -> Law:
    try:
        return read_law(path)
    except ValueError as error:
        raise ValueError(f"budget.law: {error}") from error


def _says(law: Law, sizes: Sizes, tokens: int) -> str:
    """A law's prediction for a run, and how far that is from what it was fitted on."""
    parameters = counted(sizes.parameters, law.count)
    flops = sizes.flops_per_token * tokens
    run = f"law: this N = {parameters:.3g} ({law.count}) with D = {tokens:.3g} tokens"
    far = law.extrapolation(parameters=parameters, tokens=tokens, flops=flops)
    return f"{run} ({tokens / parameters:.3g} per parameter): predicted loss {law.loss(parameters, tokens):.3f}" + (
        f"; {far}" if far else ""
    )
