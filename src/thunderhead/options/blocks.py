"""Further options of the group `block`: norms N and the two branches A, F in other places than in `Block`.

Shape letters: B sequences, T tokens a sequence, D model dimensions.
"""

from collections.abc import Callable

from torch import Tensor, nn

from thunderhead.core.model.block import Block, ResidualDropout
from thunderhead.core.model.context import SequenceContext
from thunderhead.core.model.loss import Auxiliary


class PostNormBlock(Block):
    """N(x + A(x)), then N(x + F(x)) (Vaswani et al. 2017). No final norm: the stream is normalised already."""

    needs_final_norm = False

    def forward(self, x_BTD: Tensor, context: SequenceContext) -> Tensor | tuple[Tensor, Auxiliary]:
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
        normed_BTD = self.attention_norm(x_BTD)
        y_BTD, terms = self.attend(normed_BTD, context)
        z_BTD, more = self.feed_forward(normed_BTD if self.shared_norm else self.feedforward_norm(x_BTD))
        return self.result(x_BTD + y_BTD + z_BTD, terms, more)
