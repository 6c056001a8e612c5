"""Layers may differ: what a decoder asks of them is right for each."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oracles import randomize
from thunderhead.core.model.attention import Attention, GroupedQueryAttention
from thunderhead.core.model.block import Block, ResidualDropout
from thunderhead.core.model.context import SequenceContext
from thunderhead.core.model.decoder import Decoder
from thunderhead.core.model.feedforward import FeedForward
from thunderhead.core.model.loss import NextTokenLoss
from thunderhead.core.model.mixer import SequenceMixer, flops_per_token
from thunderhead.core.model.position import NoPosition, RotaryPosition
from thunderhead.core.types import Problem
from thunderhead.options.activation_checkpointing import ActivationCheckpointing
from thunderhead.options.positions import AlibiPosition

CPU = torch.device("cpu")
TOKENS = torch.tensor([[7, 3, 0, 9, 8, 0, 0, 5, 4, 3, 2, 1, 6, 7, 8, 9]])


class Shift(SequenceMixer):
    """No attention at all: each token gets a projection of the one before it. It has no cache."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.proj = nn.Linear(d_model, d_model)

    def forward(self, x_BTD: Tensor, context: SequenceContext) -> Tensor:
        y_BTD: Tensor = self.proj(nn.functional.pad(x_BTD, (0, 0, 1, 0))[:, :-1])
        return y_BTD


def build(
    attention: Any, n_layers: int = 4, position: Any = RotaryPosition, activation: Any = None, block: Any = Block
) -> Decoder:
    decoder = Decoder(
        61, 0, attention, position, activation or partial(FeedForward, activation="gelu"), nn.RMSNorm, ResidualDropout,
        block, NextTokenLoss, ActivationCheckpointing, n_layers=n_layers, d_model=32, n_heads=4, context_length=16,
    )  # fmt: skip
    decoder.initialize(seed=1)
    randomize(decoder, 0.2)
    return decoder.eval()


def by_layer(*settings: dict[str, Any]) -> Callable[..., SequenceMixer]:
    """Grouped-query attention with other settings in each layer, and again."""

    def attention(*, d_model: int, n_heads: int, context_length: int, bias: bool, layer_index: int) -> SequenceMixer:
        chosen = settings[layer_index % len(settings)]
        return GroupedQueryAttention(d_model, n_heads, context_length, bias, **chosen)

    return attention


def test_factories_are_told_what_their_signatures_name() -> None:
    told: list[Any] = []

    def activation(*, d_model: int, layer_index: int, n_layers: int, d_ff: int = 7) -> nn.Module:
        told.append((d_model, layer_index, n_layers, d_ff))
        return FeedForward(d_model, d_ff, False, activation="relu")

    def block(layer_index: int, attention: Any, feedforward: Any, norm: Any, d_model: int, n_layers: int = 9) -> Block:
        told.append((layer_index, n_layers))
        return Block(attention, feedforward, norm, d_model, ResidualDropout())

    build(Shift, 2, NoPosition, activation, block)
    # d_ff and n_layers are settings where they come after the star, and stand before it what the code supplies
    assert told == [(32, 0, 2, 7), (0, 2), (32, 1, 2, 7), (1, 2)]


def test_masks_are_made_once_for_each_kind_of_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    made, masks = [], Attention.masks

    def spy(self: Attention, context: SequenceContext) -> dict[str, Any]:
        made.append(self.window)
        return masks(self, context)

    monkeypatch.setattr(Attention, "masks", spy)
    decoder = build(by_layer({"window": 4}, {}, {"window": 4}, {"window": 4, "document_mask": True}))
    contexts = decoder.contexts(TOKENS)
    assert made == [4, None, 4]
    assert contexts[0].mask is contexts[2].mask
    assert contexts[1].mask is None
    assert not torch.equal(contexts[0].mask, contexts[3].mask)


@pytest.mark.parametrize("n_heads_of_values", [1, 4])
def test_each_layer_has_its_own_mask(n_heads_of_values: int) -> None:
    """A decoder of different layers is its layers one after the other, each with its own mask, written densely."""
    settings = [{"window": 4, "n_kv_heads": n_heads_of_values}, {"document_mask": True}, {}]
    decoder = build(by_layer(*settings), 3)
    x = decoder.embedding(TOKENS)
    index = torch.arange(16)
    distance = index[:, None] - index
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 2, *[3] * 9]])
    allowed = [
        (distance >= 0) & (distance < 4),
        (distance >= 0) & (documents.mT == documents),
        distance >= 0,
    ]  # documents do not restart positions, as one layer sees beyond them
    rotation = decoder.position.rotation(index[None])
    for block, mask in zip(decoder.blocks, allowed, strict=True):
        x = block(x, SequenceContext(index[None], rotation=rotation, mask=mask[None, None]))
    torch.testing.assert_close(decoder.hidden(TOKENS)[0], decoder.final_norm(x), rtol=1e-4, atol=1e-5)


