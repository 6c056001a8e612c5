"""A transformer block: attention and feed-forward branches around a residual stream.

Shape letters: B sequences, T tokens a sequence, D model dimensions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

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


class Block(nn.Module):
    """One layer of the decoder: where its norms sit, and whether its two branches run in sequence or in parallel.

    With A, F the two branches and N norms, each with its own weights:

    - placement="pre" (GPT-2; 2002.04745): x + A(N(x)), then x + F(N(x)). The decoder adds a final norm.
    - "post" (Vaswani et al. 2017): N(x + A(x)), then N(x + F(x)). No final norm: the stream is normalised already.
    - "sandwich" (CogView, 2105.13290): x + N(A(N(x))), then x + N(F(N(x))). The decoder adds a final norm.
    - "peri" (Peri-LN, 2502.02732): the block of "sandwich"; in addition the decoder normalises the embeddings, the
      paper's "initial embedding normalisation", which is optional there and is what sets the two options apart here.
    - parallel_residual: x + A(N1(x)) + F(N2(x)) (GPT-NeoX, Pythia); placement "pre" only.
    - shared_norm: N1 = N2, one norm for both parallel branches (GPT-J, PaLM 2204.02311).

    Dropout follows a branch's last operation before the sum.

    Raises ValueError for parallel_residual with another placement than "pre", for shared_norm without it.
    """

    def __init__(
        self,
        attention: nn.Module,
        feedforward: nn.Module,
        norm: Callable[[int], nn.Module],
        d_model: int,
        dropout: ResidualDropout,
        *,
        placement: Literal["pre", "post", "sandwich", "peri"] = "pre",
        parallel_residual: bool = False,
        shared_norm: bool = False,
    ) -> None:
        super().__init__()
        if parallel_residual and placement != "pre":
            raise ValueError(
                f"block.parallel_residual=true needs block.placement=pre, not {placement}: published parallel blocks "
                "normalise the branches' common input, and norms on their outputs or sum leave no single place for it"
            )
        if shared_norm and not parallel_residual:
            raise ValueError(
                "block.shared_norm=true needs block.parallel_residual=true: branches in sequence read different inputs"
            )
        self.attention = attention
        self.feedforward = feedforward
        self.dropout = dropout
        self.placement = placement
        self.parallel_residual = parallel_residual
        around = placement in ("sandwich", "peri")
        self.attention_norm = norm(d_model)
        self.feedforward_norm = None if shared_norm else norm(d_model)
        self.attention_output_norm = norm(d_model) if around else None
        self.feedforward_output_norm = norm(d_model) if around else None

    @property
    def needs_final_norm(self) -> bool:
        """Whether the decoder must normalise the last block's output."""
        return self.placement != "post"

    @property
    def needs_embedding_norm(self) -> bool:
        """Whether the decoder must normalise the first block's input."""
        return self.placement == "peri"

    def forward(self, x_BTD: Tensor, context: SequenceContext) -> Tensor | tuple[Tensor, Auxiliary]:
        """(B, T, D) to (B, T, D), beside it the branches' terms of the loss if there are any."""
        is_post, feedforward_norm = self.placement == "post", self.feedforward_norm or nn.Identity()
        normed_BTD = x_BTD if is_post else self.attention_norm(x_BTD)
        y_BTD, terms = self._attend(normed_BTD, context)
        if self.parallel_residual:
            other_BTD = normed_BTD if self.feedforward_norm is None else self.feedforward_norm(x_BTD)
            z_BTD, more = self._feed_forward(other_BTD)
            x_BTD = x_BTD + y_BTD + z_BTD
        elif is_post:
            x_BTD = self.attention_norm(x_BTD + y_BTD)
            z_BTD, more = self._feed_forward(x_BTD)
            x_BTD = feedforward_norm(x_BTD + z_BTD)
        else:
            x_BTD = x_BTD + y_BTD
            z_BTD, more = self._feed_forward(feedforward_norm(x_BTD))
            x_BTD = x_BTD + z_BTD
        terms = summed(terms, more)
        return (x_BTD, terms) if terms else x_BTD

    def _attend(self, x_BTD: Tensor, context: SequenceContext) -> tuple[Tensor, Auxiliary]:
        y_BTD, terms = with_terms(self.attention(x_BTD, context))
        if self.attention_output_norm is not None:
            y_BTD = normalize(self.attention_output_norm, y_BTD)
        return F.dropout(y_BTD, self.dropout.attention_output, self.training), terms

    def _feed_forward(self, x_BTD: Tensor) -> tuple[Tensor, Auxiliary]:
        y_BTD, terms = with_terms(self.feedforward(x_BTD))
        if self.feedforward_output_norm is not None:
            y_BTD = normalize(self.feedforward_output_norm, y_BTD)
        return F.dropout(y_BTD, self.dropout.feedforward_output, self.training), terms
