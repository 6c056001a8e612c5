"""Further options of the group `block`: norms and branches in other places.

With A, F the two branches of a block and N norms, each with its own weights.

Shape letters: B sequences, T tokens a sequence, D model dimensions.
"""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from thunderhead.core.model.block import Block, ResidualDropout
from thunderhead.core.model.context import SequenceContext
from thunderhead.core.model.loss import Auxiliary, with_terms
from thunderhead.core.model.norm import normalize


class PostNormBlock(Block):
    """N(x + A(x)), then N(x + F(x)) (Vaswani et al. 2017). No final norm: the stream is normalised already."""

    needs_final_norm = False

    def forward(self, x_BTD: Tensor, context: SequenceContext) -> Tensor | tuple[Tensor, Auxiliary]:
        """(B, T, D) to (B, T, D)."""
        y_BTD, terms = self.attend(x_BTD, context)
        x_BTD = self.attention_norm(x_BTD + y_BTD)
        y_BTD, more = self.feed_forward(x_BTD)
        return self.result(self.feedforward_norm(x_BTD + y_BTD), terms, more)


class SandwichBlock(Block):
    """x + N(A(N(x))), then x + N(F(N(x))) (CogView, 2105.13290).

    - embedding_norm: the decoder normalises the embeddings, too: Peri-LN's "initial embedding normalisation"
      (2502.02732), which is optional there and sets the options peri and sandwich apart here.
    """

    def __init__(
        self,
        attention: nn.Module,
        feedforward: nn.Module,
        norm: Callable[[int], nn.Module],
        d_model: int,
        dropout: ResidualDropout,
        *,
        embedding_norm: bool = False,
    ) -> None:
        super().__init__(attention, feedforward, norm, d_model, dropout)
        self.needs_embedding_norm = embedding_norm
        self.attention_output_norm = norm(d_model)
        self.feedforward_output_norm = norm(d_model)

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


class ParallelBlock(Block):
    """x + A(N1(x)) + F(N2(x)) (GPT-NeoX, Pythia).

    - shared_norm: N1 = N2, one norm for both branches (GPT-J, PaLM 2204.02311).
    """

    def __init__(
        self,
        attention: nn.Module,
        feedforward: nn.Module,
        norm: Callable[[int], nn.Module],
        d_model: int,
        dropout: ResidualDropout,
        *,
        shared_norm: bool = False,
    ) -> None:
        super().__init__(attention, feedforward, norm, d_model, dropout)
        self.shared_norm = shared_norm
        if shared_norm:
            self.feedforward_norm = nn.Identity()

    def forward(self, x_BTD: Tensor, context: SequenceContext) -> Tensor | tuple[Tensor, Auxiliary]:
        """(B, T, D) to (B, T, D)."""
        normed_BTD = self.attention_norm(x_BTD)
        y_BTD, terms = self.attend(normed_BTD, context)
        z_BTD, more = self.feed_forward(normed_BTD if self.shared_norm else self.feedforward_norm(x_BTD))
        return self.result(x_BTD + y_BTD + z_BTD, terms, more)