def test_positions_restart_where_all_layers_mask_documents() -> None:
    mixed = build(by_layer({"document_mask": True}, {})).contexts(TOKENS)
    assert mixed[0].position_ids.tolist() == mixed[1].position_ids.tolist() == [list(range(16))]
    alike = build(by_layer({"document_mask": True})).contexts(TOKENS)
    assert alike[0].position_ids[0, :7].tolist() == [0, 1, 2, 0, 1, 2, 0]


@torch.inference_mode()
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_cached_as_uncached() -> None:
    decoder = build(
        by_layer({"window": 4}, {"document_mask": True}, {"logit_softcap": 2.0}, {"n_kv_heads": 1})
    ).double()
    cache = decoder.new_cache()
    assert cache is not None
    found = [decoder.logits(piece, cache) for piece in TOKENS.split([1, 6, 1, 1, 7], dim=1)]
    torch.testing.assert_close(torch.cat(found, dim=1), decoder.logits(TOKENS), rtol=1e-10, atol=1e-10)
    assert [layer["keys"].shape[1:3] for layer in cache.layers] == [(4, 4), (4, 16), (4, 16), (1, 16)]


def test_one_layer_is_enough_to_be_refused() -> None:
    decoder = build(by_layer({}, {"logit_softcap": 5.0}, {"backend": "flex"}))

    def asked(accelerator: str) -> list[Problem]:
        run = SimpleNamespace(accelerator=accelerator)
        return [problem for mixer in decoder.mixers for problem in mixer.problems(run)]

    problems = asked("cpu")
    assert [problem.path for problem in problems] == ["attention.logit_softcap", "attention.backend=flex"]
    assert "this run is on cpu" in problems[0].message
    assert asked("cuda") == []
    with pytest.raises(ValueError, match=r"document_mask=true needs an end-of-document token"):
        Decoder(
            61, None, by_layer({}, {"document_mask": True}), NoPosition, partial(FeedForward, activation="gelu"),
            nn.RMSNorm, ResidualDropout, Block, NextTokenLoss, ActivationCheckpointing,
            n_layers=2, d_model=32, n_heads=4, context_length=16,
        )  # fmt: skip


def test_what_computes_them_is_told_of_all() -> None:
    decoder = build(by_layer({}, {"logit_softcap": 5.0}))
    assert decoder.attention_kernel(CPU, torch.float32) == "FLASH_ATTENTION, flex"


def test_a_mixer_needs_neither_heads_nor_masks_nor_a_cache() -> None:
    decoder = build(Shift, position=NoPosition)
    assert decoder.logits(TOKENS).shape == (1, 16, 61)
    assert decoder.new_cache() is None
    assert decoder.cache_bytes_per_token() is None
    assert decoder.attention_kernel(CPU, torch.float32) == "Shift"
    # the feed-forward's two matrices, the mixer's one, the head
    assert decoder.forward_flops_per_token() == 4 * 2 * (2 * 32 * 128 + 32 * 32) + 2 * decoder.head_weight.numel()


def test_hybrids_rotate_where_there_are_heads() -> None:
    def attention(*, d_model: int, n_heads: int, context_length: int, bias: bool, layer_index: int) -> SequenceMixer:
        if layer_index % 2:
            return Shift(d_model)
        return GroupedQueryAttention(d_model, n_heads, context_length, bias)

    assert build(attention).position.rotated_dim == 8
    for position in (RotaryPosition, AlibiPosition):
        with pytest.raises(ValueError, match="no layer makes use of these positions: use position=none"):
            build(Shift, position=position)
    with pytest.raises(ValueError, match=r"heads of different sizes, \[4, 8\]: use position=none"):
        build(by_layer({}, {"head_dim": 4}))
    assert build(by_layer({}, {"head_dim": 4}), position=NoPosition).logits(TOKENS).shape == (1, 16, 61)


def test_tables_are_looked_up_and_cost_nothing() -> None:
    """As torch's own counter has it: an embedding is no matrix product."""
    module = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 4, bias=False), nn.EmbeddingBag(50, 8))
    assert flops_per_token(module) == 2 * 8 * 4
