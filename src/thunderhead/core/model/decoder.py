"""The decoder-only language model: embeddings → blocks → norm → head. The one place that wires a model.

Shape letters: B sequences, T tokens a sequence, D model dimensions, V vocabulary.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thunderhead.core.model import init
from thunderhead.core.model.attention import Attention
from thunderhead.core.model.block import Block, ResidualDropout
from thunderhead.core.model.context import LayerCache, SequenceContext, document_layout
from thunderhead.core.model.loss import LossTerms, NextTokenLoss
from thunderhead.core.model.position import Position
from thunderhead.core.types import PositiveFloat, PositiveInt
from thunderhead.options.activation_checkpointing import ActivationCheckpointing


class Decoder(nn.Module):
    """A decoder-only transformer from component factories: classes, or `functools.partial`s that carry their settings.

        Decoder(256, None, partial(GroupedQueryAttention, n_kv_heads=2), RotaryPosition, …, n_layers=6, d_model=256, …)

    Call `initialize(seed)` before use: building leaves torch's default weights (none on the "meta" device).

    Supplied by the code:
    - tokenizer_vocab_size: tokens that the data may contain; eos_id: the one that ends a document, None if none does.
    - attention, position, activation, norm, dropout, block, loss: factories, called once a layer or once a model.

    Settings:
    - n_layers, d_model, n_heads, context_length (the longest input, in tokens).
    - d_ff: hidden size of the feed-forward branch; None = as the activation's own ratio says.
    - vocab_size: logits of the head, as published for a named shape; None = the tokenizer's. At least the tokenizer's.
    - vocab_multiple: rows of embedding and head are padded up to a multiple of it, for the speed of the head's matrix
      multiplication; logits of padding rows are cut off, so that they get neither probability nor gradient.
    - tie_embeddings: the head uses the embedding's weights (Press & Wolf 1608.05859).
    - bias: of linear layers in attention and feed-forward branches (norms have their own setting; the head has none).
    - init_std, scale_residual_init: see `thunderhead.core.model.init.initialize`.

    Raises ValueError for a vocabulary smaller than the tokenizer's, for attention.document_mask without an eos_id, and
    as the components do.
    """

    def __init__(  # noqa: PLR0917 - supplied by keyword; before the star to tell them from settings
        self,
        tokenizer_vocab_size: int,
        eos_id: int | None,
        attention: Callable[..., Attention],
        position: Callable[..., Position],
        activation: Callable[..., nn.Module],
        norm: Callable[[int], nn.Module],
        dropout: Callable[[], ResidualDropout],
        block: Callable[..., Block],
        loss: Callable[[], NextTokenLoss],
        activation_checkpointing: Callable[[], ActivationCheckpointing],
        *,
        n_layers: PositiveInt,
        d_model: PositiveInt,
        n_heads: PositiveInt,
        context_length: PositiveInt,
        d_ff: PositiveInt | None = None,
        vocab_size: PositiveInt | None = None,
        vocab_multiple: PositiveInt = 128,
        tie_embeddings: bool = True,
        bias: bool = False,
        init_std: PositiveFloat = 0.02,
        scale_residual_init: bool = True,
    ) -> None:
        super().__init__()
        if vocab_size is not None and vocab_size < tokenizer_vocab_size:
            raise ValueError(
                f"model.vocab_size={vocab_size} is smaller than the tokenizer's {tokenizer_vocab_size} tokens: "
                "raise it, or set it to null to follow the tokenizer"
            )
        self.eos_id = eos_id
        self.local_heads = slice(None)  # of the attention heads, those of this rank under tensor parallelism
        self.n_layers = n_layers
        self.context_length = context_length
        self.vocab_size = vocab_size or tokenizer_vocab_size
        self.init_std = init_std
        self.scale_residual_init = scale_residual_init
        # A parametrization sets these three: factors of the initial std and what else it knows, by parameter.
        self.std_factors: Mapping[str, float] = {}
        self.growth: Mapping[str, Any] = {}
        self.output_scale = 1.0
        n_rows = -(-self.vocab_size // vocab_multiple) * vocab_multiple

        rates = dropout()
        self.embedding_dropout = rates.embedding
        self.embedding = nn.Embedding(n_rows, d_model)
        self.blocks = nn.ModuleList(
            block(
                attention=attention(d_model=d_model, n_heads=n_heads, context_length=context_length, bias=bias),
                feedforward=activation(d_model=d_model, d_ff=d_ff, bias=bias),
                norm=norm,
                d_model=d_model,
                dropout=rates,
            )
            for _ in range(n_layers)
        )
        self.position = position(
            d_model=d_model, n_heads=n_heads, context_length=context_length, rotary_dim=self.attention.rotary_dim
        )
        first = self.blocks[0]
        assert isinstance(first, Block)
        self.embedding_norm = norm(d_model) if first.needs_embedding_norm else None
        self.final_norm = norm(d_model) if first.needs_final_norm else None
        self.head = None if tie_embeddings else nn.Linear(d_model, n_rows, bias=False)
        self.loss = loss()
        checkpointing = activation_checkpointing()
        for index, block_ in enumerate(self.blocks):
            checkpointing.apply(index, block_)
        if self.attention.document_mask and eos_id is None:
            raise ValueError("attention.document_mask=true needs an end-of-document token, which the tokenizer has not")

    @property
    def attention(self) -> Attention:
        """The first block's attention: all are alike in masks, backend and costs."""
        attention = self.blocks[0].attention
        assert isinstance(attention, Attention)
        return attention

    @property
    def head_weight(self) -> Tensor:
        """Weights of the head, (V padded, D); the embedding's when tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def initialize(self, seed: int) -> None:
        """Draw all weights, a pure function of the seed and each parameter's name; see `init.initialize`."""
        init.initialize(self, seed, self.init_std, self.n_layers, self.scale_residual_init, self.std_factors)

    def follow_base(self, base: "Decoder") -> None:
        """Maximal update parametrization: logits are divided by the growth of d_model (2203.03466, table 8)."""
        self.output_scale = base.embedding.embedding_dim / self.embedding.embedding_dim

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> LossTerms:
        """The training loss of predicting targets (B, T) from tokens (B, T), int64; targets of −100 are left out."""
        return self.loss(self.hidden(tokens_BT), self.head_weight, targets_BT, self.vocab_size)

    def logits(self, tokens_BT: Tensor, cache: "Cache | None" = None) -> Tensor:
        """Scores of the next token after each token, (B, T, V) without padding, in the compute dtype.

        With a cache, the tokens are those that follow the ones it has seen: any number first, then one at a time.
        """
        return F.linear(self.hidden(tokens_BT, cache), self.head_weight)[..., : self.vocab_size]

    def hidden(self, tokens_BT: Tensor, cache: "Cache | None" = None) -> Tensor:
        """Final hidden states (B, T, D), normalised and scaled, ready for the head.

        Raises ValueError if T, with what is cached, is more than context_length.
        """
        context = self._context(tokens_BT) if cache is None else self._context_after(tokens_BT, cache)
        x_BTD = self.position.embed(self.embedding(tokens_BT), context.position_ids)
        if self.embedding_norm is not None:
            x_BTD = self.embedding_norm(x_BTD)
        x_BTD = F.dropout(x_BTD, self.embedding_dropout, self.training)
        for index, block in enumerate(self.blocks):
            if cache is not None:
                context = context._replace(cache=cache.layers[index])
            x_BTD = block(x_BTD, context)
        if self.final_norm is not None:
            x_BTD = self.final_norm(x_BTD)
        return x_BTD if self.output_scale == 1 else x_BTD * self.output_scale

    def _context(self, tokens_BT: Tensor) -> SequenceContext:
        """Positions, rotation and masks: once for all blocks."""
        n_tokens, device = tokens_BT.shape[1], tokens_BT.device
        if n_tokens > self.context_length:
            raise ValueError(f"the input has {n_tokens} tokens a sequence, model.context_length={self.context_length}")
        document_ids, position_ids = None, torch.arange(n_tokens, device=device)[None]
        if self.attention.document_mask:
            assert self.eos_id is not None
            document_ids, position_ids = document_layout(tokens_BT, self.eos_id)
        slopes_H = self.position.slopes(device)
        if slopes_H is not None:
            slopes_H = slopes_H[self.local_heads]
        return SequenceContext(
            position_ids=position_ids,
            document_ids=document_ids,
            rotation=self.position.rotation(position_ids),
            slopes=slopes_H,
            **self.attention.masks(n_tokens, device, document_ids, slopes_H),
        )

    def _context_after(self, tokens_BT: Tensor, cache: "Cache") -> SequenceContext:
        """The context of tokens that follow those in a cache, which takes them in."""
        n_new, is_first = tokens_BT.shape[1], cache.tokens_BT is None
        all_BT = tokens_BT if cache.tokens_BT is None else torch.cat((cache.tokens_BT, tokens_BT), dim=1)
        cache.tokens_BT = all_BT
        if is_first:
            return self._context(tokens_BT)
        assert n_new == 1, "after the first tokens come single ones"
        n_tokens, device = all_BT.shape[1], all_BT.device
        if n_tokens > self.context_length:
            raise ValueError(
                f"there are {n_tokens} tokens with those cached, model.context_length={self.context_length}"
            )
        document_ids, position_ids = None, torch.tensor([[n_tokens - 1]], device=device)
        if self.attention.document_mask:
            assert self.eos_id is not None
            document_ids, all_positions = document_layout(all_BT, self.eos_id)
            position_ids = all_positions[:, -1:]
        slopes_H = self.position.slopes(device)
        return SequenceContext(
            position_ids=position_ids,
            document_ids=None if document_ids is None else document_ids[:, -1:],
            rotation=self.position.rotation(position_ids),
            slopes=slopes_H,
            **self.attention.next_masks(n_tokens, device, document_ids, slopes_H),
        )

    def parameter_counts(self) -> dict[str, int]:
        """Parameters by part; they sum to `total`. Also on the "meta" device.

        Padding rows count; a tied head counts 0; `norm` are the norms outside attention.
        """

        def count(*modules: nn.Module | None) -> int:
            return sum(p.numel() for module in modules if module is not None for p in module.parameters())

        attention, feedforward = (sum(count(getattr(b, n)) for b in self.blocks) for n in ("attention", "feedforward"))
        return {
            "embedding": count(self.embedding),
            "position": count(self.position),
            "attention": attention,
            "feedforward": feedforward,
            "norm": count(self.blocks, self.embedding_norm, self.final_norm) - attention - feedforward,
            "head": count(self.head),
            "total": count(self),
        }

    def forward_flops_per_token(self) -> int:
        """Multiply-adds × 2 of one token's forward pass at full context_length (PaLM 2204.02311, appendix B).

        2 FLOPs for each weight of a matrix (tensors of two or more dimensions in the blocks, and the head's with its
        padding, tied or not; look-ups are free), plus each attention's scores. Norms, activations, rotations and the
        softmax are left out, as in the convention. Backward costs twice as much; recomputation comes on top.
        """
        matrices = sum(p.numel() for p in self.blocks.parameters() if p.ndim >= 2) + self.head_weight.numel()
        scores = sum(block.attention.score_flops_per_token() for block in self.blocks)  # type: ignore[union-attr, operator]
        return 2 * matrices + scores


class Cache:
    """The keys and values of the tokens that a decoder has seen, for text token by token.

        cache = Cache(decoder)
        logits = decoder.logits(prompt_BT, cache)[:, -1]
        logits = decoder.logits(next_B[:, None], cache)[:, -1]

    It holds what the layers hand to `Attention.attend`: with multi-head latent attention the keys and values of all
    heads, not the latent.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.layers = [LayerCache(decoder.context_length) for _ in range(decoder.n_layers)]
        self.tokens_BT: Tensor | None = None
