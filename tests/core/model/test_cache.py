"""Tokens in pieces with a cache are what the whole sequence is at once."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oracles import options, randomize
from thunderhead.core.model.decoder import Decoder
from thunderhead.release.sample import generate

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
# of prompts and what follows, in pieces of any size and token by token
PIECES = {"tokens": [6, *range(7, 17)], "pieces": [1, 2, 5, 12, 16], "at_once": [16]}
ATTENTIONS = {
    **{name: [f"attention={name}"] for name in options("attention")},
    "sliding_window": ["attention=sliding_window", "attention.window=5", "attention.n_kv_heads=2"],
    "window_of_one": ["attention=sliding_window", "attention.window=1"],
    "mla_full": ["attention=mla", "attention.q_lora_rank=8", "attention.qk_norm=true", "attention.v_head_dim=6"],
    "qk_norm": ["attention=gqa", "attention.qk_norm=true"],
    "softcap": ["attention=gqa", "attention.logit_softcap=0.5"],
    "softcap_window": ["attention=sliding_window", "attention.window=5", "attention.logit_softcap=0.5"],
    "softcap_mla": ["attention=mla", "attention.logit_softcap=0.5"],
    "flex": ["attention=gqa", "attention.backend=flex"],
}


def tokens_of(decoder: Decoder, n_sequences: int = 3) -> torch.Tensor:
    tokens = torch.randint(1, 61, (n_sequences, decoder.context_length))
    tokens[0, 3] = tokens[0, 11] = tokens[1, 7] = 0  # documents end
    return tokens


def in_pieces(decoder: Decoder, tokens: torch.Tensor, ends: list[int]) -> torch.Tensor:
    cache = decoder.new_cache(len(tokens))
    assert cache is not None
    return torch.cat([decoder.logits(tokens[:, a:b], cache) for a, b in pairwise([0, *ends])], dim=1)


@pytest.mark.parametrize(
    ("position", "document_mask"),
    [
        *((position, False) for position in options("position")),
        *(pytest.param(p, True, marks=[] if p == "rope" else pytest.mark.slow) for p in options("position")),
    ],
)
@pytest.mark.parametrize("attention", ATTENTIONS)
@torch.inference_mode()
def test_equals_the_whole_sequence(
    build: Callable[..., Decoder], attention: str, position: str, document_mask: bool
) -> None:
    masked = f"attention.document_mask={document_mask}"
    decoder = build(*ATTENTIONS[attention], f"position={position}", masked).double()
    randomize(decoder, 0.2)
    tokens = tokens_of(decoder)
    expected = decoder.logits(tokens)
    for ends in PIECES.values():
        # float64 sums of up to 32 terms in another order, through two layers; logits are of order 10
        torch.testing.assert_close(in_pieces(decoder, tokens, ends), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("norm", options("norm"))
@pytest.mark.parametrize("block", options("block"))
@torch.inference_mode()
def test_equals_it_in_every_block(build: Callable[..., Decoder], block: str, norm: str) -> None:
    decoder = build("attention=gqa", f"block={block}", f"norm={norm}")
    tokens = tokens_of(decoder)
    # float32 sums in another order
    torch.testing.assert_close(
        in_pieces(decoder, tokens, PIECES["tokens"]), decoder.logits(tokens), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_the_text_is_the_same(build: Callable[..., Decoder], attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampled, with masks; and it goes on beyond the context, where nothing is cached."""
    settings: dict[str, Any] = {"top_k": 5, "temperature": 2.0, "seed": 3}
    decoder = build(*ATTENTIONS[attention], "attention.document_mask=true").double()
    randomize(decoder, 0.2)
    prompt = tokens_of(decoder)[:, :4]
    cached = generate(decoder, prompt, 20, **settings)
    monkeypatch.setattr(Decoder, "new_cache", lambda *_: None)
    assert torch.equal(cached, generate(decoder, prompt, 20, **settings))
    assert cached.shape == (3, 24)


