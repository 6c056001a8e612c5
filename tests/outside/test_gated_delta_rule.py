"""A recurrent mixer from outside: its numbers, its cache, its FLOPs."""

import pytest
import torch
from gated_delta_rule import delta_rule_chunk
from torch.nn import functional as F

from thunderhead.release.sample import generate

TOKENS = torch.randint(61, (2, 16), generator=torch.Generator().manual_seed(0))


def test_a_chunk_is_the_recurrence_step_by_step() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 9, 5) for _ in range(3))
    k = F.normalize(k, dim=-1)
    log_decay, rate, state = -torch.rand(2, 3, 9), torch.rand(2, 3, 9), torch.randn(2, 3, 5, 5)
    output, after = delta_rule_chunk(q, k, v, log_decay, rate, state)
    steps = []
    for t in range(9):
        key, value = k[:, :, t, :, None], v[:, :, t, None]
        decayed = log_decay[:, :, t, None, None].exp() * state
        b = rate[:, :, t, None, None]
        state = decayed - b * key @ (key.mT @ decayed) + b * key @ value
        steps.append((q[:, :, t, None] @ state)[:, :, 0])
    torch.testing.assert_close(output, torch.stack(steps, dim=2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after, state, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_chunks_pieces_and_steps_are_one_sequence(outside) -> None:
    decoder = outside("attention=gated_delta_rule", "position=none", "attention.chunk=5")
    expected = decoder.logits(TOKENS)
    torch.testing.assert_close(
        outside("attention=gated_delta_rule", "position=none").logits(TOKENS), expected, rtol=1e-5, atol=1e-5
    )
    for sizes in ([1] * 16, [6, 1, 1, 8]):
        cache = decoder.new_cache(2)
        found = [decoder.logits(piece, cache) for piece in TOKENS.split(sizes, dim=1)]
        torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=1e-5, atol=1e-5)


def test_text_with_its_cache_is_text_without(outside, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = outside("attention=gated_delta_rule", "position=none")
    cached = generate(decoder, TOKENS[:, :3], 20, seed=3)
    monkeypatch.setattr(type(decoder), "new_cache", lambda *_: None)
    assert torch.equal(cached, generate(decoder, TOKENS[:, :3], 20, seed=3))


def test_what_it_costs(outside) -> None:
    decoder = outside("attention=gated_delta_rule", "position=none")
    assert decoder.cache_bytes_per_token() == 4 * 4 * 4 * 8 * 8 / 16  # layers, bytes, heads, a head's state, tokens
    mixer = 4 * 32 * 32 + 2 * 32 * 4
    mlp = 3 * 32 * decoder.blocks[0].feedforward.up_proj.out_features
    head = decoder.head_weight.numel()
    assert decoder.forward_flops_per_token() == 2 * (4 * (mixer + mlp) + head) + 4 * 3 * 2 * 4 * 8 * 8


def test_it_learns(outside) -> None:
    decoder = outside("attention=gated_delta_rule", "position=none").train()
    decoder(TOKENS[:, :-1], TOKENS[:, 1:]).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in decoder.parameters())
    with pytest.raises(ValueError, match="no layer makes use of these positions: use position=none"):
        outside("attention=gated_delta_rule", "position=rope")
