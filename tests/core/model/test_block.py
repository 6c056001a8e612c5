from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oracles import randomize
from thunderhead.core.model.block import Block, ResidualDropout
from thunderhead.core.model.context import SequenceContext
from thunderhead.core.model.decoder import Decoder
from thunderhead.options.blocks import ParallelBlock, PostNormBlock, SandwichBlock

D = 6
CONTEXT = SequenceContext(torch.arange(4)[None])


class Branch(nn.Linear):
    """Stands for attention and for the feed-forward branch."""

    def forward(self, x: Tensor, context: SequenceContext | None = None) -> Tensor:
        return torch.tanh(super().forward(x))


def build(kind: Callable[..., Block] = Block, dropout: ResidualDropout | None = None) -> Block:
    norm = partial(nn.LayerNorm, eps=1e-5)
    block = kind(Branch(D, D), Branch(D, D), norm, D, dropout or ResidualDropout()).double().eval()
    randomize(block)
    return block


KINDS: dict[str, tuple[Callable[..., Block], int]] = {  # and how many norms they have
    "pre": (Block, 2),
    "post": (PostNormBlock, 2),
    "sandwich": (SandwichBlock, 4),
    "parallel": (ParallelBlock, 2),
    "shared": (partial(ParallelBlock, shared_norm=True), 1),
}


def formula(kind: str, block: Block, x: Tensor) -> Tensor:
    """The block of its docstring, written out from the bare weights."""

    def norm(name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        weights: Any = getattr(block, f"{name}_norm")
        return scaled * weights.weight + weights.bias

    attend, feed = block.attention, block.feedforward
    if kind in ("parallel", "shared"):
        return x + attend(norm("attention", x)) + feed(norm("attention" if kind == "shared" else "feedforward", x))
    if kind == "pre":
        x = x + attend(norm("attention", x))
        return x + feed(norm("feedforward", x))
    if kind == "post":
        x = norm("attention", x + attend(x))
        return norm("feedforward", x + feed(x))
    x = x + norm("attention_output", attend(norm("attention", x)))
    return x + norm("feedforward_output", feed(norm("feedforward", x)))


@pytest.mark.parametrize("kind", KINDS)
def test_equals_its_formula(kind: str) -> None:
    block = build(KINDS[kind][0])
    x = torch.randn(2, 4, D, dtype=torch.float64)
    torch.testing.assert_close(block(x, CONTEXT), formula(kind, block, x))
    assert sum(isinstance(module, nn.LayerNorm) for module in block.modules()) == KINDS[kind][1]


@pytest.mark.parametrize("rate", ["attention_output", "feedforward_output"])
def test_dropout_in_training_only(rate: str) -> None:
    block = build(dropout=ResidualDropout(**{rate: 0.5}))
    x = torch.randn(2, 4, D, dtype=torch.float64)
    torch.testing.assert_close(block(x, CONTEXT), formula("pre", block, x))
    block.train()
    # The branch's output is dropped or doubled, element by element; the residual stream itself never is.
    if rate == "feedforward_output":
        middle = x + block.attention(block.attention_norm(x))
        branch = block.feedforward(block.feedforward_norm(middle))
        share = (block(x, CONTEXT) - middle) / branch
        assert torch.all(torch.isclose(share * (share - 2), torch.zeros_like(share)))
        assert 0 < (share < 1).sum() < share.numel()
    else:
        assert not torch.allclose(block(x, CONTEXT), formula("pre", block, x))


@pytest.mark.parametrize(
    ("option", "final_norm", "embedding_norm"),
    [("pre", 1, 0), ("post", 0, 0), ("sandwich", 1, 0), ("peri", 1, 1), ("parallel", 1, 0)],
)
def test_the_norms_outside_the_blocks(
    build: Callable[..., Decoder], option: str, final_norm: int, embedding_norm: int
) -> None:
    decoder = build(f"block={option}", "position=none", "norm=layernorm")
    randomize(decoder)
    assert (decoder.final_norm is not None, decoder.embedding_norm is not None) == (final_norm, embedding_norm)
    tokens = torch.randint(61, (2, 9))
    x = decoder.embedding.weight[tokens]
    if embedding_norm:
        x = decoder.embedding_norm(x)
    for block, context in zip(decoder.blocks, decoder.contexts(tokens), strict=True):
        x = block(x, context)
    torch.testing.assert_close(decoder.hidden(tokens)[0], decoder.final_norm(x) if final_norm else x)


def test_dropout_of_embeddings(build: Callable[..., Decoder]) -> None:
    decoder = build("dropout=gpt2", "dropout.attention_output=0.0", "dropout.feedforward_output=0.0")
    tokens = torch.randint(61, (2, 9))
    assert torch.equal(decoder.hidden(tokens)[0], decoder.hidden(tokens)[0])
    decoder.train()
    assert not torch.equal(decoder.hidden(tokens)[0], decoder.hidden(tokens)[0])