@settings(max_examples=25)
@given(data=st.data())
def test_the_text_is_the_same_for_any_options(build: Callable[..., Decoder], data: st.DataObject) -> None:
    """Greedily, from prompts of any lengths to far beyond the context."""
    chosen = [*ATTENTIONS[data.draw(st.sampled_from(sorted(ATTENTIONS)))]]
    chosen += [f"{group}={data.draw(st.sampled_from(options(group)))}" for group in ("position", "norm", "activation")]
    decoder = build(*chosen).double()
    randomize(decoder, 0.2)
    lengths = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=3))
    prompts = torch.randint(1, 61, (len(lengths), max(lengths)))
    asked = {"lengths_B": torch.tensor(lengths), "temperature": 0.0}
    n_new = data.draw(st.integers(1, 24))
    cached = generate(decoder, prompts, n_new, **asked)
    with patch.object(Decoder, "new_cache", lambda *_: None):
        assert torch.equal(cached, generate(decoder, prompts, n_new, **asked))


def test_each_token_is_computed_once(build: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, logits, lengths = build(), Decoder.logits, []

    def spy(self: Decoder, tokens: torch.Tensor, *cache: object) -> torch.Tensor:
        lengths.append(tokens.shape[1])
        return logits(self, tokens, *cache)

    monkeypatch.setattr(Decoder, "logits", spy)
    generate(decoder, torch.ones(1, 12, dtype=torch.int64), 7)
    assert lengths == [12, 1, 1, 1, 1, 16, 16]
    lengths.clear()
    generate(decoder, torch.ones(1, 20, dtype=torch.int64), 2)
    assert lengths == [16, 16]


@torch.inference_mode()
def test_under_autocast(build: Callable[..., Decoder]) -> None:
    for attention in ("gqa", "mla"):
        decoder = build(f"attention={attention}", "attention.qk_norm=true")
        tokens = tokens_of(decoder)
        with torch.autocast("cpu", torch.bfloat16):
            expected = decoder.logits(tokens)
            cache = decoder.new_cache(3)
            assert cache is not None
            found = [decoder.logits(piece, cache) for piece in tokens.split([9, 1, 6], dim=1)]
        assert all(tensor.dtype == torch.bfloat16 for layer in cache.layers for tensor in layer.values())
        # logits of order 1 in 8 bits, from other kernels
        torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("overrides", "elements"),  # a layer and a token, with d_model 32 and 4 heads of 8
    [
        (["attention=mha"], 2 * 32),
        (["attention=gqa", "attention.n_kv_heads=2"], 2 * 16),
        (["attention=mqa"], 2 * 8),
        (["attention=mla"], 4 * 8 + 4),
        (["attention=sliding_window", "attention.window=8", "attention.n_kv_heads=4"], 32),  # half of the 16 tokens
    ],
)
@torch.inference_mode()
def test_what_it_takes(build: Callable[..., Decoder], overrides: list[str], elements: int) -> None:
    assert build(*overrides, device="meta").cache_bytes_per_token(torch.bfloat16) == 2 * elements * 2
    decoder = build(*overrides)
    cache = decoder.new_cache(3)
    assert cache is not None
    decoder.logits(tokens_of(decoder), cache)
    n_bytes = sum(tensor.nbytes for layer in cache.layers for tensor in layer.values())  # those that were filled
    assert n_bytes == 3 * 16 * decoder.cache_bytes_per_token(torch.float32)


@torch.inference_mode()
def test_what_does_not_fit(build: Callable[..., Decoder]) -> None:
    decoder = build()
    cache = decoder.new_cache()
    tokens = torch.ones(1, decoder.context_length + 1, dtype=torch.int64)
    decoder.logits(tokens[:, :-1], cache)
    with pytest.raises(ValueError, match=r"has 17 tokens a sequence, with those cached, model.context_length=16"):
        decoder.logits(tokens[:, -1:], cache)


@torch.inference_mode()
def test_what_a_smaller_cache_has_no_room_for(build: Callable[..., Decoder]) -> None:
    decoder = build()
    cache = decoder.new_cache(3, n_tokens=4)
    assert cache is not None
    tokens = tokens_of(decoder)
    decoder.logits(tokens[:, :3], cache)
    with pytest.raises(ValueError, match="has 5 tokens a sequence, with those cached, the cache was made for 4"):
        decoder.logits(tokens[:, 3:5], cache)
    torch.testing.assert_close(decoder.logits(tokens[:, 3:4], cache), decoder.logits(tokens[:, :4])[:, 3:])
