"""A transformer block: attention and feed-forward branches around a residual stream.

Shape letters: B sequences, T tokens a sequence, D model dimensions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor, nn
from torch.nn import functional as F

from thunderhead.core.model.context import SequenceContext
from thunderhead.core.model.loss import Auxiliary, summed, with_terms
from thunderhead.core.model.norm import normalize
from thunderhead.core.types import Probability


@dataclass(frozen=True, kw_only=True)
class ResidualDropout:
    """Dropout probabilities, in training: of the two branches as they join the residual stream, of the embeddings."""

    attention_output: Probability = 0.0
    feedforward_output: Probability = 0.0
    embedding: Probability = 0.0


@runtime_checkable
class Checkpointing(Protocol):
    """What makes a block, of that layer, compute in its backward pass what it did not keep."""

    def apply(self, index: int, block: nn.Module) -> None:
        """Change the block of a layer, counted from 0."""


class Block(nn.Module):
    """One layer of the decoder: x + A(N(x)), then x + F(N(x)) (pre-norm: GPT-2; 2002.04745).

    A and F are the two branches, N norms, each with its own weights; `thunderhead.options.blocks` places them
    otherwise. Dropout follows a branch's last operation before the sum.
    """

    needs_final_norm = True  # whether the decoder must normalise the last block's output
    needs_embedding_norm = False  # whether it must normalise the first block's input

    def __init__(
        self,
        attention: nn.Module,
        feedforward: nn.Module,
        norm: Callable[[int], nn.Module],
        d_model: int,
        dropout: ResidualDropout,
    ) -> None:
        super().__init__()
        self.attention = attention
        self.feedforward = feedforward
        self.dropout = dropout
        self.attention_norm = norm(d_model)
        self.feedforward_norm = norm(d_model)
        self.attention_output_norm: nn.Module = nn.Identity()  # for kinds that normalise what leaves a branch
        self.feedforward_output_norm: nn.Module = nn.Identity()

    def forward(self, x_BTD: Tensor, context: SequenceContext) -> Tensor | tuple[Tensor, Auxiliary]:
        """Give (B, T, D), beside it the branches' terms of the loss if there are any."""
        y_BTD, terms = self.attend(self.attention_norm(x_BTD), context)
        x_BTD = x_BTD + y_BTD
        y_BTD, more = self.feed_forward(self.feedforward_norm(x_BTD))
        return self.result(x_BTD + y_BTD, terms, more)

    def attend(self, x_BTD: Tensor, context: SequenceContext) -> tuple[Tensor, Auxiliary]:
        """What the first branch adds to the residual stream, and its terms of the loss."""
        y_BTD, terms = with_terms(self.attention(x_BTD, context))
        y_BTD = normalize(self.attention_output_norm, y_BTD)
        return F.dropout(y_BTD, self.dropout.attention_output, self.training), terms

    def feed_forward(self, x_BTD: Tensor) -> tuple[Tensor, Auxiliary]:
        """What the second branch adds to the residual stream, and its terms of the loss."""
        y_BTD, terms = with_terms(self.feedforward(x_BTD))
        y_BTD = normalize(self.feedforward_output_norm, y_BTD)
        return F.dropout(y_BTD, self.dropout.feedforward_output, self.training), terms

    @staticmethod
    def result(x_BTD: Tensor, terms: Auxiliary, more: Auxiliary) -> Tensor | tuple[Tensor, Auxiliary]:
        """What `forward` returns."""
        terms = summed(terms, more)
        return (x_BTD, terms) if terms else x_BTD
