"""The decoder-only language model: embeddings → blocks → norm → head. The one place that wires a model.

Shape letters: B sequences, T tokens a sequence, D model dimensions, V vocabulary.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, cast

import torch
from annotated_types import Gt, Le
from torch import Tensor, nn
from torch.nn import functional as F

from thunderhead.core.model import init
from thunderhead.core.model.block import Block, Checkpointing, ResidualDropout
from thunderhead.core.model.context import Cache, SequenceContext, document_layout
from thunderhead.core.model.loss import Auxiliary, LossTerms, summed, with_terms
from thunderhead.core.model.mixer import SequenceMixer, flops_per_token
from thunderhead.core.model.position import Position
from thunderhead.core.types import PositiveFloat, PositiveInt


class Decoder(nn.Module):
    """A decoder-only transformer from component factories: classes, or `functools.partial`s that carry their settings.

    Call `initialize(seed)` before use: building leaves torch's default weights (none on the "meta" device).

    Supplied by the code:
    - tokenizer_vocab_size: tokens that the data may contain; eos_id: the one that ends a document, None if none does.
    - the factories, called once a layer or once a model. Those of a layer are told `layer_index` (from 0) and
      `n_layers` where their signatures have them: layers may differ.

    Settings:
    - n_layers, d_model, n_heads, context_length (the longest input, in tokens).
    - d_ff: hidden size of the feed-forward branch; None = as the activation's own ratio says.
    - vocab_size: logits of the head, as published for a named shape; None = the tokenizer's. At least the tokenizer's.
    - vocab_multiple: rows of embedding and head are padded up to a multiple of it, for the speed of the head's matrix
      multiplication; logits of padding rows are cut off, so that they get neither probability nor gradient.
    - tie_embeddings: the head uses the embedding's weights (Press & Wolf 1608.05859).
    - bias: of linear layers in attention and feed-forward branches (norms have their own setting; the head has none).
    - init_std, scale_residual_init: see `thunderhead.core.model.init.initialize`.

    Raises ValueError for a vocabulary smaller than the tokenizer's, for components that do not fit together, and as
    these do.
    """

    def __init__(  # noqa: PLR0917 - supplied by keyword; before the star to tell them from settings
        self,
        tokenizer_vocab_size: int,
        eos_id: int | None,
        attention: Callable[..., SequenceMixer],
        position: Callable[..., Position],
        activation: Callable[..., nn.Module],
        norm: Callable[[int], nn.Module],
        dropout: Callable[[], ResidualDropout],
        block: Callable[..., Block],
        loss: Callable[[], Callable[[Tensor, Tensor, Tensor, int], LossTerms]],
        activation_checkpointing: Callable[[], Checkpointing],
        *,
        n_layers: Annotated[int, Gt(0), Le(4096)],
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
            smaller = f"model.vocab_size={vocab_size} is smaller than the tokenizer's {tokenizer_vocab_size} tokens"
            raise ValueError(f"{smaller}: raise it, or set it to null to follow the tokenizer")
        self.n_layers, self.n_heads, self.context_length = n_layers, n_heads, context_length
        self.vocab_size, self.eos_id = vocab_size or tokenizer_vocab_size, eos_id
        self.init_std, self.scale_residual_init = init_std, scale_residual_init
        self.local_heads = slice(None)  # of the attention heads, those of this rank under tensor parallelism
        # A parametrization sets these three: factors of the initial std and what else it knows, by parameter.
        self.std_factors: Mapping[str, float] = {}
        self.growth: Mapping[str, Any] = {}
        self.output_scale = 1.0
        n_rows = -(-self.vocab_size // vocab_multiple) * vocab_multiple

        rates = dropout()
        self.embedding_dropout = rates.embedding
        self.embedding = nn.Embedding(n_rows, d_model)
        model = {"d_model": d_model, "n_heads": n_heads, "context_length": context_length, "bias": bias}
        self.blocks = nn.ModuleList()
        for layer_index in range(n_layers):
            layer = {**model, "layer_index": layer_index, "n_layers": n_layers}
            mixer, feedforward = supplied(attention, **layer), supplied(activation, d_ff=d_ff, **layer)
            parts = {"attention": mixer, "feedforward": feedforward, "norm": norm, "dropout": rates}
            self.blocks.append(supplied(block, **parts, **layer))
        rotary_dims = sorted({mixer.rotary_dim for mixer in self.mixers} - {0})
        self.position: Position = supplied(position, rotary_dim=max(rotary_dims, default=0), **model)
        rotates, biases = (getattr(type(self.position), n) is not getattr(Position, n) for n in ("rotation", "slopes"))
        has_masks = any(type(mixer).masks is not SequenceMixer.masks for mixer in self.mixers)
        if (rotates and not rotary_dims) or (biases and not has_masks):
            raise ValueError("position: no layer makes use of these positions: use position=none")
        if rotates and len(rotary_dims) > 1:
            raise ValueError(f"position: the layers rotate heads of different sizes, {rotary_dims}: use position=none")
        first = cast(Block, self.blocks[0])
        self.embedding_norm = norm(d_model) if first.needs_embedding_norm else None
        self.final_norm = norm(d_model) if first.needs_final_norm else None
        self.head = None if tie_embeddings else nn.Linear(d_model, n_rows, bias=False)
        self.loss = loss()
        checkpointing = activation_checkpointing()
        for layer_index, built in enumerate(self.blocks):
            checkpointing.apply(layer_index, built)
        if eos_id is None and any(mixer.document_mask for mixer in self.mixers):
            raise ValueError("attention.document_mask=true needs an end-of-document token, which the tokenizer has not")

    @property
    def mixers(self) -> list[SequenceMixer]:
        """The attention of each block, or what stands in its place."""
        return [cast(SequenceMixer, block.attention) for block in self.blocks]

    @property
    def head_weight(self) -> Tensor:
        """Weights of the head, (V padded, D); the embedding's when tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def initialize(self, seed: int) -> None:
        """Draw all weights, a pure function of the seed and each parameter's name."""
        init.initialize(self, seed, self.init_std, self.n_layers, self.scale_residual_init, self.std_factors)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> LossTerms:
        """The training loss of predicting targets (B, T) from tokens (B, T), int64; targets of −100 are left out."""
        hidden_BTD, terms = self.hidden(tokens_BT)
        return self.loss(hidden_BTD, self.head_weight, targets_BT, self.vocab_size).plus(terms)

    def logits(self, tokens_BT: Tensor, cache: "DecoderCache | None" = None) -> Tensor:
        """Scores of the next token after each token, (B, T, V) without padding, in the compute dtype.

        With a cache, the tokens follow those it has seen, and it takes them in.
        """
        return F.linear(self.hidden(tokens_BT, cache)[0], self.head_weight)[..., : self.vocab_size]

    def hidden(self, tokens_BT: Tensor, cache: "DecoderCache | None" = None) -> tuple[Tensor, Auxiliary]:
        """Final hidden states (B, T, D), ready for the head, and the sums of the blocks' terms of the loss.

        Raises ValueError if T, with what is cached, is more than context_length, or than the cache has room for.
        """
        terms: Auxiliary = {}
        contexts = self.contexts(tokens_BT, cache)
        new_ids = contexts[0].position_ids[:, contexts[0].n_seen :]
        x_BTD = self.position.embed(self.embedding(tokens_BT), new_ids)
        if self.embedding_norm is not None:
            x_BTD = self.embedding_norm(x_BTD)
        x_BTD = F.dropout(x_BTD, self.embedding_dropout, self.training)
        for block, context in zip(self.blocks, contexts, strict=True):
            x_BTD, more = with_terms(block(x_BTD, context))
            terms = summed(terms, more)
        if self.final_norm is not None:
            x_BTD = self.final_norm(x_BTD)
        return (x_BTD if self.output_scale == 1 else x_BTD * self.output_scale), terms

    def contexts(self, tokens_BT: Tensor, cache: "DecoderCache | None" = None) -> list[SequenceContext]:
        """What each block is told of positions, documents and masks; the cache is told of the tokens."""
        n_seen, room = (0, self.context_length) if cache is None else (cache.n_seen, cache.room)
        if cache is not None:
            tokens_BT = torch.cat((cache.tokens, tokens_BT), dim=1)
        n_tokens, device, mixers = tokens_BT.shape[1], tokens_BT.device, self.mixers
        if n_tokens > room:
            what = f"the input has {n_tokens} tokens a sequence" + (", with those cached" if n_seen else "")
            limit = f"model.context_length={room}" if room == self.context_length else f"the cache was made for {room}"
            raise ValueError(f"{what}, {limit}")
        if cache is not None:
            cache.tokens = tokens_BT
        document_ids, position_ids = None, torch.arange(n_tokens, device=device)[None]
        if any(mixer.document_mask for mixer in mixers):
            assert self.eos_id is not None
            document_ids, restarted = document_layout(tokens_BT, self.eos_id)
            if all(mixer.document_mask for mixer in mixers):
                position_ids = restarted
        dtype = torch.promote_types(self.embedding.weight.dtype, torch.float32)
        slopes_H = self.position.slopes(device, dtype)
        shared = SequenceContext(
            position_ids=position_ids,
            document_ids=document_ids,
            rotation=self.position.rotation(position_ids, dtype),
            slopes=None if slopes_H is None else slopes_H[self.local_heads],
            n_seen=n_seen,
        )
        masks = {key: mixer.masks(shared) for key, mixer in {mixer.mask_key(): mixer for mixer in mixers}.items()}
        caches = [None] * len(mixers) if cache is None else cache.layers
        return [shared._replace(**masks[m.mask_key()], cache=own) for m, own in zip(mixers, caches, strict=True)]

    def new_cache(
        self,
        n_sequences: int = 1,
        n_tokens: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> "DecoderCache | None":
        """An empty cache for `logits`, with room for n_tokens tokens of each sequence; None: for context_length.

        None where a layer has no cache, or heads are divided among ranks: then all is computed anew for each token.
        """
        device = device or self.embedding.weight.device
        if dtype is None:
            autocast = torch.is_autocast_enabled(device.type)
            dtype = torch.get_autocast_dtype(device.type) if autocast else self.embedding.weight.dtype
        room = min(n_tokens or self.context_length, self.context_length)
        layers = [mixer.new_cache(n_sequences, room, device, dtype) for mixer in self.mixers]
        known = [layer for layer in layers if layer is not None]
        if len(known) < len(layers) or self.local_heads != slice(None):
            return None
        return DecoderCache(known, torch.empty(n_sequences, 0, dtype=torch.int64, device=device), room)

    def cache_bytes_per_token(self, dtype: torch.dtype = torch.bfloat16) -> float | None:
        """Bytes of the cache of one sequence at full context, for each token of that; None if there is no cache."""
        cache = self.new_cache(device=torch.device("meta"), dtype=dtype)
        return None if cache is None else cache.bytes_per_token

    def attention_kernel(self, device: torch.device, dtype: torch.dtype) -> str:
        """What computes attention there, for the record: of layers that differ, all that occur."""
        with_slopes = self.position.slopes(torch.device("cpu")) is not None
        return ", ".join(dict.fromkeys(mixer.kernel_on(device, dtype, with_slopes) for mixer in self.mixers))

    def parameter_counts(self) -> dict[str, int]:
        """Parameters by part, which sum to `total`: padding rows count, a tied head is 0, `norm` those of blocks."""

        def count(modules: Iterable[nn.Module | None]) -> int:
            return sum(p.numel() for module in modules if module is not None for p in module.parameters())

        counts = {
            "embedding": count([self.embedding]),
            "position": count([self.position]),
            "attention": count(self.mixers),
            "feedforward": count(block.feedforward for block in self.blocks),  # type: ignore[misc]
            "norm": 0,
            "head": count([self.head]),
        }
        return counts | {"norm": count([self]) - sum(counts.values()), "total": count([self])}

    def forward_flops_per_token(self) -> int:
        """Multiply-adds × 2 of one token's forward pass at full context_length (PaLM 2204.02311, appendix B).

        Those of the blocks (`flops_per_token`) and of the head with its padding, tied or not. Look-ups, norms,
        activations, rotations and the softmax are left out. Backward costs twice as much; recomputation comes on top.
        """
        return flops_per_token(self.blocks) + 2 * self.head_weight.numel()


@dataclass
class DecoderCache:
    """The tokens that a decoder has seen, and what its layers keep of them.

    cache = decoder.new_cache()
    logits = decoder.logits(prompt_BT, cache)[:, -1], then of each next token: decoder.logits(next_B1, cache)[:, -1]
    """

    layers: list[Cache]
    tokens: Tensor  # (B, T)
    room: int  # the largest T

    @property
    def n_seen(self) -> int:
        return self.tokens.shape[1]

    @property
    def bytes_per_token(self) -> float:
        """Of one sequence, for each token that there is room for."""
        n_bytes = sum(tensor.nbytes for layer in self.layers for tensor in layer.values())
        return n_bytes / (len(self.tokens) * self.room)


def supplied(factory: Callable[..., Any], **names: Any) -> Any:
    """Call a factory with those of the names that its signature asks for; settings, after a *, with a default stay."""
    parameters = inspect.signature(factory).parameters
    asked = {n for n, p in parameters.items() if p.default is p.empty or p.kind is p.POSITIONAL_OR_KEYWORD}
    return factory(**{name: value for name, value in names.items() if name in asked})
