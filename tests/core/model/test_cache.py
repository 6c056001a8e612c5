"""Token by token with a cache is what the whole sequence is at once."""

from collections.abc import Callable

import pytest
import torch

from thunderhead.core.model.decoder import Cache, Decoder

POSITIONS = ("rope", "alibi", "learned", "sinusoidal", "none")


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("attention", ["mha", "mqa", "gqa", "sliding_window", "mla"])
def test_equals_the_whole_sequence(
    build: Callable[..., Decoder], attention: str, position: str, document_mask: bool
) -> None:
    window = ["attention.window=5", "attention.n_kv_heads=2"] if attention == "sliding_window" else []
    masked = f"attention.document_mask={document_mask}"
    decoder = build(f"attention={attention}", f"position={position}", masked, *window)
    tokens = torch.randint(1, 61, (3, decoder.context_length))
    tokens[0, 3] = tokens[0, 11] = tokens[1, 7] = 0  # documents end
    with torch.inference_mode():
        expected = decoder.logits(tokens)
        cache = Cache(decoder)
        found = [decoder.logits(tokens[:, :6], cache)]
        found += [decoder.logits(tokens[:, i : i + 1], cache) for i in range(6, decoder.context_length)]
    # float32 sums of up to 32 terms in another order, through two layers
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_what_does_not_fit(build: Callable[..., Decoder]) -> None:
    decoder = build()
    cache = Cache(decoder)
    tokens = torch.ones(1, decoder.context_length + 1, dtype=torch.int64)
    with torch.inference_mode():
        decoder.logits(tokens[:, :-1], cache)
        with pytest.raises(ValueError, match="there are 17 tokens with those cached"):
            decoder.logits(tokens[:, -1:], cache)
        capped = build("attention.logit_softcap=50.0")
        cache = Cache(capped)
        capped.logits(tokens[:, :3], cache)
        with pytest.raises(ValueError, match=r"logit_softcap=50 does not go with a key/value cache"):
            capped.logits(tokens[:, 3:4], cache)
